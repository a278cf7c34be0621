"""Messages, as lines of JSON, between a host's program and its supervisor, and between the supervisors of a pod.

This module imports the standard library only, as `supervisor` does.
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

_JOIN_S = 120.0  # Longest wait of a program for the supervisors to connect, twice the longest time they take.
_GREETING_S = 5.0  # Longest wait for the greeting of a connection.
_GREETING_BYTES = 1000


class Channel:
    """A program's end of the channel to its supervisor; the program exits at once if its supervisor ends.

    Args:
      address: Value of the option `--supervisor`, set by the supervisor.
    """

    def __init__(self, address: str):
        descriptor, port = address.split(',')
        os.set_inheritable(int(descriptor), False)
        self.port = int(port)
        """Port at which the supervisor listens."""
        self._connection = Connection(socket.socket(fileno=int(descriptor)))
        self._connected = threading.Event()

        def watch():
            while self._connection.receive() is not None:  # The supervisor sends one kind of message only.
                self._connected.set()
            os._exit(1)

        threading.Thread(target=watch, name='supervisor watcher', daemon=True).start()

    def joined(self, host: int, names: Sequence[str], address: tuple[str, int], token: str) -> None:
        """Describes the pod to the supervisor, and waits until the supervisors of all hosts are connected.

        From then on the end of any host is noticed by all.

        Args:
          host: Index of this host.
          names: Names of all hosts.
          address: Host and port at which the supervisor of host 0 listens.
          token: Token that authenticates supervisors to each other.

        Raises:
          TimeoutError: If they do not connect in time.
        """
        self._connection.send({'host': host, 'names': list(names), 'address': address, 'token': token})
        if not self._connected.wait(_JOIN_S):
            raise TimeoutError(f'waited {_JOIN_S:g} s for the supervisors of all hosts to connect')

    def ended(self, reason: str, follows: bool) -> None:
        """Reports to the supervisor why the program ends before the run is complete.

        Args:
          reason: Cause, in one line.
          follows: Whether the program ends because another host's program has ended.
        """
        self._connection.send({'reason': reason, 'follows': follows})


def new_token() -> str:
    """Returns a token that authenticates the supervisors of a run to each other."""
    return secrets.token_hex(16)


class Connection:
    """Lines of JSON over a socket."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._lines = connected.makefile('rb')
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; does nothing if the other end is gone, which `receive` reports."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> dict[str, Any] | None:
        """Returns the next message; None if the other end is gone."""
        try:
            return _message(self._lines.readline(1 << 20))
        except OSError:
            return None

    def finish(self) -> None:
        """Closes the connection for sending."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def read_greeting(connected: socket.socket) -> dict[str, Any] | None:
    """Reads the greeting of a new connection, and not a byte more; None if it is invalid or late."""
    deadline = time.monotonic() + _GREETING_S
    line = b''
    try:
        while not line.endswith(b'\n') and len(line) < _GREETING_BYTES:
            connected.settimeout(max(0.001, deadline - time.monotonic()))
            # Peeks, because `Connection` reads the bytes after the line.
            seen = connected.recv(_GREETING_BYTES - len(line), socket.MSG_PEEK)
            part = connected.recv(seen.find(b'\n') + 1 or len(seen))
            if not part:
                return None
            line += part
    except OSError:
        return None
    return _message(line)


def _message(line: bytes) -> dict[str, Any] | None:
    """Parses a line; None if it is not a message."""
    try:
        message = json.loads(line) if line.endswith(b'\n') else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
