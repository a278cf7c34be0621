"""Queues and parameters over Reverb: other processes, and another user's items."""

import multiprocessing
import threading

import jax
import numpy as np
import pytest

from impala_jax.types import Closed
from tests.helpers import intruder
from tests.helpers.transport import (
    BATCH,
    FRESH,
    PARAMS,
    assert_known,
    in_thread,
    intrude,
    leaves_of,
    make_trajectories,
    reverb_queue,
    reverb_server,
    reverb_store,
)

pytestmark = pytest.mark.launchpad
REPLAYED = {'fraction': 1 / 3, 'capacity': 100}


@pytest.fixture
def server():
    with reverb_server(**REPLAYED) as server:
        yield server


def test_only_what_the_run_wrote_is_learned_from_and_once(server, caplog, tmp_path, monkeypatch):
    """Copies of genuine trajectories, altered and malformed ones from another user stand between genuine ones."""
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    tmp_path.chmod(0o777)
    address = f'localhost:{server.port}'
    writer, reader = (reverb_queue(address, 60.0, **REPLAYED) for _ in range(2))
    writer.put(make_trajectories(0, 4))
    batches = [reader.get_batch()]
    number = intrude(address, 'replay', 'trajectories')
    assert number > 20
    writer.put(make_trajectories(4, 4))
    batches.append(reader.get_batch())
    fresh = np.concatenate([batch.version[:4] for batch in batches])
    assert fresh.tolist() == list(range(8))
    for batch in batches:
        for i, version in enumerate(batch.version):
            sent = make_trajectories(4 * (version // 4), 4)
            for a, b in zip(leaves_of(sent, version % 4), leaves_of(batch, i), strict=True):
                np.testing.assert_array_equal(a, b)
    assert reader.num_refused == number
    warned = [record for record in caplog.records if 'was refused' in record.getMessage()]
    assert 2 <= len(warned) <= 7 and 'no part of this run has written it (1 so far)' in warned[0].getMessage()
    assert not list(tmp_path.iterdir()), 'tables were written to the disk'


def test_what_others_write_into_replay_is_neither_sampled_nor_saved(server):
    import reverb

    address = f'localhost:{server.port}'
    queue = reverb_queue(address, 60.0, **REPLAYED)
    queue.put_replay(make_trajectories(0, 4))
    for table in ('replay_in_order', 'replay'):  # It reads in the one that it writes to last.
        intrude(address, 'replay', table)
    queue.put(make_trajectories(4, 4))
    batch = queue.get_batch()
    assert batch.version[:4].tolist() == [4, 5, 6, 7] and set(batch.version[4:].tolist()) <= set(range(8))
    # What was written for replay is not new experience.
    client = reverb.Client(address)
    (replayed,) = client.sample('replay_in_order', 1, emit_timesteps=False)
    intruder.write(client, 'trajectories', *[[np.asarray(column)[0]] for column in replayed.data])
    queue.put(make_trajectories(8, 4))
    assert queue.get_batch().version[:4].tolist() == [8, 9, 10, 11]
    saved = queue.take_replay()
    assert saved.version.tolist() == list(range(1, 12))
    queue.close()


def numbered(version):
    return jax.tree.map(lambda x: x + np.float32(version), PARAMS)


def assert_latest(store, version):
    got, params = store.latest()
    assert got == version
    jax.tree.map(np.testing.assert_array_equal, params, numbered(version))


def test_only_the_learners_parameters_are_acted_with_and_never_older_ones(server, monkeypatch):
    """Altered ones, malformed ones, genuine ones of an earlier update; and they come back where they were removed."""
    import reverb

    monkeypatch.setattr('impala_jax.runtimes.reverb_transport._CHECK_S', 0.1)
    learner, actor = reverb_store(server), reverb_store(server)
    client = reverb.Client(f'localhost:{server.port}')
    learner.publish(3, numbered(3))
    assert_latest(actor, 3)
    (old,) = client.sample('parameters', 1, emit_timesteps=False)
    learner.publish(5, numbered(5))
    assert_latest(actor, 5)
    for _ in range(3):
        intruder.write(client, 'parameters', *[[np.asarray(column)[0]] for column in old.data])
        assert_latest(actor, 5)
    assert intrude(f'localhost:{server.port}', 'parameters', 'parameters')
    assert_latest(actor, 5)
    assert_latest(reverb_store(server), 5)  # One that has not seen them yet.
    client.reset('parameters')
    assert_latest(actor, 5)
    assert_latest(reverb_store(server), 5)
    learner.publish(6, numbered(6))
    assert_latest(actor, 6)
    for store in (learner, actor):
        store.close()


def test_what_another_start_wrote_does_not_fit(server):
    other = reverb_store(server, key=bytes(32))
    other.publish(0, PARAMS)
    other.close()
    with pytest.raises(TimeoutError, match='for the learner to publish'):
        reverb_store(server, timeout_s=0.5).latest()


def _put_from_process(address):
    reverb_queue(address, 60.0).put(make_trajectories(0, BATCH))


def test_reverb_crosses_processes():
    with reverb_server() as server:
        address = f'localhost:{server.port}'
        process = multiprocessing.get_context('spawn').Process(target=_put_from_process, args=(address,), daemon=True)
        process.start()
        queue = reverb_queue(address, 120.0)
        batch = queue.get_batch()
        process.join(60)
        queue.close()
    assert process.exitcode == 0
    np.testing.assert_array_equal(
        batch.timesteps.observation['image'], make_trajectories(0, BATCH).timesteps.observation['image']
    )


def test_a_server_that_stops_keeps_no_reader_of_parameters(server):
    """Reverb's client waits without end if the server stops in the middle of a sample; Launchpad killed such a run."""
    reverb_store(server).publish(0, PARAMS)
    stores = [reverb_store(server) for _ in range(6)]
    reading = [threading.Event() for _ in stores]

    def read(store, event):
        while True:
            store.latest()
            event.set()

    threads = [
        in_thread(lambda store=store, event=event: read(store, event))
        for store, event in zip(stores, reading, strict=True)
    ]
    assert all(event.wait(20) for event in reading)
    stop = threading.Thread(target=server.stop)
    stop.start()
    for store in stores:
        store.close()
    for thread, errors in threads:
        thread.join(5)
        assert not thread.is_alive() and isinstance(errors[0], Closed)
    stop.join(20)
    assert not stop.is_alive()


def test_reverb_samples_a_second_table():
    from impala_jax.runtimes import reverb_tables

    replay = {'fraction': 0.5, 'capacity': 12}
    with reverb_server(**replay) as server:
        writer, reader = (reverb_queue(f'localhost:{server.port}', 30.0, **replay) for _ in range(2))
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
        writer.close()
        reader.close()
