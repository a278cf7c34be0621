"""Types of the values that cross a `jit`, a thread or the network.

Shapes: T is the unroll length, B the batch size (a number of environments), A the number of actions.

Time follows dm_env: reward and discount of a timestep are those received ON ARRIVAL at it. A trajectory has T + 1
timesteps, and consecutive trajectories of an environment overlap by one. The timestep after a LAST one is FIRST, and
the action between them is ignored. So a transition that arrives at a FIRST timestep is not a transition of the task,
and the loss masks it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

PyTree = Any
Array = Any  # NumPy or JAX array; the comment at each field gives shape and dtype.

# dm_env.StepType as plain integers, for use inside a jit.
FIRST, MID, LAST = 0, 1, 2

INSTRUCTION = 'instruction'
"""Key of the instruction in an observation that is a dict: word ids, [words] int32, padded with zeros."""


_MIN_SIDE, _MAX_CHANNELS = 20, 16


class ArraySpec(NamedTuple):
    """Shape and dtype of one leaf of an observation, without batch dimensions."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool = False
    """Whether the last axis holds successive frames, newest last. Each timestep drops the oldest frame and adds a new
    one; a FIRST timestep may hold zeros and one frame instead."""
    bounds: tuple[int, int] | None = None
    """Smallest and largest value of integers; None if the environment states no bounds beyond those of the dtype."""
    num_values: int | None = None
    """Number of categories, for a scalar int32 from 0 to `num_values` - 1 whose order has no meaning; else None."""


def image_axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Guesses the axes of height, width and channels of an image.

    Two adjacent axes of size 20 or more are height and width if no other axis is larger than 16, as in [84, 84],
    [4, 84, 84], [84, 84, 3] and [4, 84, 84, 3]. Otherwise the last of three axes holds the channels.

    Returns:
      The axes of height, width and channels; None if the shape is not that of an image.
    """
    for i in range(len(shape) - 1):
        others = (*range(i), *range(i + 2, len(shape)))
        if min(shape[i : i + 2]) >= _MIN_SIDE and all(shape[axis] <= _MAX_CHANNELS for axis in others):
            return (i, i + 1, *others)
    return (0, 1, 2) if len(shape) == 3 else None


class EnvironmentSpec(NamedTuple):
    """Description of an environment for the agent."""

    observation: PyTree  # Leaves are ArraySpecs.
    num_actions: int
    tasks: tuple[str, ...] = ()  # Names of a suite's tasks, indexed by task id; () for a single environment.
    render_fps: float | None = None  # Frames per second of a video at normal speed; None if unknown.

    @property
    def num_tasks(self) -> int:
        """Number of tasks, 1 for a single environment."""
        return max(1, len(self.tasks))


class TimeStep(NamedTuple):
    """A batch of timesteps, [B, ...], or a sequence of them, [T + 1, B, ...]."""

    step_type: Array  # int32, FIRST, MID or LAST.
    reward: Array  # float32, raw reward received on arrival at the timestep; 0 at FIRST.
    discount: Array  # float32, discount of the environment: 0 at a termination, 1 otherwise.
    observation: PyTree  # In a trajectory, leaves with `ArraySpec.stacked` are FrameStacks.
    previous_action: Array  # int32, action that led to the timestep; 0 if there was none.


class FrameStacks(NamedTuple):
    """A stacked leaf of T + 1 observations [T + 1, B, ..., K], with each frame stored once."""

    frames: Array  # [T + K, B, ...]; the newest frame of timestep t is frames[t + K - 1].
    num_earlier: Array  # [T + 1, B] uint8, number of a stack's earlier frames that may be nonzero.


class StepInfo(NamedTuple):
    """Statistics of a step, which the loss does not use. One entry per environment, [B] or [T, B]."""

    episode_return: Array  # float32, undiscounted raw return of the GAME that ended at this arrival, else 0.
    episode_ended: Array  # bool, whether a game ended at this arrival.
    restarts: Array  # int32, 1 if the environment failed and was rebuilt in this step, else 0.

    @property
    def game_over(self) -> Array:
        """Whether another game begins after this step, bool."""
        return self.episode_ended | (self.restarts > 0)


class Experience(NamedTuple):
    """The part of a trajectory that the loss uses."""

    timesteps: TimeStep  # [T + 1, B, ...]
    behaviour_logits: Array  # [T, B, A] float32
    initial_state: PyTree  # [B, ...]
    task: Array  # [B] int32

    @property
    def actions(self) -> Array:
        """Actions, [T, B] int32; action t was taken at timestep t."""
        return self.timesteps.previous_action[1:]


class Counts(NamedTuple):
    """The part of a trajectory that is used for statistics only."""

    info: StepInfo  # [T, B]
    version: Array  # [B] int32
    task: Array  # [B] int32
    game_version: Array  # [T, B] int32


class Trajectory(NamedTuple):
    """T transitions of B environments, time-major."""

    timesteps: TimeStep  # [T + 1, B, ...]
    behaviour_logits: Array  # [T, B, A] float32, from which the actions were sampled.
    initial_state: PyTree  # [B, ...], state of the recurrent core before timestep 0.
    info: StepInfo  # [T, B], for the arrivals at timesteps 1 to T, so that each is counted once.
    version: Array  # [B] int32, version of the actor's parameters.
    task: Array  # [B] int32, task id: index in `EnvironmentSpec.tasks`; 0 for a single environment.
    game_version: Array  # [T, B] int32, version that took the first action of the game to which action t belongs.

    @property
    def actions(self) -> Array:
        """Actions, [T, B] int32; action t was taken at timestep t."""
        return self.timesteps.previous_action[1:]

    @property
    def experience(self) -> Experience:
        """The part that the loss uses."""
        return Experience(self.timesteps, self.behaviour_logits, self.initial_state, self.task)

    @property
    def counts(self) -> Counts:
        """The part that is used for statistics only."""
        return Counts(self.info, self.version, self.task, self.game_version)


def batch_axis(field: str) -> int:
    """Batch axis of a field of `Trajectory`, `Experience` or `Counts`: 1 if the field has a time axis, else 0."""
    return 0 if field in ('initial_state', 'version', 'task') else 1


class Closed(Exception):
    """Raised by a closed queue or store: the run is ending, and its callers should end too."""
