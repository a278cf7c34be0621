"""Runtime `launchpad`: a Reverb server, actors, a learner and an evaluator as nodes in threads or processes."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import absl.logging
import jax
import launchpad as lp
import reverb
from absl import flags
from launchpad.address import Address, get_port_from_address
from launchpad.nodes.reverb.node import ReverbHandle

from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.config import Config, ConfigError
from impala_jax.inference import InferenceServer
from impala_jax.kernels import allocator, compilation_cache
from impala_jax.runtimes import nodes, reverb_actors, reverb_tables, seals
from impala_jax.runtimes.control import Control, Link
from impala_jax.runtimes.gate import Gate, learners_secret
from impala_jax.runtimes.host_share import host, host_share
from impala_jax.runtimes.launchpad_launch import launch, program_folder, saving_s
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.private_socket import listen_privately
from impala_jax.runtimes.reverb_tables import PARAMETERS, NoCheckpointer
from impala_jax.runtimes.reverb_transport import ReverbParameterStore, ReverbTrajectoryQueue
from impala_jax.system import stopping
from impala_jax.system.machine import START, connect_without_proxy, kill_marked
from impala_jax.system.native_messages import native_messages_to
from impala_jax.system.quiet import quiet_libraries
from impala_jax.trajectory_queue import from_arrays, to_arrays
from impala_jax.types import Closed, EnvironmentSpec

_NATIVE_LOG = 'native.log'
# Files in the program's folder: the address of the Reverb server, and its Unix socket.
_REVERB_ADDRESS = 'reverb_address'
_REVERB_SOCKET = 'reverb'
_LONGEST_SOCKET = 107  # Longest path of a Unix socket, in bytes.

Connect = Callable[[threading.Event], reverb.Client]
"""Function that connects a node to the Reverb server; raises `Closed` when the event is set."""


class _Setup(NamedTuple):
    """Arguments common to all nodes; pickled when the nodes are processes."""

    config: Config
    spec: EnvironmentSpec
    workdir: Path
    control: Control | str  # Control of the program; the address of its server if nodes are processes.
    folder: Path  # Folder for the program's temporary files, accessible to this user only.
    suffix: str  # Suffix of the names of Reverb's tables; see `reverb_tables.tables`.
    key: bytes  # Key of the seals of all items in Reverb.
    secret: bytes | None  # Secret of actors on other machines.
    inference: InferenceServer | None  # With launch type `local_mt` only.


class _Connection(NamedTuple):
    """The queue, store and agent of a node, and the control of its program."""

    client: reverb.Client
    queue: ReverbTrajectoryQueue
    store: ReverbParameterStore
    agent: Agent
    control: Control


def build_program(setup: _Setup) -> lp.Program:
    """Builds the topology of figure 1 of the paper, with Reverb between actors and learner."""
    share = host_share(setup.config)
    program = lp.Program('impala')
    with program.group('reverb'):
        server = program.add_node(_ReverbNode(setup))
    with program.group('learner'):
        program.add_node(lp.PyNode(_learner, setup, server))
    with program.group('actor'):
        for index in range(share.num_actors):
            program.add_node(lp.PyNode(_actor, setup, server, index))
    if setup.inference is not None:
        with program.group('inference'):
            program.add_node(lp.PyNode(_inference, setup, server))
    if share.evaluates:
        with program.group('evaluator'):
            program.add_node(lp.PyNode(_evaluator, setup, server))
    return program


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int | None:
    """Trains until the budget is spent or the program is stopped.

    Returns:
      The total number of updates; None if the program was stopped and the learner did not save in time.

    Raises:
      ConfigError: If the port `config.serve_actors` is in use.
      NodeFailure: If a node raised an exception, or its process died.
    """
    if config.serve_actors is not None:
        _require_free(config.serve_actors)
    connect_without_proxy()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    control = Control()
    with program_folder(config, control) as (address, folder):
        suffix = f'-{secrets.token_hex(8)}'
        inference = nodes.make_inference(config, agent)
        secret = None if config.serve_actors is None else learners_secret(workdir)
        key = seals.new_key() if secret is None else reverb_actors.items_key(secret, suffix)
        setup = _Setup(config, agent.spec, workdir, address, folder, suffix, key, secret, inference)
        with native_messages_to(workdir / _NATIVE_LOG):
            launch(build_program(setup), config, folder, control, stop)
    if control.failure is not None:
        raise NodeFailure(control.failure) from control.error
    # On several hosts, another host may have stopped the run.
    if not stop.is_set() and host() == (0, 1) and (control.num_updates or 0) < config.total_updates:
        raise NodeFailure('error: a node of the program ended before the learner; its last output, if any, is above')
    return control.num_updates


class _ReverbHandle(ReverbHandle):
    """Handle whose `dereference` returns a `Connect`, because the address is known only when the server has started."""

    def __init__(self, address: Address, setup: _Setup):
        super().__init__(address)
        self._setup = setup

    def dereference(self) -> Connect:
        return functools.partial(_connect, self._setup)


def _connect(setup: _Setup, stop: threading.Event) -> reverb.Client:
    """Waits for the server to start; raises Closed if the program stops before."""
    address = setup.folder / _REVERB_ADDRESS
    deadline = time.monotonic() + setup.config.timeout_s
    while not address.exists():
        if stop.wait(0.02):
            raise Closed
        if time.monotonic() > deadline:
            raise TimeoutError(f'waited {setup.config.timeout_s:g} s for the Reverb server to start')
    return reverb.Client(address.read_text())


class _ReverbNode(lp.ReverbNode):
    """A Reverb server that other users cannot reach, and that stops with the program."""

    def __init__(self, setup: _Setup):
        super().__init__(list)  # `run` builds the tables.
        self._setup = setup

    def create_handle(self) -> ReverbHandle:
        return self._track_handle(_ReverbHandle(self.reverb_address, self._setup))

    def run(self) -> None:
        _run_node(self._setup, 'the Reverb server', self._serve)

    def _serve(self, control: Control) -> None:
        setup = self._setup
        with contextlib.ExitStack() as cleanup:
            port = get_port_from_address(self.reverb_address.resolve())
            tables = reverb_tables.tables(host_share(setup.config), setup.suffix, setup.config.serve_actors is not None)
            server = reverb.Server(tables, port, NoCheckpointer())
            address = _close_port(port, setup.folder / _REVERB_SOCKET)
            if setup.config.serve_actors is not None:
                assert setup.secret is not None
                cleanup.callback(Gate(setup.config.serve_actors, setup.secret, address).close)
                print(
                    f'port {setup.config.serve_actors} is open on all addresses of this machine; connections without '
                    'the secret of the actors are refused (docs/reliability.md)',
                    flush=True,
                )
            written = setup.folder / f'{_REVERB_ADDRESS}.new'
            written.write_text(address)
            written.rename(setup.folder / _REVERB_ADDRESS)
            control.stop.wait()
            if setup.config.num_replayed:
                # The learner reads replay from the server to save it.
                control.learner_ended.wait(saving_s(setup.config))
            server.stop()
            del server  # Its finaliser needs modules that do not exist any more when the interpreter exits.


def _close_port(port: int, path: Path) -> str:
    """Moves a server to a socket that other users cannot reach; returns its address."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        # A shorter name of the same folder, valid while this process keeps it open.
        path = Path(f'/proc/{os.getpid()}/fd/{os.open(path.parent, os.O_RDONLY)}') / path.name
    try:
        listen_privately(port, path)
    except OSError as error:
        print(
            f"Reverb's port {port} cannot be closed here ({error}), and is open on all addresses of this machine. "
            'Anyone who can reach it can read parameters, remove trajectories, and end the run with a malformed '
            'message; nothing that they write is used. Block the port in the firewall',
            flush=True,
        )
        return f'localhost:{port}'
    return f'unix:{path}'


def _require_free(port: int) -> None:
    """Checks that a port is free before the program starts.

    Raises:
      ConfigError: If the port is in use.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Connections of the last run may still be closing.
        try:
            probe.bind(('', port))
        except OSError as error:
            raise ConfigError(f'serve_actors {port}: {error.strerror}; choose another port') from error


def _learner(setup: _Setup, connect: Connect) -> None:
    def learn(connection: _Connection) -> None:
        num_updates = None
        try:
            num_updates = _learn(setup, connection)
        finally:
            connection.control.end_learner(num_updates)

    _run_connected(setup, connect, 'the learner', learn)


def _learn(setup: _Setup, connection: _Connection) -> int:
    """Trains; returns the total number of updates."""
    config = setup.config
    publish = nodes.publisher(connection.store, setup.inference)
    training = nodes.make_training(config, connection.agent, setup.workdir, publish)
    loop = training.loop
    replay = nodes.restored_replay(config, setup.workdir, training)
    loop.begin()
    connection.control.begin_to_learn()
    if config.num_replayed:
        training.metrics.log_with(lambda: {'replay_size': connection.queue.replay_size})
    queue = connection.queue
    training.metrics.log_with(lambda: {'refused_items': queue.num_refused} if queue.num_refused else {})
    if setup.inference is not None:
        training.metrics.log_with(setup.inference.metrics)
    fetch = queue.get_batch
    cleanup = contextlib.ExitStack()
    try:
        trajectories = from_arrays(replay, connection.agent.trajectory_structure())
        if trajectories is not None:
            with contextlib.suppress(Closed):  # `loop.run` notices the stop as well.
                queue.put_replay(trajectories)
        if config.serve_actors is not None:
            assert setup.secret is not None
            announced = reverb_actors.announce(connection.client, setup.secret, config, setup.spec, setup.suffix)
            cleanup.callback(announced.close)
            # Actors on other machines may join late; the program's own actors may not.
            fetch = fetch if config.actor.num_actors else reverb_actors.waiting_for_actors(fetch)
        loop.run(fetch, connection.control.stop)
    finally:
        cleanup.close()
        queue.close()
        connection.control.begin_to_save()
        try:
            loop.finish()
        finally:
            loop.close()
    if config.num_replayed:
        nodes.save_replay(config, setup.workdir, loop.num_updates, to_arrays(queue.take_replay()))
    return loop.num_updates


def _actor(setup: _Setup, connect: Connect, index: int) -> None:
    def act(connection: _Connection) -> None:
        share = host_share(setup.config)
        stop = connection.control.stop
        nodes.act(share, connection.agent, index, connection.queue, connection.store, stop, setup.inference)

    _run_connected(setup, connect, f'actor {index}', act)


def _inference(setup: _Setup, connect: Connect) -> None:
    inference = setup.inference
    assert inference is not None
    _run_connected(setup, connect, 'inference', lambda _: inference.run())


def _evaluator(setup: _Setup, connect: Connect) -> None:
    def evaluate(connection: _Connection) -> None:
        stop = connection.control.stop
        evaluator = nodes.make_evaluator(setup.config, connection.agent, stop)
        nodes.evaluate_periodically(setup.config, evaluator, connection.store.latest, setup.workdir, stop)

    _run_connected(setup, connect, 'the evaluator', evaluate)


def _run_connected(setup: _Setup, connect: Connect, name: str, body: Callable[[_Connection], None]) -> None:
    """Runs a node as `_run_node` does, with a connection to the server that is closed when the program stops."""

    def connected(control: Control) -> None:
        config = setup.config
        agent = make_agent(config.network, setup.spec, config.popart.enabled)
        client = connect(control.stop)
        queue = ReverbTrajectoryQueue(client, setup.key, host_share(config), agent, setup.suffix)
        params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
        store = ReverbParameterStore(client, setup.key, params, config.timeout_s, PARAMETERS + setup.suffix)
        ended = threading.Event()

        def close_when_stopped():
            while not (control.stop.wait(0.1) or ended.is_set()):
                pass
            queue.close()
            store.close()
            if setup.inference is not None:
                setup.inference.close()

        watcher = threading.Thread(target=close_when_stopped, name='stop watcher', daemon=True)
        watcher.start()
        try:
            body(_Connection(client, queue, store, agent, control))
        finally:
            ended.set()
            watcher.join(timeout=5.0)

    _run_node(setup, name, connected)


def _run_node(setup: _Setup, name: str, body: Callable[[Control], None]) -> None:
    """Runs the body of a node, in a thread or in its own process; a failure stops the program.

    `Closed` is not a failure: it means that the program has stopped.
    """
    if isinstance(setup.control, Control):
        try:
            body(setup.control)
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001
            setup.control.fail(error)
        return

    def end():
        """Ends this process at once, because without the launching process another run may hold the workdir's lock."""
        kill_marked(f'{START}={setup.folder}')
        os._exit(1)

    for number in stopping.SIGNALS:
        signal.signal(number, lambda *_: None)  # The launching process handles signals and stops its nodes.
    link = Link(setup.control, name, end)
    try:
        quiet_libraries()
        absl.logging.set_verbosity(absl.logging.ERROR)  # Launchpad has changed it.
        allocator.configure_allocator()
        compilation_cache.enable_cache()
        with native_messages_to(setup.workdir / _NATIVE_LOG):
            body(link)
    except Closed:
        pass
    except BaseException as error:  # noqa: BLE001
        link.fail(error)
    finally:
        link.close()
    stopping.end_process(0)  # TensorFlow's own shutdown takes seconds.
