"""What a program does when SIGTERM, SIGINT (Ctrl-C) or SIGHUP tells it to end, from its first line to its last.

Python runs signal handlers in the main thread, between two of its own instructions. While that thread is in a library,
as for the minutes that XLA compiles, nothing would happen; so a thread of this module ends a program that has not ended
by itself within `LIMIT_S`. Programs call `begin` first; nothing that takes time is imported here.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from impala_jax.system.machine import clean_up, open_standard_streams

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LIMIT_S = 6.0
"""How long a program may take to end by itself."""
_AFTERWARDS_S = 6.0  # How long it may take once what must not be cut short is done.
_TOGETHER_S = 1.0  # Ctrl-C may come twice, from the terminal and from a program between; later it is meant.
_LAST_S = 1.0  # A folder for temporary files may hang, and standard error may be a pipe that nobody reads.
_SHOW_CURSOR = '\x1b[?25h'


class Stopped(KeyboardInterrupt):
    """A signal ended what the program was doing, which had nothing to save."""

    def __init__(self, number: int):
        super().__init__(f'stopped by signal {number:d}')
        self.signal_number = number


class StopSignals:
    """While active, SIGTERM, SIGINT and SIGHUP set `stop`; the first is remembered.

    In a program that has not called `begin`, as a notebook, a second SIGINT interrupts at once. Does nothing outside
    the main thread, where Python allows no handlers.
    """

    def __init__(self, stop: threading.Event):
        self._stop = stop
        self._previous: dict[int, object] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT and _program is None:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        self._stop.set()


class _Program:
    """The state of a program that has called `begin`."""

    def __init__(self):
        self.interruptible = False
        self.over = False
        self.cause: Stopped | None = None  # It was raised.
        self.cleanups: list[Callable[[], Any]] = []
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Written to whatever the main thread is doing.
        threading.Thread(target=self._watch, args=(reader,), name='stop signals', daemon=True).start()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.over:
            return
        if not self.interruptible:
            self.end_by(number, f'stopped by signal {number:d}')
        if _is_swallowed(frame):
            threading.Timer(0.02, os.kill, (os.getpid(), number)).start()
        elif self.cause is None:  # What unwinds is not interrupted again.
            self.cause = Stopped(number)
            raise self.cause

    def _watch(self, reader: int) -> None:
        first = _next_signal(reader)
        threading.Thread(target=self._end_when_repeated, args=(reader,), name='stop signals again', daemon=True).start()
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if _num_unhurried:
                deadline = max(deadline, time.monotonic() + _AFTERWARDS_S)
        self.end_by(first, f'stopped by signal {first:d}: it had not ended by itself within {LIMIT_S:g} s')

    def _end_when_repeated(self, reader: int) -> None:
        start = time.monotonic()
        while _next_signal(reader) != signal.SIGINT or time.monotonic() < start + _TOGETHER_S:
            pass
        self.end_by(signal.SIGINT, f'stopped by signal {signal.SIGINT:d}, at once')

    def end_by(self, number: int, line: str) -> NoReturn:
        """Ends this process now, with what it would leave behind."""
        for cleanup in self.cleanups:
            with contextlib.suppress(Exception):  # Nobody is left to hear of it.
                cleanup()
        end_process(128 + number, line)


_program: _Program | None = None
_num_unhurried = 0
_lock = threading.Lock()


def begin() -> None:
    """Takes the signals over; to be called by a program before it imports anything that takes time.

    Until `interruptible`, a signal ends the program at once, for it has begun nothing. Does nothing in a worker of
    multiprocessing, which imports the program that started it: signals are that one's.
    """
    global _program
    if '__mp_main__' in sys.modules:
        return
    if _program is None and threading.current_thread() is threading.main_thread():
        open_standard_streams()
        _program = _Program()


def interruptible() -> None:
    """From here on a signal raises `Stopped` in the main thread, except within `StopSignals`."""
    if _program is not None:
        _program.interruptible = True


def cause(error: BaseException) -> Stopped | None:
    """The signal behind an error: what `Stopped` has passed through may have made another exception of it."""
    if isinstance(error, Stopped):
        return error
    return None if _program is None else _program.cause


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """What is inside is not cut short by a signal; it must be bounded by itself."""
    global _num_unhurried
    with _lock:
        _num_unhurried += 1
    try:
        yield
    finally:
        with _lock:
            _num_unhurried -= 1


def is_unhurried() -> bool:
    """Whether something that must not be cut short is under way."""
    return _num_unhurried > 0


def at_forced_end(cleanup: Callable[[], Any]) -> None:
    """Calls `cleanup`, from another thread, before a program is ended that did not end by itself."""
    if _program is not None:
        _program.cleanups.append(cleanup)


def end(status: int, line: str = '') -> NoReturn:
    """Ends the program, after a last line on standard error.

    At once: Python's own end waits for threads, and crashes under some that do not end; TensorFlow takes seconds for
    its own, and JAX waits for other hosts, also for one that is gone.
    """
    if _program is None:  # As in a test.
        if line and status == 1:
            sys.exit(line)
        sys.stderr.write(line and f'{line}\n')
        sys.exit(status)
    _program.over = True
    logging.shutdown()
    if 'multiprocessing.util' in sys.modules:
        # Semaphores are handed back, or the process that keeps account of them would have the last word.
        sys.modules['multiprocessing.util']._run_finalizers()
    end_process(status, line)


def end_process(status: int, line: str = '') -> NoReturn:
    """Ends this process without Python's own end, after a last line on standard error."""

    def say() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # A stream may be closed.
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if line and sys.stderr.isatty():
                sys.stderr.write(f'\r{_SHOW_CURSOR}')
            sys.stderr.write(line and f'{line}\n')  # In one piece: processes may share the stream.
            sys.stderr.flush()

    for action in (clean_up, say):
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        thread.join(_LAST_S)
    os._exit(status)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Programs of ours that are started inside hear signals once they listen (`begin`), and die of no earlier one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_swallowed(frame: types.FrameType | None) -> bool:
    """Whether Python would only print an exception that is raised in this frame."""
    collecting = {getattr(callback, '__code__', None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code.co_name == '__del__' or frame.f_code in collecting:
            return True
        frame = frame.f_back
    return False


def _next_signal(reader: int) -> int:
    while True:
        number = os.read(reader, 1)[0]
        if number in SIGNALS:
            return number
