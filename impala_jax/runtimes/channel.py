"""Lines of JSON between the program of a host and its supervisor, and between the supervisors of a pod.

Only the standard library is imported, as in `supervisor`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

_JOIN_S = 120.0  # How long a program waits for the supervisors to connect: twice the time that those take at most.
_GREETING_S = 5.0  # How long a connection may take to say which host it is of.
_GREETING_BYTES = 1000


class Channel:
    """The program's end of the channel to its supervisor; a program whose supervisor is gone ends at once.

    Args:
      address: what the supervisor gave with `--supervisor`.
    """

    def __init__(self, address: str):
        descriptor, port = address.split(',')
        os.set_inheritable(int(descriptor), False)
        self.port = int(port)
        """Where the supervisor listens."""
        self._connection = Connection(socket.socket(fileno=int(descriptor)))
        self._connected = threading.Event()

        def watch():
            while self._connection.receive() is not None:  # There is but one thing that it says.
                self._connected.set()
            os._exit(1)

        threading.Thread(target=watch, name='supervisor watcher', daemon=True).start()

    def joined(self, host: int, names: Sequence[str], address: tuple[str, int], token: str) -> None:
        """Tells the supervisor that this is `host` of those named, and where that of the first one listens.

        Returns when the supervisors are connected, so that from then on no host ends unheard.

        Raises:
          TimeoutError: they are not.
        """
        self._connection.send({'host': host, 'names': list(names), 'address': address, 'token': token})
        if not self._connected.wait(_JOIN_S):
            raise TimeoutError(f'waited {_JOIN_S:g} s for the supervisors of all hosts to connect')

    def ended(self, reason: str, follows: bool) -> None:
        """Tells the supervisor why the program ends before the run is done."""
        self._connection.send({'reason': reason, 'follows': follows})


def new_token() -> str:
    """What supervisors of one run know each other by."""
    return secrets.token_hex(16)


class Connection:
    """Lines of JSON over a socket."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._lines = connected.makefile('rb')
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Does nothing when the other side is gone: `receive` tells."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other side is gone."""
        try:
            return _message(self._lines.readline(1 << 20))
        except OSError:
            return None

    def finish(self) -> None:
        """Nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def read_greeting(stranger: socket.socket) -> dict[str, Any] | None:
    """What somebody who has connected says of himself, read to the byte; None where that makes no sense, or is late."""
    deadline = time.monotonic() + _GREETING_S
    line = b''
    try:
        while not line.endswith(b'\n') and len(line) < _GREETING_BYTES:
            stranger.settimeout(max(0.001, deadline - time.monotonic()))
            # What follows the line is read by the connection.
            seen = stranger.recv(_GREETING_BYTES - len(line), socket.MSG_PEEK)
            part = stranger.recv(seen.find(b'\n') + 1 or len(seen))
            if not part:
                return None
            line += part
    except OSError:
        return None
    return _message(line)


def _message(line: bytes) -> dict[str, Any] | None:
    """The message of a line; None where it is none."""
    try:
        message = json.loads(line) if line.endswith(b'\n') else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
