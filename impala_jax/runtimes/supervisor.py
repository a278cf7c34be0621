"""The process that a person starts on each host of a pod: it runs the host's program, and knows how the others fare.

It is a process of its own because JAX aborts the programs of all hosts, without a word to Python, as soon as that of
the first one is gone, and because a collective that waits for a host that is gone cannot be interrupted. Supervisors
hear from their programs where the others are, connect to that of the first host, and tell each other how their
programs ended; a host whose connection breaks is gone. Only the standard library is imported: this must cost the host
nothing.
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
from impala_jax.system import stopping

_STOPPED_S = 30.0  # How long a process may be stopped, as by SIGSTOP; JAX would take two minutes to say less.
_CONNECT_S = 60.0  # How long a supervisor waits for the others.
_ENDING_S = 20.0  # How long a program may take to end by itself after that of another host has ended.
_VERDICT_S = 10.0  # How long a supervisor whose program followed another one waits to hear which.
_MAX_GREETINGS = 256  # at the same time
_LAST_WORDS_S = 2.0  # How long a supervisor that has ended lets the others hear it.
# A machine that is gone without a word is found out after about 20 s.
_KEEP_ALIVE = {'SO_KEEPALIVE': 1, 'TCP_KEEPIDLE': 5, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}


class End(NamedTuple):
    """How the program of a host ended."""

    host: int
    reason: str  # '': it had nothing left to do
    follows: bool  # it ended because another one did


def supervise(command: Sequence[str], parent: int | None = None, coordinator: str | None = None) -> int:
    """Runs a host's program until it ends, or has to because another host's did.

    Args:
      command: of the program; `--supervisor` with the address of the channel is added.
      parent: the process to end with, if any.
      coordinator: host:port of the first host; where that is this machine itself, nobody else's can connect.

    Returns:
      The exit status: 0 when the run is done; when it is not, the last line of standard error says why, and on which
      host it began.
    """
    if parent is not None:
        end_with(parent)
    return _Supervisor(command, '127.0.0.1' if is_local(coordinator) else '').run()


def simulate(num_hosts: int, num_devices: int, command: Sequence[str]) -> int:
    """Runs `command` as several hosts on this machine, with CPU devices and gloo between them.

    Returns:
      0, or the exit status of the first host whose own is another.
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
            watches = [_StopWatch(host.pid) for host in hosts]
            while None in [host.poll() for host in hosts]:  # All of them are asked.
                for i, host in enumerate(hosts):
                    if watches[i].seconds() > _STOPPED_S and host.poll() is None:
                        sys.stderr.write(
                            f'error: host {i}: its supervisor was stopped for {_STOPPED_S:g} s; it is killed\n'
                        )
                        host.kill()
                if deadline is None and any(host.returncode for host in hosts):
                    deadline = time.monotonic() + _CONNECT_S
                if deadline is not None and time.monotonic() > deadline:
                    break  # One failed before the others knew of it.
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
    """Whether all hosts are on this machine, by the address of the first one."""
    return coordinator is not None and coordinator.rpartition(':')[0] in ('localhost', '127.0.0.1')


def free_port() -> int:
    """A port of this machine that a program can listen at some seconds later.

    Not one that the system would choose: those it also gives to connections that anybody opens meanwhile.

    Raises:
      OSError: None was found.
    """
    for port in secrets.SystemRandom().sample(range(20_000, 32_768), 100):
        with contextlib.suppress(OSError), socket.create_server(('', port)):
            return port
    raise OSError('no port from 20000 to 32767 is free')


def end_with(parent: int) -> None:
    """Ends this process, by SIGTERM, when its parent has ended, even by a signal that it could not handle."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name='parent watcher', daemon=True).start()


class _StopWatch:
    """For how long a process has been stopped, as by SIGSTOP; to be asked again and again."""

    def __init__(self, process: int):
        self._path = f'/proc/{process}/stat'
        self._since: float | None = None

    def seconds(self) -> float:
        try:
            with open(self._path) as file:
                state = file.read().rpartition(')')[2].split()[0]
        except OSError:  # It has ended, or there is no /proc.
            state = ''
        if state != 'T':
            self._since = None
            return 0.0
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since


class _Supervisor:
    def __init__(self, command: Sequence[str], bind: str):
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._listener = socket.create_server((bind, 0))
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours)
        with theirs:
            address = f'{theirs.fileno()},{self._listener.getsockname()[1]}'
            # In a session of its own, so that Ctrl-C reaches it once, and nothing of it is left behind.
            with stopping.deferred():
                self._program = subprocess.Popen(
                    [*command, '--supervisor', address], pass_fds=[theirs.fileno()], start_new_session=True
                )
        self._host = 0
        self._names: list[str] = []  # of all hosts, once they have met
        self._others: dict[int, Connection] = {}
        self._missing: set[int] = set()  # of the others, on host 0: those that have not connected yet
        self._greeted = threading.Lock()
        self._cause: End | None = None  # how the first host that ended too early did, of which we know
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
                deadline = time.monotonic() + _LAST_WORDS_S
                for thread in self._threads:
                    thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> End:
        """Until the program has ended."""
        self._start(self._wait, 'program')
        self._start(self._listen, 'channel')
        threading.Thread(target=self._watch_stops, name='stop watch', daemon=True).start()
        said: End | None = None
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
            elif what == 'said':
                said = End(self._host, value['reason'], value['follows'])
                self._tell(said)
            elif what == 'stopped':
                said = said or End(self._host, f'its program was stopped for {_STOPPED_S:g} s', False)
                self._tell(said)
                self._kill()
            elif what == 'host':
                self._heard(value)
            if what == 'said' or (what == 'host' and value.reason):
                if not killed and deadline is None:
                    deadline = time.monotonic() + _ENDING_S
            if what == 'ended':
                self._kill()  # What it has left behind.
                return self._end(said, killed)

    def _end(self, said: End | None, killed: bool) -> End:
        code = self._program.returncode
        if code == 0:
            return End(self._host, '', False)
        if said is not None:
            return said
        if killed:
            return End(self._host, 'it did not end by itself', True)
        if code < 0:
            reason = f'its program was killed by signal {-code} ({signal.Signals(-code).name})'
            # JAX aborts a program that does not find the other hosts, or whose first host is gone.
            aborted = -code == signal.SIGABRT
            if aborted and not self._names:
                reason += (
                    ' before it met the other hosts: start the same command on every one, each with its own --host-id, '
                    'and open the ports between them'
                )
            return End(self._host, reason, follows=aborted and len(self._names) > 1)
        return End(self._host, f'its program ended with exit status {code}', False)

    def _conclude(self, end: End) -> int:
        """Tells the others, and the person, how it ended; returns the exit status."""
        self._tell(end)  # Whoever has heard it from the program takes no notice.
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
                self._heard(value)
        if self._cause is None:
            self._print(end)
        else:
            self._print(self._cause, ' (this host ended with it; the same command on every host resumes)')
        return status

    def _print(self, end: End, more: str = '') -> None:
        host = f'host {end.host} ({self._names[end.host]})' if self._names else 'this host'
        # One write: supervisors of simulated hosts share the stream, and print() writes a line in two parts.
        sys.stderr.write(f'error: {host}: {end.reason}{more}\n')
        sys.stderr.flush()

    def _heard(self, end: End) -> None:
        if end.reason and (self._cause is None or (self._cause.follows and not end.follows)):
            self._cause = end

    def _tell(self, end: End, but: int | None = None) -> None:
        for host, connection in list(self._others.items()):
            if host != but:
                connection.send(end._asdict())

    def _kill(self) -> None:
        """Ends the program and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._program.pid, signal.SIGKILL)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait(self) -> None:
        self._program.wait()
        # What it has said last comes first.
        for thread in self._threads:
            if thread.name == 'channel':
                thread.join(2.0)
        self._events.put(('ended', None))

    def _watch_stops(self) -> None:
        watch = _StopWatch(self._program.pid)
        while watch.seconds() <= _STOPPED_S:
            if self._program.poll() is not None:
                return
            time.sleep(min(1.0, _STOPPED_S))
        self._events.put(('stopped', None))

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            self._events.put(('joined' if 'names' in message else 'said', message))

    def _connect(self, host: int, names: list[str], address: tuple[str, int], token: str) -> None:
        """Connects to the first host's supervisor, or, being that, waits for the others."""
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
                    stranger, _ = self._listener.accept()
                    # Each by itself: one that is silent holds up no other.
                    greet = functools.partial(self._greet, stranger, token, greetings)
                    threading.Thread(target=greet, name='greeting', daemon=True).start()
            except OSError as error:
                greetings.release()
                if self._listener.fileno() < 0:
                    return
                if not isinstance(error, TimeoutError):
                    time.sleep(0.1)  # As of too many connections.
            if time.monotonic() > deadline:
                for other in missing:
                    reason = f'its supervisor did not connect to that of host 0 within {_CONNECT_S:g} s'
                    self._events.put(('host', End(other, reason, False)))
                return
        self._channel.send({'connected': True})

    def _still_missing(self) -> list[int]:
        with self._greeted:
            return sorted(self._missing)

    def _greet(self, stranger: socket.socket, token: str, greetings: threading.BoundedSemaphore) -> None:
        """Finds out which host it is, if it is one of this run."""
        try:
            greeting = read_greeting(stranger) or {}
            host, said = greeting.get('host'), greeting.get('token')
            if (
                type(host) is int
                and isinstance(said, str)
                and secrets.compare_digest(said.encode(errors='replace'), token.encode())
            ):
                with self._greeted:
                    if host in self._missing:
                        self._add(host, stranger)
                        self._missing.remove(host)
                        return
            stranger.close()
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
        """Takes what another host's supervisor says until it is gone; the first host's passes it on to all."""
        has_ended = False
        while not has_ended or host == 0:
            message = connection.receive()
            if message is None:
                break
            end = End(**message)
            has_ended |= end.host == host
            self._pass_on(end, host)
        if not has_ended:
            self._pass_on(End(host, 'it is gone, or cannot be reached any more', False), host)

    def _pass_on(self, end: End, source: int) -> None:
        if self._host == 0:
            self._tell(end, but=source)
        self._events.put(('host', end))


def _status(returncode: int) -> int:
    """As a shell has it."""
    return 128 - returncode if returncode < 0 else returncode


@contextlib.contextmanager
def _signals_to(send: Callable[[int], Any]) -> Iterator[None]:
    """While active, signals to stop are handed on to programs, which end in time by themselves."""

    def handle(number: int, _: types.FrameType | None) -> None:
        send(number)

    previous = {number: signal.signal(number, handle) for number in stopping.SIGNALS}
    try:
        with stopping.critical_section():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
