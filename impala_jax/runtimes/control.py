"""Control of a program: stop requests and failures between its launching process and nodes, in memory or by socket.

Neither files nor process ids are needed. When a node ends, for whatever reason, its connection closes and the launching
process notices; when the launching process ends, its nodes do too. The kernel identifies the user at the other end of a
connection, and other users are refused.
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
    """State of a running program; nodes that are threads of the launching process use the same object."""

    def __init__(self):
        self.stop = threading.Event()
        """Set when all nodes have to end."""
        self.learner_ended = threading.Event()
        self.learns = False
        """Whether the learner has something to save."""
        self.saves = False
        """Whether the learner is writing its last checkpoint."""
        self.num_updates: int | None = None
        """Total number of updates, if the learner has ended without failure."""
        self.error: BaseException | None = None
        """Error of the first node that failed; for a node in another process, an error with its text only."""
        self.failure: str | None = None
        """Final message of that node."""

    def fail(self, error: BaseException) -> None:
        """Records the failure of a node, and stops all nodes."""
        if self.failure is None:
            self.error, self.failure = error, nodes.final_message(error)
        self.stop.set()

    def begin_to_learn(self) -> None:
        """Records that the learner has something to save."""
        self.learns = True

    def begin_to_save(self) -> None:
        """Records that the learner is writing its last checkpoint."""
        self.saves = True

    def end_learner(self, num_updates: int | None) -> None:
        """Records that the learner has ended and needs no other node.

        Args:
          num_updates: Total number of updates; None if the learner failed.
        """
        self.num_updates = num_updates
        self.saves = False
        self.learner_ended.set()


class Server:
    """Server of a `Control` in the launching process, for nodes that are processes.

    Args:
      control: Control that is updated by messages of nodes, and whose stop request is sent to them.
      cause_of_death: Function from the id of a node's parent process to the cause of its death, for nodes that end
        without a message.
    """

    def __init__(self, control: Control, cause_of_death: Callable[[int], str]):
        self._control = control
        self._cause_of_death = cause_of_death
        self.address = f'\0impala_jax-{secrets.token_hex(8)}'
        """Address for `Link`, in Linux's abstract namespace, which needs no file."""
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
                _logger.warning('refused a connection of another user to the control socket of this run')
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
            self._control.fail(nodes.NodeFailure(f'error: {node} {self._cause_of_death(process)}'))

    def _announce(self) -> None:
        self._control.stop.wait()
        self._send_all('stop')
        self._control.learner_ended.wait()
        self._send_all('learner_ended')

    def _send_all(self, event: str) -> None:
        with self._lock:
            for connected in self._sockets:
                _send(Connection(os.dup(connected.fileno())), event)


class Link(Control):
    """Client of a `Server`: the `Control` of a node that is a process.

    Args:
      address: Address of the `Server`.
      node: Name of the node.
      on_loss: Function that ends this process; called when the launching process has ended.
    """

    def __init__(self, address: str, node: str, on_loss: Callable[[], None]):
        super().__init__()
        self._on_loss = on_loss
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(address)
        except OSError:  # The launching process has already ended.
            on_loss()
        if not _is_of_this_user(connected):
            on_loss()
        self._connection = Connection(connected.detach())
        _send(self._connection, ('join', (f'{node} (process {os.getpid()})', os.getppid())))
        threading.Thread(target=self._listen, name='control', daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Records the failure here and in the launching process."""
        super().fail(error)
        _send(self._connection, ('fail', (self.failure,)))

    def begin_to_learn(self) -> None:
        """Calls `Control.begin_to_learn` in the launching process."""
        _send(self._connection, ('begin_to_learn', ()))

    def begin_to_save(self) -> None:
        """Calls `Control.begin_to_save` in the launching process."""
        _send(self._connection, ('begin_to_save', ()))

    def end_learner(self, num_updates: int | None) -> None:
        """Calls `Control.end_learner` in the launching process."""
        _send(self._connection, ('end_learner', (num_updates,)))

    def close(self) -> None:
        """Reports that the node has ended without failure."""
        _send(self._connection, ('end', ()))

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                getattr(self, self._connection.recv()).set()
        self._on_loss()


def _send(connection: Connection, message: Any) -> None:
    """Sends a message; does nothing if the other end is gone, which the thread that receives notices."""
    with contextlib.suppress(OSError, ValueError):
        connection.send(message)


def _is_of_this_user(connected: socket.socket) -> bool:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize('3i'))
    _, user, _ = struct.unpack('3i', credentials)
    return user == os.getuid()
