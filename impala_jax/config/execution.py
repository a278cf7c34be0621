"""Configuration of how an experiment runs: learner, actors, evaluator, checkpoints, metrics."""

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
    """The batched update."""

    batch_size: int = 32
    """Trajectories in an update, over all devices of all hosts."""
    unroll_length: int = 20
    """Transitions in a trajectory (n in the paper)."""
    num_devices: int | None = None
    """Devices of each host to split the batch over; None: all."""
    queue_capacity: int | None = None
    """Trajectories that wait at most, on each host, before actors block; None: two of the host's batches (but at least
    one unroll of each actor)."""
    max_nonfinite_updates: int = 10
    """An update whose gradient is not finite is skipped and counted; this many in a row end the run."""

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
    """Actors; each steps a vector of environments with one batched inference a step."""

    num_actors: Annotated[int | None, _number_or_auto] = None
    """Actors per host; `auto` (None): one per core, resolved when a run starts. 0 only with
    `serve_actors`: all actors are on other machines."""
    num_envs: int = 16
    """Environments an actor."""
    inference: Literal['actor', 'accelerator'] = 'actor'
    """Where actors run the network. `actor`: each by itself, on the CPU. `accelerator`: on the learner's devices, the
    requests of all actors in one batch (`impala_jax.inference`), for networks that are too slow for the CPU; runtimes
    `threads` and `launchpad` with `local_mt`. Actors of other machines always run it themselves."""
    inference_wait_ms: float = 2.0
    """`accelerator`: how long the first request of a batch waits for those of other actors."""

    def __post_init__(self):
        require(self.inference_wait_ms >= 0, f'actor.inference_wait_ms must be 0 or more, got {self.inference_wait_ms}')
        require((self.num_actors or 0) >= 0, f'actor.num_actors must be 0 or more, got {self.num_actors}')
        require_positive('actor', num_envs=self.num_envs)


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """The evaluator plays whole episodes with the newest parameters, beside training and once more at the end."""

    episodes: int = 20
    """Episodes an evaluation, of each task of a suite; 0 for no evaluator."""
    interval_s: float = 60.0
    """Pause between two evaluations, s."""
    num_envs: int = 10
    """Environments stepped together; at most `episodes` are used."""
    greedy: bool = False
    """Play the most likely action; the paper samples."""
    max_episode_steps: int = 27_000
    """Agent steps after which an episode of an evaluation is truncated, so that every evaluation ends. The default is
    half an hour of an Atari game, the usual limit there."""

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
    """When a checkpoint is written; one more is written at the end, and on SIGTERM and SIGINT."""

    interval_s: float = 300.0
    keep: int = 3
    """The newest this many are kept; at least 2, so that a damaged one never loses the run."""

    def __post_init__(self):
        require_positive('checkpoint', interval_s=self.interval_s)
        require(self.keep >= 2, f'checkpoint.keep must be 2 or more, got {self.keep}')


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """When a row of metrics is written."""

    interval_s: float = 2.0
    """Runtimes `threads` and `launchpad`."""
    interval_updates: int = 50
    """Runtime `lockstep`, whose rows must not depend on the clock."""

    def __post_init__(self):
        require_positive('logging', interval_s=self.interval_s, interval_updates=self.interval_updates)
