"""Numbered trajectories, and the ends of a queue that carries them."""

import contextlib
import subprocess
import sys
import threading

import jax
import numpy as np

from impala_jax.build import make_agent
from impala_jax.config import Config, LearnerConfig, NetworkConfig, ReplayConfig
from impala_jax.runtimes.host_share import host_share
from impala_jax.types import ArraySpec, EnvironmentSpec, StepInfo, TimeStep, Trajectory
from tests.helpers import programs

SPEC = EnvironmentSpec(
    {'image': ArraySpec((4, 4, 1), np.dtype(np.uint8)), 'x': ArraySpec((3,), np.dtype(np.float32))}, 3
)
NETWORK = NetworkConfig(torso='mlp', core='lstm', lstm_size=5)
T, BATCH, CAPACITY = 4, 6, 12
FRESH = BATCH // 2  # Trajectories per batch that are not replayed, where half are.
KEY = bytes(range(32))
PARAMS = {'a': np.zeros([2, 3], np.float32), 'b': {'c': np.zeros([4], np.float32)}}


def make_config(timeout_s=30.0, **replay):
    """Configuration of a queue for `make_trajectories`."""
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
    """Leaves of trajectory `i` of a batch, without its axis."""

    def column(axis, x):
        return x[i] if axis == 0 else x[:, i]

    return [
        column(0 if name in ('initial_state', 'version', 'task') else 1, leaf)
        for name in Trajectory._fields
        for leaf in jax.tree.leaves(getattr(trajectory, name))
    ]


@contextlib.contextmanager
def reverb_server(**replay):
    """A Reverb server with the tables of `make_config(**replay)`, as a run makes it."""
    import reverb

    from impala_jax.runtimes import reverb_tables

    server = reverb.Server(
        reverb_tables.tables(host_share(make_config(**replay))), checkpointer=reverb_tables.NoCheckpointer()
    )
    try:
        yield server
    finally:
        server.stop()


def reverb_queue(address, timeout_s, key=KEY, **replay):
    """An end of the queue of the `reverb_server(**replay)` at the address."""
    import reverb

    from impala_jax.runtimes import reverb_transport

    config = make_config(timeout_s, **replay)
    return reverb_transport.ReverbTrajectoryQueue(
        reverb.Client(address), key, host_share(config), make_agent(NETWORK, SPEC)
    )


def reverb_store(server, timeout_s=30.0, key=KEY):
    """A store of `PARAMS` at the server."""
    import reverb

    from impala_jax.runtimes.reverb_transport import ReverbParameterStore

    return ReverbParameterStore(reverb.Client(f'localhost:{server.port}'), key, PARAMS, timeout_s)


def in_thread(target):
    """Thread that runs `target`, and the list that gets its exception."""
    errors = []

    def run():
        try:
            target()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def intrude(address, source, target):
    """Number of items that the intruder has written."""
    command = [sys.executable, '-m', 'tests.helpers.intruder', address, source, target]
    result = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, timeout=120, check=True)
    refused, number = result.stdout.splitlines()
    assert refused == 'refused: no Checkpointer configured for the replay service.'
    return int(number)


def assert_known(trajectories, i):
    """Asserts that trajectory `i` is the one its version says, bit for bit; chunks of `FRESH` were put."""
    version = int(trajectories.version[i])
    chunk = make_trajectories(version - version % FRESH, FRESH)
    for a, b in zip(leaves_of(trajectories, i), leaves_of(chunk, version % FRESH), strict=True):
        np.testing.assert_array_equal(a, b)
