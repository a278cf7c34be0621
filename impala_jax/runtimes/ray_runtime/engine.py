"""The engine of Ray: started for one run on this machine, or a cluster that the run joins.

Nothing of a local engine outlives its run (`system.keeper`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray  # pyright: ignore[reportMissingImports]
import ray.exceptions  # pyright: ignore[reportMissingImports]
from ray._raylet import Config as RayConfig  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

from impala_jax.config import ConfigError
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.ray_runtime.remote import code_here, different_code
from impala_jax.system import stopping
from impala_jax.system.keeper import KeptProgram
from impala_jax.system.machine import connect_without_proxy, own_folder
from impala_jax.types import Closed

_PREFIX = 'impala_ray_'
# Ray ends the processes that are connected to an engine at once if the engine has ended.
_LAST_LINE = (
    'error: the engine of Ray has ended, and this run with it; the same command resumes from the last checkpoint'
)
_SHARED_MEMORY = Path('/dev/shm')
_SMALLEST_STORE = 100 * 2**20  # Ray refuses less than 75 MiB.
_CONNECT_S = 10.0  # Longest wait for the first and the last answer of a cluster.
_ASK_INTERVAL_S = 2.0  # Time between questions to the head of a cluster.
_HEAD_S = 20.0  # Longest silence of a cluster's head; after 60 s, Ray ends this process, and updates are lost.
_JOIN_S = 60.0  # Longest wait for an engine to accept this process; a wrong token takes 20 s.
_TOKEN_VARIABLES = ('RAY_AUTH_TOKEN', 'RAY_AUTH_TOKEN_PATH')
# The monitor scales clusters, which an engine on one machine does not need, and answers anybody without the token.
_START = '--head --port=0 --no-monitor --include-dashboard=false --disable-usage-stats --block'.split()

_logger = logging.getLogger(__name__)


class LocalEngine:
    """An engine on this machine, which starts in the background.

    Args:
      num_nodes: Number of nodes of the program that run in the engine.
      store_bytes: Size of the object store, in bytes.
      timeout_s: Longest wait for the engine to start, in seconds.
    """

    def __init__(self, num_nodes: int, store_bytes: int, timeout_s: float):
        self._num_nodes = num_nodes
        self._timeout_s = timeout_s
        _require_token()
        store_bytes = max(store_bytes, _SMALLEST_STORE)
        if _SHARED_MEMORY.exists() and (free := shutil.disk_usage(_SHARED_MEMORY).free) < store_bytes:
            print(
                f'{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, and the object store of Ray takes '
                f'{store_bytes / 1e6:.0f} MB: it will use files, which are slower (in Docker: --shm-size=2g)',
                flush=True,
            )
        self._program = KeptProgram(_PREFIX, _short_folder(), _LAST_LINE)
        temporary = self._program.folder / 'r'  # Ray makes this one writable for everybody.
        self._address = temporary / 'ray_current_cluster'
        resources = [f'--num-cpus={num_nodes}', '--num-gpus=0', f'--object-store-memory={store_bytes}']
        command = [sys.executable, '-m', 'ray.scripts.scripts', 'start', *_START, f'--temp-dir={temporary}', *resources]
        # Ray kills the children of its workers at once, also those that remove their parent's temporary files.
        (files := self._program.folder / 't').mkdir()
        environment = {'JAX_PLATFORMS': 'cpu', 'RAY_USAGE_STATS_ENABLED': '0', 'TMPDIR': str(files)}
        self._program.start(command, environment)

    def connect(self, stop: threading.Event) -> None:
        """Waits until the engine has started, and connects this process to it.

        Raises:
          Closed: If `stop` is set.
          NodeFailure: If the engine does not start.
          TimeoutError: If it does not start in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while not (address := self._started()):
            self.check()
            if stop.wait(0.05):
                raise Closed
            if time.monotonic() > deadline:
                raise TimeoutError(f'waited {self._timeout_s:g} s for the engine of Ray to start')
        _init(address)

    def _started(self) -> str:
        """Returns the address of the engine; empty while it starts. Ray writes the file last, and not at once."""
        text = self._address.read_text() if self._address.exists() else ''
        return text.strip() if re.fullmatch(r'\S+:\d+\n?', text) else ''

    def check(self) -> int:
        """Returns the number of CPUs; raises NodeFailure if the engine has ended."""
        if self._program.has_ended:
            lines = [line for line in self._program.output.read_text(errors='replace').splitlines() if line.strip()]
            raise NodeFailure('\n'.join([*lines[-5:], _LAST_LINE]))
        return self._num_nodes

    def close(self) -> None:
        """Disconnects this process, and ends the engine and everything that it started."""
        try:
            _disconnect()
        finally:
            self._program.close()


class Cluster:
    """A cluster that runs already, with a node on this machine, which this process joins at once.

    Args:
      address: Value of `Config.ray_address`.
      version: Version of the code in this process (`code_version`).
      timeout_s: Longest wait for the answers of the cluster's machines, in seconds.

    Raises:
      ConfigError: If the cluster refuses this process, has no node on this machine, or has machines with other code.
    """

    def __init__(self, address: str, version: str, timeout_s: float):
        self._closed = threading.Event()
        _require_token(f'ray_address {address!r}')
        if address != 'auto':
            _require_reachable(address)
        try:
            with _native_messages_held_back() as messages:
                _init(address)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
            refused = b'InvalidAuthToken' in messages[0]
            reason = 'the token is not that of the cluster' if refused else ' '.join(str(error).split())
            raise ConfigError(
                f'ray_address {address!r} cannot be joined: {reason}; start a node of the cluster on this '
                f'machine (ray start --address={address}), with the same RAY_AUTH_TOKEN_PATH'
            ) from error
        try:
            self._node = ray.get_runtime_context().get_node_id()
            self._nodes, self._answered = ray.nodes(), time.monotonic()
            _require_same_code(version, timeout_s)
            threading.Thread(target=self._ask, name='questions to the cluster', daemon=True).start()
        except BaseException:
            self.close()
            raise

    def connect(self, stop: threading.Event) -> None:
        """Raises Closed if `stop` is set; this process is connected already."""
        if stop.is_set():
            raise Closed

    def check(self) -> int:
        """Returns the number of CPUs of the cluster, as last known.

        Raises:
          NodeFailure: If the head or the node of this machine has ended.
        """
        if time.monotonic() - self._answered > _HEAD_S:
            raise NodeFailure(
                f'error: the head of the Ray cluster has not answered for {_HEAD_S:g} s; the same command, with the '
                'address of a new cluster, resumes'
            )
        alive = [node for node in self._nodes if node['Alive']]
        if not any(node['NodeID'] == self._node for node in alive):
            raise NodeFailure("error: this machine's node of the Ray cluster has ended")
        return int(sum(node['Resources'].get('CPU', 0) for node in alive))

    def close(self) -> None:
        """Disconnects this process; Ray then ends the nodes of this run."""
        self._closed.set()
        _disconnect()

    def _ask(self) -> None:
        """Asks the head about the nodes; in a thread, because Ray waits for a head that has ended."""
        while not self._closed.wait(_ASK_INTERVAL_S):
            try:
                self._nodes, self._answered = ray.nodes(), time.monotonic()
            except Exception:  # `check` reports that there are no answers.
                if not self._closed.is_set():
                    _logger.exception('the head of the Ray cluster cannot be asked about its nodes')
                return


Engine = LocalEngine | Cluster


def _init(address: str) -> None:
    """Connects to an engine, in a thread, because Ray does so without a limit.

    Raises:
      TimeoutError: If the engine does not answer in time.
    """
    if ':' in address:
        connect_without_proxy(address.rpartition(':')[0])
    errors: list[Exception] = []

    def init() -> None:
        try:
            ray.init(address, logging_level=logging.CRITICAL, log_to_driver=True)
        except Exception as error:  # noqa: BLE001 - raised below.
            errors.append(error)

    thread = threading.Thread(target=init, name='connection to ray', daemon=True)
    thread.start()
    thread.join(_JOIN_S)
    _install_handlers_again()
    if thread.is_alive():
        raise TimeoutError(f'waited {_JOIN_S:g} s for the engine of Ray at {address!r} to accept this process')
    if errors:
        raise errors[0]


def _disconnect() -> None:
    """Disconnects this process from Ray; gives up with a warning if the engine does not answer."""
    if ray.is_initialized():
        thread = threading.Thread(target=ray.shutdown, name='disconnection from ray', daemon=True)
        thread.start()
        thread.join(_CONNECT_S)
        if thread.is_alive():
            _logger.warning('the engine of Ray did not answer for %g s when this process disconnected', _CONNECT_S)
        _install_handlers_again()


def _install_handlers_again() -> None:
    """Repeats Python's signal handlers: Ray's C++ part replaces that of SIGTERM, and removes it when it ends."""
    if threading.current_thread() is threading.main_thread():
        for number in stopping.SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _require_token(cause: str | None = None) -> None:
    """Turns on the authentication by a token, which Ray would otherwise keep in the home directory.

    Args:
      cause: The option that needs the token of a cluster; None to make one for this process if there is none.

    Raises:
      ConfigError: If the token is missing or cannot be read.
    """
    mode = os.environ.setdefault('RAY_AUTH_MODE', 'token')
    RayConfig.initialize('')  # Ray has read its environment when it was imported.
    if mode != 'token':
        if cause is None:
            raise ConfigError(
                f"RAY_AUTH_MODE {mode!r}: any user of this network could run programs as you; use 'token'"
            )
        return  # A cluster's own decision.
    if any(os.environ.get(name) for name in _TOKEN_VARIABLES):
        path = os.environ.get('RAY_AUTH_TOKEN_PATH')
        token = os.environ.get('RAY_AUTH_TOKEN')
        if not token:
            assert path is not None
            try:
                token = Path(path).read_text()
            except (OSError, ValueError) as error:
                raise ConfigError(f'RAY_AUTH_TOKEN_PATH {path!r} cannot be read: {error}') from error
        if not token.strip():
            source = 'RAY_AUTH_TOKEN' if os.environ.get('RAY_AUTH_TOKEN') else f'RAY_AUTH_TOKEN_PATH {path!r}'
            raise ConfigError(f'{source}: the token is empty; write one (openssl rand -hex 32)')
        return
    if cause is not None:
        with contextlib.suppress(RuntimeError, OSError):
            if (Path.home() / '.ray' / 'auth_token').is_file():
                return
        raise ConfigError(
            f"{cause}: no token to join the cluster with; set RAY_AUTH_TOKEN_PATH to a copy of the head node's token "
            'file (or RAY_AUTH_MODE=disabled if the cluster has none)'
        )
    path = Path(own_folder()) / 'ray_token'
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ['RAY_AUTH_TOKEN_PATH'] = str(path)


def _require_reachable(address: str) -> None:
    """Checks that something listens at the address of a cluster; raises ConfigError if not."""
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f'ray_address {address!r} cannot be reached: {error}; start it there (ray start --head)'
        ) from error


def _require_same_code(version: str, timeout_s: float) -> None:
    """Checks the code on all machines of the cluster that offer CPUs; raises ConfigError if one has another."""
    remote = ray.remote(code_here)
    machines = [node for node in ray.nodes() if node['Alive'] and node['Resources'].get('CPU')]
    answers = [
        remote.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node['NodeID'], soft=False)
        ).remote()
        for node in machines
    ]
    deadline = time.monotonic() + timeout_s
    for node, answer in zip(machines, answers, strict=True):
        host = node['NodeManagerHostname']
        try:
            found = ray.get(answer, timeout=max(deadline - time.monotonic(), 0.1))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f'machine {host} of the Ray cluster cannot run impala_jax: {reason}') from error
        if found != version:
            raise ConfigError(different_code(host, found, version))


def _short_folder() -> Path:
    """Folder for the engine's folder: that for temporary files, or `/tmp` if its path is too long for sockets."""
    folders = [Path(tempfile.gettempdir()), Path('/tmp')]
    longest = 107 - len(f'/{_PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store')
    return next((folder for folder in folders if len(os.fsencode(folder)) <= longest), folders[-1])


@contextlib.contextmanager
def _native_messages_held_back() -> Iterator[list[bytes]]:
    """Holds back what Ray's C++ code writes to standard error; if the body fails, the result has it as its entry."""
    messages: list[bytes] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        except BaseException:
            file.seek(0)
            messages.append(file.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
