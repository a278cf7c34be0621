"""Closing the TCP port of a gRPC server in favour of a Unix socket, which only this user can reach.

Reverb's server listens on all addresses, without authentication, and has no option for anything else. Its listening
socket is a file descriptor of this process, however: here it is replaced by one that listens at a path. Connections
are then accepted and served as before, and the directory of the path decides who may connect. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_EPOLL_CTL_ADD = 1
_BACKLOG = 128
_WATCHED = re.compile(r'tfd:\s+(\d+) events:\s+([0-9a-f]+) data:\s+([0-9a-f]+)')


class _EpollEvent(ctypes.Structure):
    _pack_ = 1
    _fields_ = [('events', ctypes.c_uint32), ('data', ctypes.c_uint64)]


def listen_privately(port: int, path: Path) -> None:
    """Moves what listens at a TCP port in this process to a Unix socket; connections made before are cut.

    Args:
      port: TCP port of a gRPC server of this process.
      path: Where to listen instead; in a directory that other users cannot enter.

    Raises:
      OSError: It is impossible here; the server listens where it did.
    """
    listeners = [descriptor for descriptor, listens in _sockets_at(port) if listens]
    watches = [(epoll, watch) for epoll, watch in _watches() if watch[0] in listeners]
    if not listeners or {watch[0] for _, watch in watches} != set(listeners):
        raise OSError(f'this server does not wait for connections at port {port} as expected')
    with socket.socket(socket.AF_UNIX) as private:
        private.bind(str(path))
        private.listen(_BACKLOG)
        private.setblocking(False)
        for descriptor in listeners:
            os.dup2(private.fileno(), descriptor, inheritable=False)  # Closes the port.
    # The kernel forgot that the server waited for the old socket.
    for epoll, (descriptor, events, data) in watches:
        event = _EpollEvent(events, data)
        if ctypes.CDLL(None, use_errno=True).epoll_ctl(epoll, _EPOLL_CTL_ADD, descriptor, ctypes.byref(event)):
            raise RuntimeError(f'epoll_ctl: {os.strerror(ctypes.get_errno())}')
    for descriptor, _ in _sockets_at(port):
        with _borrowed(descriptor) as connected, contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


def _sockets_at(port: int) -> list[tuple[int, bool]]:
    """This process's TCP sockets with that local port: descriptors, and whether they listen."""
    found = []
    for name in os.listdir('/proc/self/fd'):
        # It may be something else than a socket, or was closed meanwhile.
        with contextlib.suppress(OSError), _borrowed(int(name)) as candidate:
            if candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.getsockname()[1] == port:
                found.append((int(name), bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))))
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """The socket of a descriptor, which stays open."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _watches() -> list[tuple[int, tuple[int, int, int]]]:
    """What this process waits for: descriptors of epoll, each with a watched descriptor, its events and data."""
    found = []
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):  # It was closed meanwhile.
            if os.readlink(f'/proc/self/fd/{name}') == 'anon_inode:[eventpoll]':
                text = Path(f'/proc/self/fdinfo/{name}').read_text()
                for descriptor, events, data in _WATCHED.findall(text):
                    found.append((int(name), (int(descriptor), int(events, 16), int(data, 16))))
    return found
