"""Configuration of the execution: learner, actors, evaluator, checkpoints and metrics."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from impala_jax.config.checks import require, require_positive

_number_or_auto = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar='INT|auto',
    instance_from_str=lambda words: None if words[0] == 'auto' else int(words[0]),
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: ['auto' if value is None else str(value)],
)


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The learner."""

    batch_size: int = 32
    """Trajectories per update, over all devices of all hosts."""
    unroll_length: int = 20
    """Transitions per trajectory (n in the paper)."""
    num_devices: int | None = None
    """Devices per host over which the batch is split; None: all devices."""
    queue_capacity: int | None = None
    """Trajectories that can wait on each host before actors block; None: two batches of the host, and at least one
    unroll of every actor."""
    max_nonfinite_updates: int = 10
    """Number of consecutive updates with a non-finite gradient that ends the run. Such updates are skipped and
    counted."""

    def __post_init__(self):
        require_positive(
            'learner',
            batch_size=self.batch_size,
            unroll_length=self.unroll_length,
            max_nonfinite_updates=self.max_nonfinite_updates,
        )
        if self.num_devices is not None:
            require_positive('learner', num_devices=self.num_devices)
            require(
                self.batch_size % self.num_devices == 0,
                f'learner.batch_size {self.batch_size} does not divide over {self.num_devices} devices; '
                f'try {math.ceil(self.batch_size / self.num_devices) * self.num_devices}',
            )


@dataclasses.dataclass(frozen=True)
class ActorConfig:
    """The actors. Each steps a vector of environments, with one batched inference per step."""

    num_actors: Annotated[int | None, _number_or_auto] = None
    """Actors per host; `auto` (None): one per core, resolved when a run starts, or in a Ray cluster one per CPU.
    0 requires `serve_actors`: all actors are on other machines."""
    num_envs: int = 16
    """Environments per actor."""
    inference: Literal['actor', 'accelerator'] = 'actor'
    """Where actors evaluate the network. `actor`: each actor on the CPU. `accelerator`: on the learner's devices, with
    the requests of all actors in one batch (`impala_jax.inference`), for networks that are too slow on the CPU;
    runtimes `threads`, and `launchpad` with `local_mt`. Actors in other processes always use their CPU."""
    inference_wait_ms: float = 2.0
    """Longest time that the first request of a batch waits for requests of other actors, if `inference` is
    `accelerator`, in milliseconds."""

    def __post_init__(self):
        require(self.inference_wait_ms >= 0, f'actor.inference_wait_ms must be 0 or more, got {self.inference_wait_ms}')
        require((self.num_actors or 0) >= 0, f'actor.num_actors must be 0 or more, got {self.num_actors}')
        require_positive('actor', num_envs=self.num_envs)


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """The evaluator, which plays full episodes with the newest parameters during training and at the end."""

    episodes: int = 20
    """Episodes per evaluation, for each task of a suite; 0 for no evaluator."""
    interval_s: float = 60.0
    """Pause between evaluations, in seconds."""
    num_envs: int = 10
    """Environments stepped in parallel; at most `episodes` are used."""
    greedy: bool = False
    """Whether to take the most likely action instead of sampling, as the paper does."""
    max_episode_steps: int = 27_000
    """Agent steps after which an evaluation truncates an episode, so that every evaluation ends. The default is half an
    hour of an Atari game, the usual limit."""

    def __post_init__(self):
        require(self.episodes >= 0, f'evaluator.episodes must be 0 or more, got {self.episodes}')
        require_positive(
            'evaluator',
            num_envs=self.num_envs,
            interval_s=self.interval_s,
            max_episode_steps=self.max_episode_steps,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints. Another one is written at the end of the run, and on SIGTERM and SIGINT."""

    interval_s: float = 300.0
    """Interval between checkpoints, in seconds."""
    keep: int = 3
    """Number of newest checkpoints to keep; at least 2, so that a damaged one does not lose the run."""

    def __post_init__(self):
        require_positive('checkpoint', interval_s=self.interval_s)
        require(self.keep >= 2, f'checkpoint.keep must be 2 or more, got {self.keep}')


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Rows of metrics."""

    interval_s: float = 2.0
    """Interval between rows in the runtimes `threads` and `launchpad`, in seconds."""
    interval_updates: int = 50
    """Interval between rows in the runtimes `lockstep` and `device`, in updates, because their rows must not depend on
    the clock."""

    def __post_init__(self):
        require_positive('logging', interval_s=self.interval_s, interval_updates=self.interval_updates)
