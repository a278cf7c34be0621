"""Replacement of the TCP port of a gRPC server by a Unix socket that only this user can reach.

Reverb's server listens on all addresses, without authentication, and has no option to change that. Its listening socket
is a file descriptor of this process, which this module replaces by one that listens at a path. The server then accepts
connections as before, and the permissions of the path's directory decide who can connect. Linux only.
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
    """Moves a server of this process from a TCP port to a Unix socket; closes existing connections.

    Args:
      port: TCP port of a gRPC server of this process.
      path: Path of the Unix socket, in a directory that other users cannot enter.

    Raises:
      OSError: If this system does not allow it; the server is unchanged.
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
    # Closing the old socket removed it from the server's epoll sets.
    for epoll, (descriptor, events, data) in watches:
        event = _EpollEvent(events, data)
        if ctypes.CDLL(None, use_errno=True).epoll_ctl(epoll, _EPOLL_CTL_ADD, descriptor, ctypes.byref(event)):
            raise RuntimeError(f'epoll_ctl: {os.strerror(ctypes.get_errno())}')
    for descriptor, _ in _sockets_at(port):
        with _borrowed(descriptor) as connected, contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


def _sockets_at(port: int) -> list[tuple[int, bool]]:
    """This process's TCP sockets with the local port: descriptors, and whether they listen."""
    found = []
    for name in os.listdir('/proc/self/fd'):
        # The descriptor may not be a socket, or may have been closed in the meantime.
        with contextlib.suppress(OSError), _borrowed(int(name)) as candidate:
            if candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.getsockname()[1] == port:
                found.append((int(name), bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))))
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Provides the socket of a descriptor, which stays open."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _watches() -> list[tuple[int, tuple[int, int, int]]]:
    """The epoll descriptors of this process, each with a watched descriptor, its events and its data."""
    found = []
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):  # The descriptor may have been closed in the meantime.
            if os.readlink(f'/proc/self/fd/{name}') == 'anon_inode:[eventpoll]':
                text = Path(f'/proc/self/fdinfo/{name}').read_text()
                for descriptor, events, data in _WATCHED.findall(text):
                    found.append((int(name), (int(descriptor), int(events, 16), int(data, 16))))
    return found
