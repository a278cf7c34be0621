"""A host's share of the configuration."""

import pytest

from impala_jax.config import ActorConfig, Config, ConfigError, LearnerConfig, ReplayConfig
from impala_jax.runtimes.host_share import host_share, resolved


def test_hosts_share_a_batch_evenly(monkeypatch):
    config = Config(learner=LearnerConfig(batch_size=32), replay=ReplayConfig(fraction=0.25, capacity=7), seed=5)
    alone = host_share(config)
    assert (alone.num_fresh, alone.num_replayed, alone.replay_capacity, alone.seed) == (24, 8, 7, 5)
    shares = []
    for index in range(2):
        monkeypatch.setattr('impala_jax.runtimes.host_share.host', lambda index=index: (index, 2))
        shares.append(host_share(config))
    assert [(share.num_fresh, share.num_replayed, share.replay_capacity) for share in shares] == [(12, 4, 4)] * 2
    assert [share.evaluates for share in shares] == [True, False]
    assert shares[0].seed == 5 != shares[1].seed
    with pytest.raises(ConfigError, match='its 31 new trajectories do not divide over 2 hosts'):
        host_share(Config(learner=LearnerConfig(batch_size=32), replay=ReplayConfig(fraction=1 / 32)))


def test_the_queue_holds_two_batches_or_one_unroll_of_every_actor():
    def capacity(num_actors=2, num_envs=16, queue_capacity=None, fraction=0.0):
        learner, replay = LearnerConfig(queue_capacity=queue_capacity), ReplayConfig(fraction=fraction)
        actor = ActorConfig(num_actors=num_actors, num_envs=num_envs)
        return host_share(Config(actor=actor, learner=learner, replay=replay, serve_actors=5000)).queue_capacity

    assert capacity() == capacity(num_actors=0) == 64
    assert capacity(num_actors=10, num_envs=10) == 100
    assert capacity(queue_capacity=40) == 40
    assert capacity(num_envs=4, fraction=0.75) == 16


def test_the_number_of_actors_is_resolved_when_a_run_starts(monkeypatch):
    monkeypatch.setattr('impala_jax.runtimes.host_share.num_cores', lambda: 7)
    assert Config().actor.num_actors is None
    assert resolved(Config()).actor.num_actors == host_share(Config()).num_actors == 7
    given = Config(actor=ActorConfig(num_actors=3))
    assert resolved(given) is given
