"""A TCP proxy between actors and learner whose connections can be cut, stalled or garbled."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

_LOOK_S = 0.2
_STUCK_S = 60.0  # After which a receiver that does not read is given up.


class Proxy:
    """Forwards connections to `port` to another port of this machine; `mode` says how well.

    `pass`; `cut`: connections end, and new ones end at once; `stalled`: nothing crosses; `garbled`: one bit in each
    piece of data is flipped.
    """

    def __init__(self, port: int, target: int):
        self.mode = 'pass'
        self.num_bytes = 0
        self._target = target
        self._closed = threading.Event()
        self._listener = socket.create_server(('127.0.0.1', port))
        self._listener.settimeout(_LOOK_S)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(5.0)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                if self.mode == 'cut':
                    raise ConnectionRefusedError
                far = socket.create_connection(('127.0.0.1', self._target), 2.0)
            except OSError:
                near.close()
                continue
            ended = threading.Event()
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._forward, args=(source, sink, ended), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, ended: threading.Event) -> None:
        """Both directions of a connection end together."""
        source.settimeout(_STUCK_S)
        with source, contextlib.suppress(OSError):
            while not (self._closed.is_set() or ended.is_set() or self.mode == 'cut'):
                if not select.select([source], [], [], _LOOK_S)[0]:
                    continue
                data = source.recv(1 << 16)
                if not data:
                    break
                while self.mode == 'stalled' and not self._closed.wait(_LOOK_S):
                    pass
                if self.mode == 'garbled':
                    data = bytearray(data)
                    data[len(data) // 2] ^= 1 << (self.num_bytes % 8)
                self.num_bytes += len(data)
                sink.sendall(data)
        ended.set()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
