"""A host's share of an experiment: its actors, queue and replay."""

from __future__ import annotations

import dataclasses

import jax

from impala_jax import seeds
from impala_jax.config import ActorConfig, Config, ConfigError, EnvironmentConfig
from impala_jax.system.machine import num_cores


@dataclasses.dataclass(frozen=True)
class HostShare:
    """Settings of one host's actors, queue and replay. The learner uses the configuration of the whole experiment."""

    seed: int  # Seed of this host.
    environment: EnvironmentConfig
    actor: ActorConfig
    num_actors: int  # 0 if all actors are on other machines, or follow a Ray cluster.
    unroll_length: int
    num_fresh: int  # Trajectories from the queue in this host's part of a batch; they come first.
    num_replayed: int  # Trajectories from replay in this host's part of a batch.
    queue_capacity: int  # Trajectories that can wait before actors block.
    replay_capacity: int  # Largest number of trajectories in replay.
    evaluates: bool  # Whether this host evaluates; true on host 0 only.
    timeout_s: float

    @property
    def num_envs(self) -> int:
        """Number of environments of all actors of this host."""
        return self.num_actors * self.actor.num_envs

    def node_seed(self, *path: int) -> int:
        """Returns an independent seed in [0, 2**31) for the node at `path` (role, index, ...)."""
        return seeds.derived_seed(self.seed, *path)


def host() -> tuple[int, int]:
    """Index of this host and number of hosts in the run (`impala_jax.runtimes.pod`)."""
    # `process_index` would initialize the accelerator in a process other than the learner's.
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def resolved(config: Config) -> Config:
    """Returns the configuration with machine-dependent values set: `actor.num_actors`, one per core.

    In a Ray cluster, which may grow and shrink, the number of actors stays None.
    """
    if config.actor.num_actors is not None or config.ray_address is not None:
        return config
    return dataclasses.replace(config, actor=dataclasses.replace(config.actor, num_actors=num_cores()))


def host_share(config: Config) -> HostShare:
    """Returns the share of this host; on a single host, the whole experiment.

    Raises:
      ConfigError: If the batch does not divide over the hosts.
    """
    index, count = host()
    for what, number in (('new', config.num_fresh), ('replayed', config.num_replayed)):
        if number % count:
            raise ConfigError(
                f'learner.batch_size {config.learner.batch_size}: its {number} {what} trajectories do not divide over '
                f'{count} hosts; choose a multiple'
            )
    num_actors = resolved(config).actor.num_actors or 0
    num_fresh, num_envs = config.num_fresh // count, num_actors * config.actor.num_envs
    return HostShare(
        seed=config.seed if index == 0 else seeds.derived_seed(config.seed, 3, index),
        environment=config.environment,
        actor=config.actor,
        num_actors=num_actors,
        unroll_length=config.learner.unroll_length,
        num_fresh=num_fresh,
        num_replayed=config.num_replayed // count,
        queue_capacity=config.learner.queue_capacity or max(2 * num_fresh, num_envs),
        replay_capacity=-(-config.replay.capacity // count),
        evaluates=index == 0 and config.evaluator.episodes > 0,
        timeout_s=config.timeout_s,
    )
