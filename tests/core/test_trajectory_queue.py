"""One contract for every queue, and what replay samples."""

import contextlib

import jax
import numpy as np
import pytest

from impala_jax.build import make_agent
from impala_jax.trajectory_queue import LocalTrajectoryQueue, Replay
from impala_jax.types import Closed
from tests.helpers.transport import (
    BATCH,
    CAPACITY,
    FRESH,
    NETWORK,
    SPEC,
    assert_known,
    in_thread,
    leaves_of,
    make_trajectories,
    reverb_queue,
    reverb_server,
)


@pytest.fixture(params=['local', pytest.param('reverb', marks=pytest.mark.launchpad)])
def make_queue(request):
    """Queues that are ends of one and the same, each with its time-out; closed at the end."""
    with contextlib.ExitStack() as cleanup:
        if request.param == 'local':
            shared = {}

            def make(timeout_s=30.0):
                queue = shared.setdefault(timeout_s, LocalTrajectoryQueue(BATCH, CAPACITY, timeout_s))
                cleanup.callback(queue.close)
                return queue
        else:
            server = cleanup.enter_context(reverb_server())

            def make(timeout_s=30.0):
                queue = reverb_queue(f'localhost:{server.port}', timeout_s)
                cleanup.callback(queue.close)
                return queue

        yield make


def test_first_in_first_out_and_bit_identical(make_queue):
    writer, reader = make_queue(), make_queue()
    # Chunks that do not divide the batch.
    chunks = [make_trajectories(0, 4), make_trajectories(4, 5), make_trajectories(9, 3)]
    thread, errors = in_thread(lambda: [writer.put(chunk) for chunk in chunks])
    batches = [reader.get_batch() for _ in range(2)]
    thread.join(30)
    assert not errors
    assert [list(batch.version) for batch in batches] == [list(range(6)), list(range(6, 12))]
    for i in range(12):
        sent = next(leaves_of(c, i - c.version[0]) for c in chunks if i in c.version)
        got = leaves_of(batches[i // 6], i % 6)
        assert len(sent) == len(got)
        for a, b in zip(sent, got, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_every_trajectory_once_with_several_writers(make_queue):
    reader = make_queue()
    writers = [make_queue() for _ in range(3)]
    threads = [
        in_thread(lambda w=w, k=k: [w.put(make_trajectories(1000 * k + 2 * j, 2)) for j in range(6)])
        for k, w in enumerate(writers)
    ]
    versions = np.concatenate([reader.get_batch().version for _ in range(6)]).tolist()
    for thread, errors in threads:
        thread.join(30)
        assert not errors
    assert sorted(versions) == [1000 * k + j for k in range(3) for j in range(12)]
    for k in range(3):  # In order, for each writer.
        own = [v for v in versions if v // 1000 == k]
        assert own == sorted(own)


def test_a_full_queue_blocks_its_writer_until_its_timeout(make_queue):
    writer = make_queue(1.0)
    with pytest.raises(TimeoutError, match='waited .* for the learner to take trajectories'):
        for j in range(10):
            writer.put(make_trajectories(4 * j, 4))


def test_what_is_left_of_a_chunk_blocks_nobody(make_queue):
    """Less than a batch waits, and the next chunk is larger than the room: reader and writer are both served."""
    writer, reader = make_queue(), make_queue()
    thread, errors = in_thread(lambda: [writer.put(make_trajectories(10 * j, 10)) for j in range(3)])
    versions = [v for _ in range(5) for v in reader.get_batch().version.tolist()]
    thread.join(30)
    assert not errors and versions == list(range(30))


def test_an_empty_queue_blocks_its_reader_until_its_timeout(make_queue):
    with pytest.raises(TimeoutError, match='the learner waited .* for actors'):
        make_queue(0.5).get_batch()


def test_close_ends_waits_at_once(make_queue):
    queue = make_queue()
    thread, errors = in_thread(queue.get_batch)
    queue.close()
    queue.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(errors[0], Closed)
    with pytest.raises(Closed):
        queue.put(make_trajectories(0, 1))
    with pytest.raises(Closed):
        queue.get_batch()


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


def test_without_samples_there_is_no_replay():
    fresh = make_trajectories(0, FRESH)
    assert Replay(capacity=10, num_samples=0, seed=0).mix(fresh) is fresh


@pytest.mark.parametrize('before', [0, 1, 6])
def test_replay_goes_on_from_a_checkpoint(before):
    replay = Replay(capacity=10, num_samples=4, seed=0)
    for k in range(before):
        replay.mix(make_trajectories(FRESH * k, FRESH))
    other = Replay(capacity=10, num_samples=4, seed=0)
    state = jax.tree.map(lambda x: np.array(x, copy=True), replay.state())
    other.restore(state, make_agent(NETWORK, SPEC).trajectory_structure())
    for k in range(before, before + 6):
        ours, theirs = (each.mix(make_trajectories(FRESH * k, FRESH)) for each in (replay, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
