"""How a program's launching process and its nodes tell each other that they end: in memory, or over a socket.

Nothing here needs a disk, and no process is found by its number: a node's connection ends with the node, however that
ends, and ends the node when the launching process is gone. The kernel says who is at the other end of a connection;
other users are refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from impala_jax.runtimes import nodes

_logger = logging.getLogger(__name__)


class Control:
    """What is known of a running program, by its nodes too where they are threads of this process."""

    def __init__(self):
        self.stop = threading.Event()
        """All nodes are to end."""
        self.learner_ended = threading.Event()
        self.learns = False
        """The learner has something to save."""
        self.saves = False
        """It writes its last checkpoint."""
        self.num_updates: int | None = None
        """In all, of a learner that has ended by itself."""
        self.error: BaseException | None = None
        """What ended the first node that failed; of a node in another process only its text."""
        self.failure: str | None = None
        """The last words of that node."""

    def fail(self, error: BaseException) -> None:
        """A node has failed: all end."""
        if self.failure is None:
            self.error, self.failure = error, nodes.last_words(error)
        self.stop.set()

    def begin_to_learn(self) -> None:
        self.learns = True

    def begin_to_save(self) -> None:
        self.saves = True

    def end_learner(self, num_updates: int | None) -> None:
        """The learner has ended, and needs no other node any more; None: it failed."""
        self.num_updates = num_updates
        self.saves = False
        self.learner_ended.set()


class Server:
    """The launching process's end, where nodes are processes.

    Args:
      control: is changed by what nodes say, and tells them to stop.
      how_it_died: says so of a node that has ended without a word, by the number that its parent process had.
    """

    def __init__(self, control: Control, how_it_died: Callable[[int], str]):
        self._control = control
        self._how_it_died = how_it_died
        self.address = f'\0impala_jax-{secrets.token_hex(8)}'
        """For `Link`; Linux needs no file for a name that begins so."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        for target in (self._accept, self._announce):
            threading.Thread(target=target, name='control', daemon=True).start()

    def close(self) -> None:
        """Ends all nodes that are still connected."""
        with self._lock:
            for connected in [self._listener, *self._sockets]:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return  # Closed.
            if not _is_of_this_user(connected):
                _logger.warning('another user has connected to the control socket of this run, and was refused')
                connected.close()
                continue
            connection = Connection(os.dup(connected.fileno()))
            with self._lock:
                self._sockets.append(connected)
                for event in ('stop', 'learner_ended'):
                    if getattr(self._control, event).is_set():
                        _send(connection, event)
            threading.Thread(target=self._listen, args=(connection,), name='control of a node', daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        node, process, has_ended = 'a node', 0, False
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, arguments = connection.recv()
                if what == 'join':
                    node, process = arguments
                elif what == 'end':
                    has_ended = True
                elif what == 'fail':
                    self._control.fail(nodes.NodeFailure(*arguments))
                else:
                    getattr(self._control, what)(*arguments)
        if not has_ended and not self._control.stop.is_set():
            self._control.fail(nodes.NodeFailure(f'error: {node} {self._how_it_died(process)}'))

    def _announce(self) -> None:
        self._control.stop.wait()
        self._tell('stop')
        self._control.learner_ended.wait()
        self._tell('learner_ended')

    def _tell(self, event: str) -> None:
        with self._lock:
            for connected in self._sockets:
                _send(Connection(os.dup(connected.fileno())), event)


class Link(Control):
    """The same `Control`, in a node's own process.

    Args:
      address: of the `Server`.
      node: the node's name.
      on_loss: ends this process; called when the launching process is gone.
    """

    def __init__(self, address: str, node: str, on_loss: Callable[[], None]):
        super().__init__()
        self._on_loss = on_loss
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(address)
        except OSError:  # It has ended since it started this node.
            on_loss()
        if not _is_of_this_user(connected):
            on_loss()
        self._connection = Connection(connected.detach())
        _send(self._connection, ('join', (f'{node} (process {os.getpid()})', os.getppid())))
        threading.Thread(target=self._listen, name='control', daemon=True).start()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        _send(self._connection, ('fail', (self.failure,)))

    def begin_to_learn(self) -> None:
        _send(self._connection, ('begin_to_learn', ()))

    def begin_to_save(self) -> None:
        _send(self._connection, ('begin_to_save', ()))

    def end_learner(self, num_updates: int | None) -> None:
        _send(self._connection, ('end_learner', (num_updates,)))

    def close(self) -> None:
        """The node has ended."""
        _send(self._connection, ('end', ()))

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                getattr(self, self._connection.recv()).set()
        self._on_loss()


def _send(connection: Connection, message: Any) -> None:
    """Does nothing where the other side is gone: who listens to it finds out."""
    with contextlib.suppress(OSError, ValueError):
        connection.send(message)


def _is_of_this_user(connected: socket.socket) -> bool:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize('3i'))
    _, user, _ = struct.unpack('3i', credentials)
    return user == os.getuid()
