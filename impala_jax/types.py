"""The values that cross a `jit`, a thread or the wire.

Shapes: T is the unroll's length, B the batch (of environments), A the number of actions.

Time follows dm_env everywhere: a timestep holds what was received ON ARRIVING there. A trajectory is T + 1
timesteps, and consecutive trajectories of one environment overlap by one. After a LAST timestep the next one
is FIRST, and the action in between is ignored; any transition that arrives at a FIRST timestep is therefore
no transition of the task, and is masked out of the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

PyTree = Any
Array = Any  # numpy or jax; the shape and dtype stand beside each field.

# dm_env.StepType as plain integers, usable inside a jit.
FIRST, MID, LAST = 0, 1, 2

INSTRUCTION = 'instruction'
"""The key of an instruction in an observation that is a dict: word ids, [words] int32, then zeros."""


_MIN_SIDE, _MAX_CHANNELS = 20, 16


class ArraySpec(NamedTuple):
    """Shape and dtype of one leaf of an observation, without batch dimensions."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool = False
    """Whether the last axis holds successive frames, the newest last: at a timestep the newest of the timestep before
    and one more, or, at some FIRST ones, zeros and one frame."""
    bounds: tuple[int, int] | None = None
    """Smallest and greatest value of integers; None where the environment states only what the dtype does."""
    num_values: int | None = None
    """Of a category, a scalar int32 from 0 to `num_values` - 1 whose order means nothing; None for numbers."""


def image_axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of height, width and channels of what looks like an image; None for what does not.

    Two neighbouring axes of at least 20 are height and width if no other axis is longer than 16: in [84, 84], as in
    [4, 84, 84], [84, 84, 3] and [4, 84, 84, 3]. Otherwise the last of three axes is that of the channels.
    """
    for i in range(len(shape) - 1):
        others = (*range(i), *range(i + 2, len(shape)))
        if min(shape[i : i + 2]) >= _MIN_SIDE and all(shape[axis] <= _MAX_CHANNELS for axis in others):
            return (i, i + 1, *others)
    return (0, 1, 2) if len(shape) == 3 else None


class EnvironmentSpec(NamedTuple):
    """What the agent must know of an environment."""

    observation: PyTree  # of ArraySpec
    num_actions: int
    tasks: tuple[str, ...] = ()  # the names of a suite's tasks, by their ids; () for a single environment
    render_fps: float | None = None  # pictures per second of a video that plays at the right speed; None: unknown

    @property
    def num_tasks(self) -> int:
        return max(1, len(self.tasks))


class TimeStep(NamedTuple):
    """A batch of timesteps, [B, ...], or a sequence of them, [T + 1, B, ...]."""

    step_type: Array  # int32; FIRST, MID or LAST
    reward: Array  # float32, raw, received on arriving here; 0 at FIRST
    discount: Array  # float32, the environment's own: 0 at a termination, 1 otherwise
    observation: PyTree  # In a trajectory a leaf that is `ArraySpec.stacked` is FrameStacks.
    previous_action: Array  # int32, the action that led here; 0 where there was none


class FrameStacks(NamedTuple):
    """A stacked leaf of T + 1 observations [T + 1, B, ..., K], each frame once."""

    frames: Array  # [T + K, B, ...]; the newest of timestep t is frames[t + K - 1]
    num_earlier: Array  # [T + 1, B] uint8, how many of a stack's earlier frames are not known to be zeros


class StepInfo(NamedTuple):
    """Counts of a step that are never learned from. One entry per environment, [B] or [T, B]."""

    episode_return: Array  # float32, the undiscounted raw return of the GAME that ended on arriving here, else 0
    episode_ended: Array  # bool, whether a game ended on arriving here
    restarts: Array  # int32, 1 where the environment failed and was rebuilt in this step, else 0

    @property
    def game_over(self) -> Array:
        """bool, whether another game begins after this step."""
        return self.episode_ended | (self.restarts > 0)


class Experience(NamedTuple):
    """What is learned from a trajectory."""

    timesteps: TimeStep  # [T + 1, B, ...]
    behaviour_logits: Array  # [T, B, A] float32
    initial_state: PyTree  # [B, ...]
    task: Array  # [B] int32

    @property
    def actions(self) -> Array:
        """[T, B] int32; action t was taken from timestep t."""
        return self.timesteps.previous_action[1:]


class Counts(NamedTuple):
    """What is counted of a trajectory, and never learned from."""

    info: StepInfo  # [T, B]
    version: Array  # [B] int32
    task: Array  # [B] int32
    game_version: Array  # [T, B] int32


class Trajectory(NamedTuple):
    """T transitions of B environments, time-major."""

    timesteps: TimeStep  # [T + 1, B, ...]
    behaviour_logits: Array  # [T, B, A] float32, the very logits that the actions were sampled from
    initial_state: PyTree  # [B, ...], the recurrent core's state before timestep 0
    info: StepInfo  # [T, B], of the arrivals at timesteps 1 to T, so that each is counted once
    version: Array  # [B] int32, the version of the parameters that acted
    task: Array  # [B] int32, the task's id: its place in `EnvironmentSpec.tasks`; 0 in a single environment
    game_version: Array  # [T, B] int32, the version that took the first action of the game that action t belongs to

    @property
    def actions(self) -> Array:
        """[T, B] int32; action t was taken from timestep t."""
        return self.timesteps.previous_action[1:]

    @property
    def experience(self) -> Experience:
        """What is learned from."""
        return Experience(self.timesteps, self.behaviour_logits, self.initial_state, self.task)

    @property
    def counts(self) -> Counts:
        """What is counted."""
        return Counts(self.info, self.version, self.task, self.game_version)


def batch_axis(field: str) -> int:
    """Axis of the batch in a field of `Trajectory`, `Experience` or `Counts`: 1 behind time, 0 where there is none."""
    return 0 if field in ('initial_state', 'version', 'task') else 1


class Closed(Exception):
    """Raised by a queue or store that was closed: the run is ending, and whoever waits should end too."""
