"""Replay: what is sampled, in memory and over Reverb."""

import importlib.util

import jax
import numpy as np
import pytest

from impala_jax.build import make_agent
from impala_jax.config import Config, ConfigError, LearnerConfig, ReplayConfig
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import Replay
from tests.runtimes.test_transport import (
    BATCH,
    NETWORK,
    SPEC,
    in_thread,
    leaves_of,
    make_config,
    make_trajectories,
    reverb_queue,
)

FRESH = BATCH // 2


def assert_known(trajectories, i):
    """Trajectory `i` is the one its version says, bit for bit."""
    version = int(trajectories.version[i])
    chunk = make_trajectories(version - version % FRESH, FRESH)
    for a, b in zip(leaves_of(trajectories, i), leaves_of(chunk, version % FRESH), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_fresh_comes_first_and_samples_behind_it():
    replay = Replay(capacity=100, num_samples=4, seed=0)
    for k in range(5):
        batch = replay.mix(make_trajectories(FRESH * k, FRESH))
        assert batch.version[:FRESH].tolist() == list(range(FRESH * k, FRESH * (k + 1)))
        assert batch.version.shape == (FRESH + 4,)
        assert (batch.version[FRESH:] < FRESH * (k + 1)).all()
        for i in range(FRESH + 4):
            assert_known(batch, i)


def test_the_oldest_is_removed_first():
    replay = Replay(capacity=5, num_samples=400, seed=0)
    for k in range(4):
        batch = replay.mix(make_trajectories(FRESH * k, FRESH))
        expected = set(range(FRESH * (k + 1)))
        assert set(batch.version[FRESH:].tolist()) == set(sorted(expected)[-5:])


def test_sampling_is_uniform():
    """Chi-square of 10,000 samples of 20 trajectories, 19 degrees of freedom: above 43.8 with probability 0.001."""
    replay = Replay(capacity=20, num_samples=10_000, seed=3)
    counts = np.bincount(replay.mix(make_trajectories(0, 20)).version[20:], minlength=20)
    assert np.sum((counts - 500) ** 2 / 500) < 43.8


def test_no_samples_no_replay():
    fresh = make_trajectories(0, FRESH)
    assert Replay(capacity=10, num_samples=0, seed=0).mix(fresh) is fresh


@pytest.mark.parametrize('before', [0, 1, 6])
def test_goes_on_from_a_checkpoint(before):
    replay = Replay(capacity=10, num_samples=4, seed=0)
    for k in range(before):
        replay.mix(make_trajectories(FRESH * k, FRESH))
    other = Replay(capacity=10, num_samples=4, seed=0)
    state = jax.tree.map(lambda x: np.array(x, copy=True), replay.state())
    other.restore(state, make_agent(NETWORK, SPEC).trajectory_structure())
    for k in range(before, before + 6):
        ours, theirs = (each.mix(make_trajectories(FRESH * k, FRESH)) for each in (replay, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_frames_count_what_is_fresh_only():
    config = Config(
        total_frames=960, learner=LearnerConfig(batch_size=8, unroll_length=10), replay=ReplayConfig(fraction=0.25)
    )
    assert (config.num_fresh, config.num_replayed, config.frames_per_update, config.total_updates) == (6, 2, 60, 16)


@pytest.mark.parametrize(
    'fraction, message',
    [(1.0, r'must lie in \[0, 1\), got 1.0'), (0.3, '0.3 of learner.batch_size 6 is no whole number')],
)
def test_a_fraction_that_cannot_be(fraction, message):
    with pytest.raises(ConfigError, match=message):
        make_config(fraction=fraction)


@pytest.mark.launchpad
def test_reverb_samples_a_second_table():
    if importlib.util.find_spec('reverb') is None:
        pytest.skip('reverb not installed')
    import reverb

    from impala_jax.runtimes import reverb_tables

    server = reverb.Server(reverb_tables.tables(host_share(make_config(fraction=0.5, capacity=12))))
    writer, reader = (reverb_queue(f'localhost:{server.port}', 30.0, fraction=0.5, capacity=12) for _ in range(2))
    try:
        chunks = range(0, 40 * FRESH, FRESH)
        thread, errors = in_thread(lambda: [writer.put(make_trajectories(first, FRESH)) for first in chunks])
        batches = [reader.get_batch() for _ in chunks]
        thread.join(30)
        assert not errors
        # Every trajectory once as fresh, in order, whatever else is replayed.
        fresh = np.concatenate([batch.version[:FRESH] for batch in batches])
        assert fresh.tolist() == list(range(40 * FRESH))
        replayed = np.concatenate([batch.version[FRESH:] for batch in batches])
        assert replayed.shape == (40 * FRESH,)
        assert len(set(replayed.tolist())) > 10
        for batch in batches[::7]:
            for i in range(BATCH):
                assert_known(batch, i)
        assert server.localhost_client().server_info()[reverb_tables.REPLAY].current_size == 12
    finally:
        writer.close()
        reader.close()
        server.stop()
