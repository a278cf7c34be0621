"""The nodes as a Launchpad program: a Reverb server, actors, a learner, an evaluator; threads or processes."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import absl.logging
import jax
import launchpad as lp
import reverb
from absl import flags
from launchpad.address import AbstractAddressBuilder
from launchpad.launch import worker_manager
from launchpad.nodes.python.local_multi_processing import PythonProcess
from launchpad.nodes.reverb.node import ReverbHandle

from impala_jax import allocator, compilation_cache
from impala_jax.agent import Agent
from impala_jax.checkpoint import CheckpointError
from impala_jax.config import Config, ConfigError
from impala_jax.environments import EnvironmentFailure
from impala_jax.inference import InferenceServer
from impala_jax.learner import LearnerLoop
from impala_jax.machine import connect_without_proxy, start_of
from impala_jax.metrics import quiet_libraries
from impala_jax.parameter_store import ParameterStores
from impala_jax.runtimes import nodes, reverb_actors
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.reverb_transport import PARAMETERS, ReverbParameterStore, ReverbTrajectoryQueue, tables
from impala_jax.trajectory_queue import from_arrays, to_arrays
from impala_jax.types import Closed, EnvironmentSpec

# From the request to stop to SIGKILL, s: Launchpad's default of 10 could cut a checkpoint short.
_TERMINATION_NOTICE_S = 30
# Files by which nodes tell the launching process and each other of their end.
_FAILURE = 'failure.txt'
_PROGRESS = 'num_updates'
_LEARNER_ENDED = 'learner_ended'
_NATIVE_LOG = 'native.log'
# A traceback may hold what the locale cannot encode, as the name of a folder.
_TEXT: Any = {'encoding': 'utf-8', 'errors': 'backslashreplace'}


class _Setup(NamedTuple):
    """What every node gets; crosses to its process by pickle, when the program starts."""

    config: Config
    spec: EnvironmentSpec
    workdir: Path
    stop_program: Callable[[], None]
    launcher: tuple[int, str | None]  # the launching process, and when it started
    notes: Path  # a folder for the nodes' last words, outside the workdir
    suffix: str  # of the names of Reverb's tables, see `reverb_transport.tables`
    inference: InferenceServer | None  # of `local_mt`


class _Connection(NamedTuple):
    """A node's queue, store and agent, and the event that tells it to end."""

    queue: ReverbTrajectoryQueue
    store: ReverbParameterStore
    agent: Agent
    stop: threading.Event


def build_program(setup: _Setup) -> lp.Program:
    """The topology: figure 1 of the paper, with Reverb between actors and learner."""
    config = setup.config
    program = lp.Program('impala')
    with program.group('reverb'):
        server = program.add_node(_ReverbNode(setup))
    with program.group('learner'):
        program.add_node(lp.PyNode(_learner, setup, server))
    with program.group('actor'):
        for index in range(config.actor.num_actors):
            program.add_node(lp.PyNode(_actor, setup, server, index))
    if setup.inference is not None:
        with program.group('inference'):
            program.add_node(lp.PyNode(_inference, setup, server))
    if nodes.share(config).evaluator.episodes:
        with program.group('evaluator'):
            program.add_node(lp.PyNode(_evaluator, setup, server))
    return program


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or the program is stopped; returns the updates done in all.

    Raises:
      ConfigError: the port of `config.serve_actors` is not free.
      NodeFailure: a node raised, or its process died.
    """
    if config.serve_actors is not None:
        _require_free(config.serve_actors)
    connect_without_proxy()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    flags.FLAGS.lp_termination_notice_secs = _termination_notice_s(config)
    with tempfile.TemporaryDirectory(prefix='impala_jax-') as notes:
        return _run(config, agent, workdir, Path(notes), stop)


def _run(config: Config, agent: Agent, workdir: Path, notes: Path, stop: threading.Event) -> int:
    failure, progress = notes / _FAILURE, notes / _PROGRESS
    suffix = f'-{secrets.token_hex(8)}'
    stop_program = lp.make_program_stopper(config.launch_type)
    inference = nodes.make_inference(nodes.share(config), agent)
    launcher = (os.getpid(), start_of(os.getpid()))
    setup = _Setup(config, agent.spec, workdir, stop_program, launcher, notes, suffix, inference)
    program = build_program(setup)
    on_cpu = PythonProcess(env={'JAX_PLATFORMS': 'cpu'})
    in_processes = config.launch_type == 'local_mp'
    with _native_messages_to(workdir / _NATIVE_LOG):
        manager = lp.launch(
            program,
            launch_type=config.launch_type,
            terminal='current_terminal',
            local_resources={name: on_cpu for name in program.groups if name != 'learner'} if in_processes else None,
        )
        labels = [
            f'{name}/{i}' if in_processes else name for name, group in program.groups.items() for i in range(len(group))
        ]
        try:
            # The learner ends first; any other node that does has died.
            manager.wait(labels, return_on_first_completed=True)
        finally:
            # It counts the seconds it waits on standard output, and kills this process after the last one.
            with contextlib.redirect_stdout(io.StringIO()), _stuck_threads_are_shown(config):
                manager.stop_and_wait()
    if failure.exists():
        raise NodeFailure(failure.read_text(**_TEXT))
    num_updates = int(progress.read_text()) if progress.exists() else 0
    # Launchpad hears the signals that set `stop` too, and tells its nodes. Of several hosts another may have stopped.
    if num_updates < config.total_updates and not stop.is_set() and nodes.host() == (0, 1):
        raise NodeFailure('a process of the program died without a Python error; its last words, if any, are above')
    return num_updates


def _termination_notice_s(config: Config) -> int:
    """Time that nodes have to end in; 10,000 trajectories of Atari were saved in 20 s on two cores."""
    return _TERMINATION_NOTICE_S + (config.replay.capacity // 100 if config.num_replayed else 0)


class _ReverbHandle(ReverbHandle):
    """Connects without a log message."""

    def dereference(self) -> reverb.Client:
        return reverb.Client(self._address.resolve())


class _ReverbNode(lp.ReverbNode):
    """Stops its server when the program stops, instead of whenever Python collects it."""

    def __init__(self, setup: _Setup):
        super().__init__(lambda: tables(nodes.share(setup.config), setup.suffix))
        self._setup = setup

    def bind_addresses(self, **kwargs: Any) -> None:
        super().bind_addresses(**kwargs)
        if self._setup.config.serve_actors is not None:
            self.reverb_address.bind(_LocalPort(self._setup.config.serve_actors))

    def create_handle(self) -> ReverbHandle:
        return self._track_handle(_ReverbHandle(self.reverb_address))

    def run(self) -> None:
        with _own_process(self._setup):
            super().run()
            if self._setup.config.num_replayed:
                self._outlive_learner()
            self._server.stop()
            del self._server  # Its finaliser needs modules that are gone when the interpreter ends.

    def _outlive_learner(self) -> None:
        """Waits while the learner reads replay from the server, to save it."""
        deadline = time.monotonic() + _termination_notice_s(self._setup.config) - 5
        while not (self._setup.notes / _LEARNER_ENDED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)


class _LocalPort(AbstractAddressBuilder):
    """A port of this machine that was chosen, instead of one that Launchpad finds."""

    def __init__(self, port: int):
        self._address = f'localhost:{port}'

    def build(self) -> str:
        return self._address


def _require_free(port: int) -> None:
    """Reverb would share the port with whoever listens there, and each would get some of the actors.

    Raises:
      ConfigError: it is not free.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Connections of the last run may linger.
        try:
            probe.bind(('', port))
        except OSError as error:
            raise ConfigError(f'serve_actors {port}: {error.strerror}; choose another port') from error


def _learner(setup: _Setup, client: reverb.Client) -> None:
    config = setup.config
    with _ends_with_a_note(setup.notes / _LEARNER_ENDED), _node(setup, client) as connection:
        store = connection.store if setup.inference is None else ParameterStores(connection.store, setup.inference)
        loop = LearnerLoop(config, connection.agent, setup.workdir, store)
        replay = nodes.restored_replay(config, setup.workdir, loop)
        loop.begin()
        if config.num_replayed:
            loop.log_with(lambda: {'replay_size': connection.queue.replay_size})
        if setup.inference is not None:
            loop.log_with(setup.inference.metrics)
        fetch = connection.queue.get_batch
        try:
            trajectories = from_arrays(replay, connection.agent.trajectory_structure())
            if trajectories is not None:
                with contextlib.suppress(Closed):  # `loop.run` finds the end, too.
                    connection.queue.put_replay(trajectories)
            if config.serve_actors is not None:
                reverb_actors.announce(client, config, setup.spec, setup.suffix)
                # Those of other machines come and go; the program's own do not.
                fetch = fetch if config.actor.num_actors else reverb_actors.waiting_for_actors(fetch)
            loop.run(fetch, connection.stop)
        finally:
            connection.queue.close()
            try:
                loop.finish()
                (setup.notes / _PROGRESS).write_text(str(loop.num_updates))
            finally:
                loop.close()
        if config.num_replayed:
            nodes.save_replay(config, setup.workdir, loop, to_arrays(connection.queue.take_replay()))


@contextlib.contextmanager
def _ends_with_a_note(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.touch()


def _actor(setup: _Setup, client: reverb.Client, index: int) -> None:
    with _node(setup, client) as connection:
        share = nodes.share(setup.config)
        nodes.act(share, connection.agent, index, connection.queue, connection.store, setup.inference)


def _inference(setup: _Setup, client: reverb.Client) -> None:
    with _node(setup, client):
        assert setup.inference is not None
        setup.inference.run()


def _evaluator(setup: _Setup, client: reverb.Client) -> None:
    with _node(setup, client) as connection:
        nodes.evaluate_beside(setup.config, connection.agent, connection.store, setup.workdir, connection.stop)


@contextlib.contextmanager
def _node(setup: _Setup, client: reverb.Client) -> Iterator[_Connection]:
    """A node's life: connected; closed when the program stops; its failure is written down and stops the program."""
    config, stop = setup.config, lp.stop_event()
    ended = threading.Event()
    with _own_process(setup), _failure_stops_program(setup):
        agent = Agent(config.network, setup.spec, config.popart.enabled)
        queue = ReverbTrajectoryQueue(client, nodes.share(config), agent, setup.suffix)
        params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
        store = ReverbParameterStore(client, params, config.timeout_s, PARAMETERS + setup.suffix)

        def close_when_stopped():
            while not (stop.wait(0.1) or ended.is_set()):
                pass
            queue.close()
            store.close()
            if setup.inference is not None:
                setup.inference.close()

        watcher = threading.Thread(target=close_when_stopped, name='stop watcher', daemon=True)
        watcher.start()
        try:
            yield _Connection(queue, store, agent, stop)
        finally:
            ended.set()
            watcher.join(timeout=5.0)


@contextlib.contextmanager
def _failure_stops_program(setup: _Setup) -> Iterator[None]:
    """Writes an exception down, for `run` to raise in the launching process, and stops the program."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001
        says_all = isinstance(error, (ConfigError, CheckpointError, EnvironmentFailure, TimeoutError))
        with contextlib.suppress(FileExistsError), open(setup.notes / _FAILURE, 'x', **_TEXT) as file:
            file.write(nodes.described(error) if says_all else traceback.format_exc().strip())
        setup.stop_program()


@contextlib.contextmanager
def _own_process(setup: _Setup) -> Iterator[None]:
    """Sets up a node's process, where it has one of its own."""
    if setup.config.launch_type != 'local_mp':
        yield
        return
    threading.Thread(target=_end_with, args=setup.launcher, name='launcher watcher', daemon=True).start()
    quiet_libraries()
    allocator.keep_memory()
    compilation_cache.keep_programs()
    # The launching process does the killing, after a time that lets a checkpoint be finished; this one's own manager
    # would not wait for as long.
    worker_manager.get_worker_manager()._termination_notice_secs = -1
    with _native_messages_to(setup.workdir / _NATIVE_LOG):
        yield


def _end_with(launcher: int, start: str | None) -> None:
    """Ends this process when the launching one was killed: at once, for another may have the workdir's lock by now."""
    while start_of(launcher) == start:
        time.sleep(0.2)
    os._exit(1)


@contextlib.contextmanager
def _stuck_threads_are_shown(config: Config) -> Iterator[None]:
    """Writes where every thread is to standard error before Launchpad kills a process whose nodes do not end."""
    faulthandler.dump_traceback_later(_termination_notice_s(config) - 5, file=sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _native_messages_to(path: Path) -> Iterator[None]:
    """Sends what C++ libraries write to standard error to a file; Python's own messages still reach the person.

    Reverb reports every server and sampler there, and has no setting that stops it.
    """
    previous = sys.stderr
    previous.flush()
    terminal = os.dup(2)
    with (
        open(path, 'ab') as file,
        open(os.dup(terminal), 'w', buffering=1, errors='backslashreplace') as stderr,
    ):
        os.dup2(file.fileno(), 2)
        _write_to(stderr)
        try:
            yield
        finally:
            _write_to(previous)
            os.dup2(terminal, 2)
            os.close(terminal)


def _write_to(stderr: TextIO) -> None:
    """Makes `stderr` the standard error, also of log handlers, which keep the one that they began with."""
    handlers = [*logging.getLogger().handlers, absl.logging.get_absl_handler().python_handler]
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(stderr)
    sys.stderr = stderr
