"""One contract for every queue and every store."""

import importlib.util
import multiprocessing
import threading

import numpy as np
import pytest

from impala_jax.build import make_agent
from impala_jax.config import Config, LearnerConfig, NetworkConfig, ReplayConfig
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import LocalTrajectoryQueue
from impala_jax.types import ArraySpec, Closed, EnvironmentSpec, StepInfo, TimeStep, Trajectory

SPEC = EnvironmentSpec(
    {'image': ArraySpec((4, 4, 1), np.dtype(np.uint8)), 'x': ArraySpec((3,), np.dtype(np.float32))}, 3
)
NETWORK = NetworkConfig(torso='mlp', core='lstm', lstm_size=5)
T, BATCH, CAPACITY = 4, 6, 12
KEY = bytes(range(32))


def make_config(timeout_s=30.0, **replay):
    learner = LearnerConfig(batch_size=BATCH, unroll_length=T, queue_capacity=CAPACITY)
    return Config(learner=learner, replay=ReplayConfig(**replay), timeout_s=timeout_s)


def make_trajectories(first, number):
    """Trajectories [T + 1, number] whose `version` numbers them from `first`, with contents that depend on it."""
    rng = np.random.default_rng(first)
    shape = [T + 1, number]
    timesteps = TimeStep(
        rng.integers(0, 3, shape, dtype=np.int32),
        rng.normal(size=shape).astype(np.float32),
        rng.random(shape, np.float32),
        {
            'image': rng.integers(0, 255, [*shape, 4, 4, 1], dtype=np.uint8),
            'x': rng.normal(size=[*shape, 3]).astype(np.float32),
        },
        rng.integers(0, 3, shape, dtype=np.int32),
    )
    state = tuple(rng.normal(size=[number, 5]).astype(np.float32) for _ in range(2))
    info = StepInfo(np.zeros([T, number], np.float32), np.zeros([T, number], bool), np.zeros([T, number], np.int32))
    version = np.arange(first, first + number, dtype=np.int32)
    logits = rng.normal(size=[T, number, 3]).astype(np.float32)
    return Trajectory(timesteps, logits, state, info, version, version % 7, version + np.zeros([T, 1], np.int32))


def leaves_of(trajectory, i):
    import jax

    def column(axis, x):
        return x[i] if axis == 0 else x[:, i]

    return [
        column(0 if name in ('initial_state', 'version', 'task') else 1, leaf)
        for name in Trajectory._fields
        for leaf in jax.tree.leaves(getattr(trajectory, name))
    ]


@pytest.fixture
def server():
    if importlib.util.find_spec('reverb') is None:
        pytest.skip('reverb not installed')
    import reverb

    from impala_jax.runtimes import reverb_tables

    server = reverb.Server(reverb_tables.tables(host_share(make_config())))
    yield server
    server.stop()


def reverb_queue(address, timeout_s, key=KEY, **replay):
    import reverb

    from impala_jax.runtimes import reverb_transport

    config = make_config(timeout_s, **replay)
    return reverb_transport.ReverbTrajectoryQueue(
        reverb.Client(address), key, host_share(config), make_agent(NETWORK, SPEC)
    )


@pytest.fixture(params=['local', pytest.param('reverb', marks=pytest.mark.launchpad)])
def make_queue(request):
    """Queues that are ends of one and the same, each with its time-out; closed at the end."""
    made = []
    if request.param == 'local':
        shared = {}

        def make(timeout_s=30.0):
            queue = shared.setdefault(timeout_s, LocalTrajectoryQueue(BATCH, CAPACITY, timeout_s))
            made.append(queue)
            return queue
    else:
        address = f'localhost:{request.getfixturevalue("server").port}'

        def make(timeout_s=30.0):
            made.append(reverb_queue(address, timeout_s))
            return made[-1]

    yield make
    for queue in made:
        queue.close()


def in_thread(target):
    """Runs `target`; returns the thread and the list that gets its exception."""
    errors = []

    def run():
        try:
            target()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


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


def _put_from_process(address):
    reverb_queue(address, 60.0).put(make_trajectories(0, BATCH))


@pytest.mark.launchpad
def test_reverb_crosses_processes(server):
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


PARAMS = {'a': np.zeros([2, 3], np.float32), 'b': {'c': np.zeros([4], np.float32)}}


@pytest.fixture(params=['local', pytest.param('reverb', marks=pytest.mark.launchpad)])
def make_store(request):
    if request.param == 'local':
        yield LocalParameterStore
        return
    import reverb

    from impala_jax.runtimes import reverb_transport

    address = f'localhost:{request.getfixturevalue("server").port}'
    yield lambda timeout_s: reverb_transport.ReverbParameterStore(reverb.Client(address), KEY, PARAMS, timeout_s)


def test_store_serves_the_newest(make_store):
    store = make_store(20.0)
    for version in range(5):
        store.publish(version, {'a': PARAMS['a'] + version, 'b': {'c': PARAMS['b']['c'] - version}})
        got, params = store.latest()
        assert got == version
        np.testing.assert_array_equal(params['a'], PARAMS['a'] + version)
        np.testing.assert_array_equal(params['b']['c'], PARAMS['b']['c'] - version)
    store.close()
    with pytest.raises(Closed):
        store.latest()


def test_store_without_parameters_times_out_and_closes(make_store):
    with pytest.raises(TimeoutError, match='for the learner to publish'):
        make_store(0.5).latest()
    store = make_store(30.0)
    thread, errors = in_thread(store.latest)
    store.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(errors[0], Closed)


@pytest.mark.launchpad
def test_a_server_that_stops_keeps_no_reader_of_parameters(server):
    """Reverb's client waits without end if the server stops in the middle of a sample; Launchpad killed such a run."""
    import reverb

    from impala_jax.runtimes.reverb_transport import ReverbParameterStore

    def make():
        return ReverbParameterStore(reverb.Client(f'localhost:{server.port}'), KEY, PARAMS, 30.0)

    make().publish(0, PARAMS)
    stores = [make() for _ in range(6)]
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
