"""Supervisor of a host of a pod: the process that the user starts, which runs and watches the host's program.

It is a separate process for two reasons. JAX aborts the programs of all hosts, without a Python exception, when the
program of host 0 ends. And a collective operation that waits for a lost host cannot be interrupted. Supervisors learn
the addresses of the others from their programs, connect to the supervisor of host 0, and exchange how their programs
ended. A host whose connection closes is considered lost. This module imports the standard library only, to start fast.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from impala_jax.runtimes.channel import Connection, read_greeting
from impala_jax.system import stop_watch, stopping
from impala_jax.system.stop_watch import StopWatch

_CONNECT_S = 60.0  # Longest wait of a supervisor for the others.
_ENDING_S = 20.0  # Time for a program to end by itself after the program of another host has ended.
_VERDICT_S = 10.0  # Longest wait for the host whose end made this host's program end.
_MAX_GREETINGS = 256  # Greetings at the same time.
_FLUSH_S = 2.0  # Time for the last messages to reach the other supervisors.
# The loss of the other machine is detected after about 20 s.
_KEEP_ALIVE = {'SO_KEEPALIVE': 1, 'TCP_KEEPIDLE': 5, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}


class End(NamedTuple):
    """The end of a host's program."""

    host: int
    reason: str  # Cause in one line; '' if the run was complete.
    follows: bool  # Whether it ended because another host's program did.


def supervise(command: Sequence[str], parent: int | None = None, coordinator: str | None = None) -> int:
    """Runs a host's program until it ends, or has to end because another host's program did.

    Args:
      command: Command of the program; `--supervisor` with the address of the channel is appended.
      parent: Id of a process with which this one ends; None for no such process.
      coordinator: host:port of host 0; with a local address, only processes of this machine can connect.

    Returns:
      The exit status, 0 if the run is complete. Otherwise the last line on standard error is the reason and the host
      where it began.
    """
    if parent is not None:
        end_with(parent)
    return _Supervisor(command, '127.0.0.1' if is_local(coordinator) else '').run()


def simulate(num_hosts: int, num_devices: int, command: Sequence[str]) -> int:
    """Runs `command` as several hosts on this machine, with CPU devices that communicate by gloo.

    Args:
      num_hosts: Number of hosts.
      num_devices: Number of CPU devices per host.
      command: Command of a supervisor; the options of its host are appended.

    Returns:
      The exit status of the first host for which it is not 0, else 0.
    """
    address = f'localhost:{free_port()}'
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={num_devices}'.strip()
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    hosts: list[subprocess.Popen] = []
    with _signals_to(lambda number: [host.send_signal(number) for host in hosts]):
        try:
            for i in range(num_hosts):
                own = ['--coordinator', address, '--num-hosts', str(num_hosts), '--host-id', str(i)]
                own += ['--parent', str(os.getpid())]
                with stopping.deferred():
                    hosts.append(subprocess.Popen([*command, *own], env=environment, start_new_session=True))
            deadline = None
            watches = [StopWatch(host.pid) for host in hosts]
            while None in [host.poll() for host in hosts]:  # Polls all hosts.
                for i, host in enumerate(hosts):
                    if watches[i].too_long() and host.poll() is None:
                        sys.stderr.write(
                            f'error: host {i}: its supervisor was stopped for {stop_watch.STOPPED_S:g} s; '
                            'it is killed\n'
                        )
                        host.kill()
                if deadline is None and any(host.returncode for host in hosts):
                    deadline = time.monotonic() + _CONNECT_S
                if deadline is not None and time.monotonic() > deadline:
                    break  # A host failed before the others were connected to it.
                time.sleep(0.1)
        finally:
            for host in hosts:
                if host.poll() is None:
                    host.terminate()
            for host in hosts:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    host.wait(_ENDING_S)
                host.kill()
                host.wait()
    return next((_status(host.returncode) for host in hosts if host.returncode), 0)


def is_local(coordinator: str | None) -> bool:
    """Whether all hosts are on this machine, judged by the address of host 0."""
    return coordinator is not None and coordinator.rpartition(':')[0] in ('localhost', '127.0.0.1')


def free_port() -> int:
    """Returns a port of this machine at which a program can listen some seconds later.

    The port is outside the range from which the system assigns ports to other connections in the meantime.

    Raises:
      OSError: If no free port is found.
    """
    for port in secrets.SystemRandom().sample(range(20_000, 32_768), 100):
        with contextlib.suppress(OSError), socket.create_server(('', port)):
            return port
    raise OSError('no port from 20000 to 32767 is free')


def end_with(parent: int) -> None:
    """Ends this process, by SIGTERM, when its parent process has ended for any reason, even by SIGKILL."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name='parent watcher', daemon=True).start()


class _Supervisor:
    def __init__(self, command: Sequence[str], bind: str):
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._listener = socket.create_server((bind, 0))
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours)
        with theirs:
            address = f'{theirs.fileno()},{self._listener.getsockname()[1]}'
            # Its own session, so that Ctrl-C reaches it only once, and its children can be killed as a group.
            with stopping.deferred():
                self._program = subprocess.Popen(
                    [*command, '--supervisor', address], pass_fds=[theirs.fileno()], start_new_session=True
                )
        self._host = 0
        self._names: list[str] = []  # Names of all hosts, when known.
        self._others: dict[int, Connection] = {}
        self._missing: set[int] = set()  # On host 0, the hosts that have not connected yet.
        self._greeted = threading.Lock()
        self._cause: End | None = None  # The first known end of a host before the run was complete.
        self._threads: list[threading.Thread] = []

    def run(self) -> int:
        with _signals_to(self._program.send_signal):
            try:
                return self._conclude(self._watch())
            finally:
                if self._program.poll() is None:
                    self._kill()
                self._listener.close()
                for connection in self._others.values():
                    connection.finish()
                deadline = time.monotonic() + _FLUSH_S
                for thread in self._threads:
                    thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> End:
        """Handles events until the program has ended; returns how it ended."""
        self._start(self._wait, 'program')
        self._start(self._listen, 'channel')
        threading.Thread(target=self._watch_stops, name='stop watch', daemon=True).start()
        reported: End | None = None
        deadline, killed = None, False
        while True:
            try:
                what, value = self._events.get(
                    timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                self._kill()
                deadline, killed = None, True
                continue
            if what == 'joined':
                self._host, self._names = value['host'], value['names']
                self._start(lambda joined=value: self._connect(**joined), 'hosts')
            elif what == 'reported':
                reported = End(self._host, value['reason'], value['follows'])
                self._send(reported)
            elif what == 'stopped':
                reported = reported or End(self._host, f'its program was stopped for {stop_watch.STOPPED_S:g} s', False)
                self._send(reported)
                self._kill()
            elif what == 'host':
                self._record(value)
            if what == 'reported' or (what == 'host' and value.reason):
                if not killed and deadline is None:
                    deadline = time.monotonic() + _ENDING_S
            if what == 'ended':
                self._kill()  # Ends the children that the program has left.
                return self._end(reported, killed)

    def _end(self, reported: End | None, killed: bool) -> End:
        code = self._program.returncode
        if code == 0:
            return End(self._host, '', False)
        if reported is not None:
            return reported
        if killed:
            return End(self._host, 'it did not end by itself', True)
        if code < 0:
            reason = f'its program was killed by signal {-code} ({signal.Signals(-code).name})'
            # JAX aborts a program that does not find the other hosts, or loses host 0.
            aborted = -code == signal.SIGABRT
            if aborted and not self._names:
                reason += (
                    ' before it found the other hosts: start the same command on every host, with its own --host-id, '
                    'and open the ports between them'
                )
            return End(self._host, reason, follows=aborted and len(self._names) > 1)
        return End(self._host, f'its program ended with exit status {code}', False)

    def _conclude(self, end: End) -> int:
        """Reports the end to the other supervisors and on standard error; returns the exit status."""
        self._send(end)  # Ignored by supervisors that already know it.
        if not end.reason:
            return 0
        status = _status(self._program.returncode)
        if not end.follows:
            if self._program.returncode < 0:
                self._print(end)
            return status
        deadline = time.monotonic() + _VERDICT_S
        while self._cause is None or self._cause.follows:
            try:
                what, value = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if what == 'host':
                self._record(value)
        if self._cause is None:
            self._print(end)
        else:
            self._print(self._cause, ' (this host ended with it; the same command on every host resumes)')
        return status

    def _print(self, end: End, more: str = '') -> None:
        host = f'host {end.host} ({self._names[end.host]})' if self._names else 'this host'
        # A single write, because supervisors of simulated hosts use the same stream and print() writes in two parts.
        sys.stderr.write(f'error: {host}: {end.reason}{more}\n')
        sys.stderr.flush()

    def _record(self, end: End) -> None:
        if end.reason and (self._cause is None or (self._cause.follows and not end.follows)):
            self._cause = end

    def _send(self, end: End, exclude: int | None = None) -> None:
        for host, connection in list(self._others.items()):
            if host != exclude:
                connection.send(end._asdict())

    def _kill(self) -> None:
        """Kills the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._program.pid, signal.SIGKILL)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait(self) -> None:
        self._program.wait()
        # Its last message has to precede this event.
        for thread in self._threads:
            if thread.name == 'channel':
                thread.join(2.0)
        self._events.put(('ended', None))

    def _watch_stops(self) -> None:
        watch = StopWatch(self._program.pid)
        while not watch.too_long():
            if self._program.poll() is not None:
                return
            time.sleep(min(1.0, stop_watch.STOPPED_S))
        self._events.put(('stopped', None))

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            self._events.put(('joined' if 'names' in message else 'reported', message))

    def _connect(self, host: int, names: list[str], address: tuple[str, int], token: str) -> None:
        """Connects to the supervisor of host 0; on host 0, waits for the others."""
        deadline = time.monotonic() + _CONNECT_S
        if host:
            try:
                connected = socket.create_connection((address[0], address[1]), timeout=_CONNECT_S)
            except OSError as error:
                where = f'{address[0]}:{address[1]}'
                reason = f'host {host} cannot reach its supervisor at {where} ({error}); open all ports between hosts'
                self._events.put(('host', End(0, reason, False)))
                return
            self._add(0, connected).send({'token': token, 'host': host})
            self._channel.send({'connected': True})
            return
        self._missing = set(range(1, len(names)))
        greetings = threading.BoundedSemaphore(_MAX_GREETINGS)
        self._listener.settimeout(0.2)
        while missing := self._still_missing():
            try:
                if greetings.acquire(timeout=0.2):
                    connected, _ = self._listener.accept()
                    # One thread per greeting, so that a silent connection does not delay others.
                    greet = functools.partial(self._greet, connected, token, greetings)
                    threading.Thread(target=greet, name='greeting', daemon=True).start()
            except OSError as error:
                greetings.release()
                if self._listener.fileno() < 0:
                    return
                if not isinstance(error, TimeoutError):
                    time.sleep(0.1)  # For example too many connections.
            if time.monotonic() > deadline:
                for other in missing:
                    reason = f'its supervisor did not connect to that of host 0 within {_CONNECT_S:g} s'
                    self._events.put(('host', End(other, reason, False)))
                return
        self._channel.send({'connected': True})

    def _still_missing(self) -> list[int]:
        with self._greeted:
            return sorted(self._missing)

    def _greet(self, connected: socket.socket, token: str, greetings: threading.BoundedSemaphore) -> None:
        """Identifies the host of a new connection, and closes the connection if it is not of this run."""
        try:
            greeting = read_greeting(connected) or {}
            host, given = greeting.get('host'), greeting.get('token')
            if (
                type(host) is int
                and isinstance(given, str)
                and secrets.compare_digest(given.encode(errors='replace'), token.encode())
            ):
                with self._greeted:
                    if host in self._missing:
                        self._add(host, connected)
                        self._missing.remove(host)
                        return
            connected.close()
        finally:
            greetings.release()

    def _add(self, host: int, connected: socket.socket) -> Connection:
        connected.settimeout(None)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                level = socket.SOL_SOCKET if name.startswith('SO_') else socket.IPPROTO_TCP
                connected.setsockopt(level, getattr(socket, name), value)
        connection = Connection(connected)
        self._others[host] = connection
        self._start(lambda: self._follow(host, connection), f'host {host}')
        return connection

    def _follow(self, host: int, connection: Connection) -> None:
        """Receives the messages of another host's supervisor until it ends; host 0 forwards them to all."""
        has_ended = False
        while not has_ended or host == 0:
            message = connection.receive()
            if message is None:
                break
            end = End(**message)
            has_ended |= end.host == host
            self._pass_on(end, host)
        if not has_ended:
            self._pass_on(End(host, 'it has ended, or cannot be reached any more', False), host)

    def _pass_on(self, end: End, source: int) -> None:
        if self._host == 0:
            self._send(end, exclude=source)
        self._events.put(('host', end))


def _status(returncode: int) -> int:
    """Exit status as a shell reports it."""
    return 128 - returncode if returncode < 0 else returncode


@contextlib.contextmanager
def _signals_to(send: Callable[[int], Any]) -> Iterator[None]:
    """Passes stop signals on to programs, which end by themselves, in the body of the `with`."""

    def handle(number: int, _: types.FrameType | None) -> None:
        send(number)

    previous = {number: signal.signal(number, handle) for number in stopping.SIGNALS}
    try:
        with stopping.critical_section():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
