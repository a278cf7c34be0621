"""Configuration of an experiment: all of it, and the numbers that follow from several parts."""

from __future__ import annotations

import dataclasses
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
    """An experiment."""

    total_frames: int = 200_000_000
    """Environment frames to train for, action repeat included; rounded up to whole updates."""
    seed: int = 0
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
    """Runtime `lockstep`: actors act with parameters exactly this many updates old."""
    launch_type: Literal['local_mt', 'local_mp'] = 'local_mt'
    """Runtime `launchpad`: nodes are threads of one process, or processes."""
    serve_actors: int | None = None
    """Runtime `launchpad`: port at which actors of other machines join (`launch/actors.py`) that know the run's secret.
    None: no others join."""
    timeout_s: float = 300.0
    """No wait of one part for another lasts longer than this; covers compilation and the slowest reset, s."""

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
            self.actor.num_actors != 0 or self.serve_actors is not None,
            'actor.num_actors is 0, and nobody else acts: give it some, or let actors of other machines join with '
            '--serve-actors PORT',
        )
        require(
            self.optimizer.schedule == 'constant' or self.schedule_updates >= self.total_updates,
            f'optimizer.schedule_frames {self.optimizer.schedule_frames} is below total_frames {self.total_frames}: '
            'the learning rate would be 0 from there on, and nothing learned; raise it',
        )
        replayed = self.replay.fraction * self.learner.batch_size
        require(
            replayed == int(replayed),
            f'replay.fraction {self.replay.fraction} of learner.batch_size {self.learner.batch_size} is no whole '
            'number of trajectories; change either',
        )
        capacity = self.learner.queue_capacity
        require(
            capacity is None or capacity >= self.num_fresh,
            f'learner.queue_capacity {capacity} is below the {self.num_fresh} trajectories of a batch that come from '
            f'the queue: no batch could ever be complete; try {2 * self.num_fresh}',
        )

    @property
    def num_replayed(self) -> int:
        """Trajectories of a batch that come from replay."""
        return int(self.replay.fraction * self.learner.batch_size)

    @property
    def num_fresh(self) -> int:
        """Trajectories of a batch that come from the queue; they stand first."""
        return self.learner.batch_size - self.num_replayed

    @property
    def frames_per_update(self) -> int:
        """Environment frames consumed by one update; what is replayed does not count again."""
        return self.num_fresh * self.learner.unroll_length * self.environment.frames_per_step

    @property
    def total_updates(self) -> int:
        """Updates in the whole run."""
        return -(-self.total_frames // self.frames_per_update)

    @property
    def schedule_updates(self) -> int:
        """Updates over which linear schedules fall to 0."""
        frames = self.optimizer.schedule_frames
        return self.total_updates if frames is None else -(-frames // self.frames_per_update)
