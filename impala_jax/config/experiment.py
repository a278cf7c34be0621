"""Configuration of an experiment: all parts, and the values that depend on several of them."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from impala_jax.config.algorithm import (
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    PBTConfig,
    PopArtConfig,
    ReplayConfig,
    VTraceConfig,
)
from impala_jax.config.checks import require
from impala_jax.config.environment import EnvironmentConfig
from impala_jax.config.execution import ActorConfig, CheckpointConfig, EvaluatorConfig, LearnerConfig, LoggingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of an experiment."""

    total_frames: int = 200_000_000
    """Environment frames of the run, including repeated actions; rounded up to whole updates."""
    seed: int = 0
    """Seed of the run, in [0, 2**31)."""
    environment: EnvironmentConfig = EnvironmentConfig()
    network: NetworkConfig = NetworkConfig()
    vtrace: VTraceConfig = VTraceConfig()
    loss: LossConfig = LossConfig()
    popart: PopArtConfig = PopArtConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    actor: ActorConfig = ActorConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    pbt: PBTConfig = PBTConfig()
    policy_lag: int = 0
    """Runtimes `lockstep` and `device`: exact age of the actors' parameters, in updates."""
    launch_type: Literal['local_mt', 'local_mp'] = 'local_mt'
    """Runtime `launchpad`: nodes as threads of one process (`local_mt`) or as processes (`local_mp`)."""
    serve_actors: int | None = None
    """Runtime `launchpad`: port at which actors on other machines join (`launch/actors.py`) if they know the run's
    secret; None: no other actors can join."""
    ray_address: str | None = None
    """Runtime `ray`: cluster to join, HOST:PORT of its head node or `auto` for the one of this machine; None: an engine
    on this machine, for this run only."""
    timeout_s: float = 300.0
    """Longest wait of one part of a run for another, in seconds; must exceed compilation and the slowest reset."""

    def __post_init__(self):
        for name, value in (('total_frames', self.total_frames), ('timeout_s', self.timeout_s)):
            require(value > 0, f'{name} must be positive, got {value}')
        require(self.policy_lag >= 0, f'policy_lag must be 0 or more, got {self.policy_lag}')
        require(0 <= self.seed < 2**31, f'seed must lie in [0, 2**31), got {self.seed}')
        require(
            self.serve_actors is None or 0 < self.serve_actors < 2**16,
            f'serve_actors must be a port from 1 to 65535, got {self.serve_actors}',
        )
        require(
            self.ray_address is None or bool(re.fullmatch(r'auto|[^/\s]+:\d+', self.ray_address)),
            f"ray_address must be HOST:PORT or 'auto', got {self.ray_address!r}",
        )
        require(
            self.actor.num_actors != 0 or self.serve_actors is not None,
            'actor.num_actors is 0, and no other actors can join: raise it, or let actors on other machines join with '
            '--serve-actors PORT',
        )
        require(
            self.optimizer.schedule == 'constant' or self.schedule_updates >= self.total_updates,
            f'optimizer.schedule_frames {self.optimizer.schedule_frames} is below total_frames {self.total_frames}: '
            'the learning rate would be 0 for the rest of the run; raise it',
        )
        replayed = self.replay.fraction * self.learner.batch_size
        require(
            replayed == int(replayed),
            f'replay.fraction {self.replay.fraction} of learner.batch_size {self.learner.batch_size} is not a whole '
            'number of trajectories; change one of them',
        )
        capacity = self.learner.queue_capacity
        require(
            capacity is None or capacity >= self.num_fresh,
            f'learner.queue_capacity {capacity} is below the {self.num_fresh} trajectories of a batch that come from '
            f'the queue, so no batch could be completed; try {2 * self.num_fresh}',
        )

    @property
    def num_replayed(self) -> int:
        """Number of trajectories of a batch that come from replay."""
        return int(self.replay.fraction * self.learner.batch_size)

    @property
    def num_fresh(self) -> int:
        """Number of trajectories of a batch that come from the queue; they are the first ones."""
        return self.learner.batch_size - self.num_replayed

    @property
    def frames_per_update(self) -> int:
        """Number of environment frames per update; replayed trajectories do not count again."""
        return self.num_fresh * self.learner.unroll_length * self.environment.frames_per_step

    @property
    def total_updates(self) -> int:
        """Number of updates of the run."""
        return -(-self.total_frames // self.frames_per_update)

    @property
    def schedule_updates(self) -> int:
        """Number of updates after which linear schedules reach 0."""
        frames = self.optimizer.schedule_frames
        return self.total_updates if frames is None else -(-frames // self.frames_per_update)
