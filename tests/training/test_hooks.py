"""Hooks of the training loop: metrics, checkpoints, updates that are not finite."""

import math

import jax
import numpy as np
import pytest

from impala_jax.build import make_agent, make_training
from impala_jax.config import Config, EnvironmentConfig, LearnerConfig
from impala_jax.learner import Learner
from impala_jax.rundir.checkpoint import steps
from impala_jax.training.hooks import NonFiniteGradients
from tests.helpers.batches import NETWORK, SPEC, differ, make_batch, make_config, poison
from tests.helpers.counting import SMALL, make_actor, make_counting
from tests.helpers.runs import rows_of


@pytest.fixture
def loop(tmp_path):
    """A loop with action repeat 3, and trajectories of 5 steps of 4 environments for it."""
    environment, _ = make_counting(num_envs=4, length=7)
    actor, params = make_actor(environment, 5, SMALL)
    config = Config(
        total_frames=1000,
        environment=EnvironmentConfig(action_repeat=3),
        network=SMALL,
        learner=LearnerConfig(batch_size=4, unroll_length=5, num_devices=1),
    )
    loop, metrics, *_ = make_training(config, make_agent(SMALL, environment.spec), tmp_path, lambda *_: None)
    loop.unroll = lambda version: actor.unroll(version, params)
    loop.learn = lambda trajectories: loop.step(loop.put(trajectories))
    loop.log = lambda: metrics.log(loop)
    yield loop
    loop.close()


def test_frames_count_action_repeat(loop, tmp_path):
    """One unit everywhere: agent steps times action repeat."""
    for version in range(2):
        loop.learn(loop.unroll(version))
    loop.log()
    assert loop.frames == 2 * 5 * 4 * 3
    assert rows_of(tmp_path)[-1]['frames'] == 2 * 5 * 4 * 3
    assert rows_of(tmp_path)[-1]['learner_steps'] == 2
    config = Config(total_frames=10_000, environment=EnvironmentConfig('atari/pong'))
    assert config.frames_per_update == 32 * 20 * 4
    assert config.total_updates == math.ceil(10_000 / (32 * 20 * 4))


def test_policy_lag_is_logged(loop, tmp_path):
    """Minimum, mean and maximum over the trajectories since the last row, each with the version it was acted with."""
    for version in (0, 0, 0, 3):  # 0, 1, 2 and 0 updates before the one that learns from it
        batch = loop.unroll(version)
        assert (batch.version == version).all()
        loop.learn(batch)
    loop.log()
    row = rows_of(tmp_path)[-1]
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 0.75, 2)
    # Within a batch, too: a trajectory each.
    loop.learn(loop.unroll(4)._replace(version=np.array([4, 3, 2, 0], np.int32)))
    loop.log()
    row = rows_of(tmp_path)[-1]
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 1.75, 4)


def test_mean_return_absent_when_no_episode_ended(loop, tmp_path):
    """Neither NaN nor 0 nor the last one again; and the mean of what ended, where something did."""
    for version in range(5):  # 5 steps each; an episode's end every 8
        loop.learn(loop.unroll(version))
        loop.log()
    written = rows_of(tmp_path)
    assert [row['episodes'] for row in written] == [0, 4, 8, 8, 12]
    assert ['episode_return' in row for row in written] == [False, True, True, False, True]
    assert all(np.isfinite(row['episode_return']) for row in written if 'episode_return' in row)
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


def test_the_loop_ends_after_too_many_skipped_updates(tmp_path):
    """In a row: a good update in between resets the count. Found one update late, so that nothing waits for it."""
    config = make_config(num_devices=1, max_nonfinite_updates=3)
    loop = make_training(config, make_agent(NETWORK, SPEC), tmp_path, lambda *_: None).loop
    try:
        before = loop.params
        for bad in (True, True, False, True, True, True):
            batch = make_batch(version=loop.num_updates)
            loop.step(loop.put(poison(batch) if bad else batch))
        assert loop.num_updates == 6
        assert differ(loop.params, before)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loop.params))
        with pytest.raises(NonFiniteGradients, match='3 updates in a row.*learning_rate'):
            loop.step(loop.put(poison(make_batch(version=loop.num_updates))))
    finally:
        loop.close()


def test_after_an_update_that_failed_the_last_checkpoint_stands(tmp_path, monkeypatch):
    """The update has taken the state with it: what is left of it must not be written over what is good."""
    update = Learner.update
    agent = make_agent(NETWORK, SPEC)
    loop, _, checkpoints, _ = make_training(make_config(num_devices=1), agent, tmp_path, lambda *_: None)
    try:
        loop.step(loop.put(make_batch()))
        checkpoints.save(loop)
        loop.step(loop.put(make_batch()))

        def lose_device(*args, **kwargs):
            update(*args, **kwargs)
            raise RuntimeError('the device is on fire')

        monkeypatch.setattr(Learner, 'update', lose_device)
        with pytest.raises(RuntimeError, match='on fire'):
            loop.step(loop.put(make_batch()))
        loop.finish()
        assert steps(tmp_path / 'checkpoints') == [1]
    finally:
        loop.close()
