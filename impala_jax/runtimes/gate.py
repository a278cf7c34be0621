"""A TCP port through which authenticated actors on other machines reach a learner's Reverb server.

Reverb has no authentication, and a malformed message ends its process. So the server listens at a Unix socket, and the
gate in front of it at a TCP port. Both ends prove that they know a secret, by a challenge, before any byte reaches the
server. The secret itself is never sent. The connection is not encrypted afterwards, nor protected against an attacker
who can modify traffic.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from impala_jax.config import ConfigError
from impala_jax.runtimes.seals import derived_key

_logger = logging.getLogger(__name__)

SECRET_VARIABLE = 'IMPALA_ACTORS_SECRET'
SECRET_FILE = 'actors_secret'  # File in the workdir.
_SHORTEST = 16  # Shortest secret, in characters.
_HELLO = b'impala_jax gate 1\n'
_LEARNER, _ACTOR = b'learner', b'actor'
_NONCE_BYTES = _PROOF_BYTES = 32
_REFUSAL = bytes(_PROOF_BYTES)
_HANDSHAKE_S = 5.0
_MAX_CONNECTIONS = 4096
_MAX_HANDSHAKES = 64  # Handshakes at the same time.
_CHUNK_BYTES = 1 << 18
# The loss of the other machine is detected after about 20 s.
_KEEP_ALIVE = {'TCP_KEEPIDLE': 5, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}


class WrongSecret(ConfigError):
    """The two ends have different secrets."""


def learners_secret(workdir: Path) -> bytes:
    """Returns the secret of a learner, from the environment or from a file in the workdir, made if it is missing.

    Raises:
      ConfigError: If the secret is too short, or other users may read the file.
    """
    if SECRET_VARIABLE in os.environ:
        return _checked(os.environ[SECRET_VARIABLE], SECRET_VARIABLE)
    path = workdir / SECRET_FILE
    with (
        contextlib.suppress(FileExistsError),
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as f,
    ):
        f.write(f'{secrets.token_hex(32)}\n')
    return secret_in(path)


def actors_secret(path: Path | None) -> Callable[[], bytes]:
    """Returns a function that reads the secret of actors.

    Args:
      path: Path of the file with the secret, which may be written later; None reads the environment.

    Raises:
      ConfigError: If `path` is None and the environment has no secret, or a secret that is too short.
    """
    if path is not None:
        return lambda: secret_in(path)
    if SECRET_VARIABLE not in os.environ:
        raise ConfigError(
            f'actors and learner share a secret: give --secret-file with a copy of the file {SECRET_FILE} in the '
            f"learner's workdir, or set {SECRET_VARIABLE} on both sides"
        )
    secret = _checked(os.environ[SECRET_VARIABLE], SECRET_VARIABLE)
    return lambda: secret


def secret_in(path: Path) -> bytes:
    """Reads the secret in a file.

    Raises:
      FileNotFoundError: If the file does not exist.
      ConfigError: If the file cannot be read, other users may read it, or the secret is too short.
    """
    try:
        with open(path, errors='backslashreplace') as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(10_000)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f'the secret of actors cannot be read: {path}: {error.strerror}') from error
    if mode & 0o077:
        raise ConfigError(
            f'the secret of actors in {path} can be read by others (mode {mode & 0o777:o}): chmod 600 it, and replace '
            'the secret if somebody may have read it'
        )
    return _checked(text, str(path))


def _checked(text: str, where: str) -> bytes:
    secret = text.strip().encode()
    if len(secret) < _SHORTEST:
        raise ConfigError(
            f'the secret of actors in {where} has {len(secret)} characters; give at least {_SHORTEST}, as from: '
            'openssl rand -hex 32'
        )
    return secret


class Gate:
    """Forwards the connections of clients that know the secret to a server, in threads, until `close`.

    Args:
      port: TCP port to listen at, on all addresses.
      secret: Secret of the actors.
      server: Address of the server behind the gate, unix:PATH or HOST:PORT.

    Raises:
      OSError: If the port is in use.
    """

    def __init__(self, port: int, secret: bytes, server: str):
        self._key = derived_key(secret, 'gate')
        self._server = server
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._pipes = _Pipes()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(('', port), family=family, dualstack_ipv6=dual, backlog=128)
        self._num_refused = 0
        threading.Thread(target=self._accept, name='gate', daemon=True).start()

    def close(self) -> None:
        """Ends all connections and stops listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread.
        self._listener.close()
        self._pipes.close()

    def _accept(self) -> None:
        while True:
            try:
                client, address = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    return  # Closed.
                self._refused('a client', error)  # For example no free file descriptor; some will be closed.
                time.sleep(0.1)
                continue
            # Closes a connection beyond the limits; a handshake ends within seconds and makes room for others.
            if len(self._pipes) >= _MAX_CONNECTIONS or not self._handshakes.acquire(blocking=False):
                client.close()
                continue
            admit = threading.Thread(target=self._admit, args=(client, address[0]), name='gate handshake', daemon=True)
            try:
                admit.start()
            except RuntimeError as error:  # Too many threads.
                client.close()
                self._handshakes.release()
                self._refused(address[0], error)

    def _refused(self, address: str, error: Exception) -> None:
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:
            _logger.warning(
                'a connection from %s did not get through: %s (%d so far)', address, error, self._num_refused
            )

    def _admit(self, client: socket.socket, address: str) -> None:
        try:
            with _closed_on_error(client):
                _prove(client, self._key, _LEARNER, _ACTOR)
                server = _connected(self._server)
                with _closed_on_error(server):
                    self._pipes.join(client, server)
        except (OSError, WrongSecret) as error:
            self._refused(address, error)
        finally:
            self._handshakes.release()


class Tunnel:
    """The actors' end of a `Gate`: a local address whose connections are forwarded to the learner, until `close`.

    Args:
      host: Host name of the learner's machine.
      port: Port of its gate.
      secret: Secret of the learner.

    Raises:
      OSError: If nothing listens at the port.
      WrongSecret: If the other end has another secret, or is not a gate.
    """

    def __init__(self, host: str, port: int, secret: bytes):
        self._host, self._port = host, port
        self._key = derived_key(secret, 'gate')
        self._connect().close()
        self._pipes = _Pipes()
        self._folder = tempfile.TemporaryDirectory(prefix='impala_jax-')  # Other users cannot enter it.
        path = Path(self._folder.name) / 'reverb'
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.address = f'unix:{path}'
        """Address for Reverb's client."""
        threading.Thread(target=self._accept, name='tunnel to the learner', daemon=True).start()

    def close(self) -> None:
        """Ends all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._pipes.close()
        self._folder.cleanup()

    def _connect(self) -> socket.socket:
        connected = socket.create_connection((self._host, self._port), _HANDSHAKE_S)
        with _closed_on_error(connected):
            _prove(connected, self._key, _ACTOR, _LEARNER)
        return connected

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                with _closed_on_error(client):
                    learner = self._connect()
                    self._pipes.join(client, learner)
            except (OSError, WrongSecret) as error:
                _logger.debug('cannot reach the learner: %s', error)  # Reverb's client reports the loss.


def _prove(connected: socket.socket, key: bytes, own: bytes, others: bytes) -> None:
    """Proves to the other end that this one knows the key, and verifies the same of the other end.

    Args:
      connected: Connection to the other end.
      key: Key derived from the secret.
      own: Role of this end, `_LEARNER` or `_ACTOR`.
      others: Role of the other end.

    Raises:
      WrongSecret: If the other end does not know the key, or speaks another protocol.
      OSError: If the other end closes the connection or does not answer in time.
    """
    connected.settimeout(_HANDSHAKE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    deadline = time.monotonic() + _HANDSHAKE_S
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connected.sendall(_HELLO + own[:1] + nonce)
    hello = _receive(connected, len(_HELLO) + 1 + _NONCE_BYTES, deadline)
    if hello[: len(_HELLO) + 1] != _HELLO + others[:1]:
        raise WrongSecret('it is not the gate of a learner, or of another version of impala_jax')
    both = b''.join(sorted([own + nonce, others + hello[len(_HELLO) + 1 :]]))
    # The actor begins, so a learner sends no proof to a client that does not know the secret.
    if own == _ACTOR:
        connected.sendall(hmac.digest(key, own + both, 'sha256'))
    proof = _receive(connected, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, hmac.digest(key, others + both, 'sha256')):
        if own == _LEARNER:
            connected.sendall(_REFUSAL)  # A closed connection alone could be a network failure, which actors retry.
        raise WrongSecret('it has another secret')
    if own == _LEARNER:
        connected.sendall(hmac.digest(key, own + both, 'sha256'))
    connected.settimeout(None)


def _receive(connected: socket.socket, size: int, deadline: float) -> bytes:
    """Receives `size` bytes; raises ConnectionError if the other end closes, TimeoutError after the deadline."""
    received = b''
    while len(received) < size:
        connected.settimeout(max(0.001, deadline - time.monotonic()))
        part = connected.recv(size - len(received))
        if not part:
            raise ConnectionResetError('the other end has closed the connection')
        received += part
    return received


def _connected(address: str) -> socket.socket:
    if not address.startswith('unix:'):
        host, _, port = address.rpartition(':')
        return socket.create_connection((host, int(port)), _HANDSHAKE_S)
    connected = socket.socket(socket.AF_UNIX)
    with _closed_on_error(connected):
        connected.connect(address.removeprefix('unix:'))
    return connected


@contextlib.contextmanager
def _closed_on_error(connected: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connected.close()
        raise


class _Pipes:
    """Pairs of connections; data received on one is sent on the other."""

    def __init__(self):
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def join(self, first: socket.socket, second: socket.socket) -> None:
        """Adds a pair, which forwards in both directions until one end closes."""
        pair = (first, second)
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError('the gate is closed')
            self._open.add(pair)
        back = threading.Thread(target=_pump, args=(second, first), name='gate pipe', daemon=True)
        back.start()
        threading.Thread(target=self._run, args=(pair, back), name='gate pipe', daemon=True).start()

    def close(self) -> None:
        """Closes all pairs."""
        with self._lock:
            self._closed = True
            pairs = list(self._open)
        for pair in pairs:
            for end in pair:
                _shut(end)

    def _run(self, pair: tuple[socket.socket, socket.socket], back: threading.Thread) -> None:
        _pump(*pair)
        back.join()
        with self._lock:
            self._open.discard(pair)
        for end in pair:
            end.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        while size := source.recv_into(buffer):
            target.sendall(buffer[:size])
    except OSError:  # One of the connections has ended; both are shut down.
        pass
    _shut(source)
    _shut(target)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
