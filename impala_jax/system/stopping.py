"""Reaction of a program to SIGTERM, SIGINT (Ctrl-C) and SIGHUP, from its first line to its last.

Python runs signal handlers in the main thread, between two bytecode instructions. While that thread executes library
code, for example during minutes of XLA compilation, handlers do not run. A thread of this module therefore ends a
program that has not exited by itself within `LIMIT_S`. Programs call `begin` first, so this module imports nothing that
takes time.
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
"""Time that a program has to exit by itself after a signal, in seconds."""
_AFTERWARDS_S = 6.0  # Time to exit after a critical section.
_TOGETHER_S = 1.0  # Ctrl-C may arrive twice, from the terminal and from a parent; a later one is intended.
_LAST_S = 1.0  # Removing temporary files may hang, and standard error may be a pipe without a reader.
_SHOW_CURSOR = '\x1b[?25h'


class Stopped(KeyboardInterrupt):
    """A signal interrupted the program while it had nothing to save."""

    def __init__(self, number: int):
        super().__init__(f'stopped by signal {number:d}')
        self.signal_number = number


class StopSignals:
    """Context manager in which SIGTERM, SIGINT and SIGHUP set `stop`; `received` is the first signal.

    In a program that has not called `begin`, such as a notebook, a second SIGINT raises KeyboardInterrupt at once.
    Outside the main thread, where Python does not allow signal handlers, it has no effect.

    Args:
      stop: Event that a signal sets.
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
        self.cause: Stopped | None = None  # the exception that was raised
        self.cleanups: list[Callable[[], Any]] = []
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # works in any state of the main thread
        threading.Thread(target=self._watch, args=(reader,), name='stop signals', daemon=True).start()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.over:
            return
        if not self.interruptible:
            self.end_by(number, f'stopped by signal {number:d}')
        if _is_swallowed(frame):
            threading.Timer(0.02, os.kill, (os.getpid(), number)).start()
        elif self.cause is None:  # The unwinding of an exception is not interrupted again.
            self.cause = Stopped(number)
            raise self.cause

    def _watch(self, reader: int) -> None:
        first = _next_signal(reader)
        threading.Thread(target=self._end_when_repeated, args=(reader,), name='stop signals again', daemon=True).start()
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if _num_critical_sections:
                deadline = max(deadline, time.monotonic() + _AFTERWARDS_S)
        self.end_by(first, f'stopped by signal {first:d}: it had not exited by itself within {LIMIT_S:g} s')

    def _end_when_repeated(self, reader: int) -> None:
        start = time.monotonic()
        while _next_signal(reader) != signal.SIGINT or time.monotonic() < start + _TOGETHER_S:
            pass
        self.end_by(signal.SIGINT, f'stopped by signal {signal.SIGINT:d}, at once')

    def end_by(self, number: int, line: str) -> NoReturn:
        """Runs the cleanups and ends this process immediately."""
        for cleanup in self.cleanups:
            with contextlib.suppress(Exception):  # It could not be reported anymore.
                cleanup()
        end_process(128 + number, line)


_program: _Program | None = None
_num_critical_sections = 0
_lock = threading.Lock()


def begin() -> None:
    """Installs the signal handlers; to be called by a program before it imports anything that takes time.

    Until `interruptible` is called, a signal ends the program at once, because it has not started any work. In workers
    of multiprocessing, which import the main program, it has no effect: the main program handles signals.
    """
    global _program
    if '__mp_main__' in sys.modules:
        return
    if _program is None and threading.current_thread() is threading.main_thread():
        open_standard_streams()
        _program = _Program()


def interruptible() -> None:
    """Makes signals raise `Stopped` in the main thread from now on, except within `StopSignals`."""
    if _program is not None:
        _program.interruptible = True


def cause(error: BaseException) -> Stopped | None:
    """Returns the `Stopped` that led to an error, also if other code has converted it to a different exception."""
    if isinstance(error, Stopped):
        return error
    return None if _program is None else _program.cause


@contextlib.contextmanager
def critical_section() -> Iterator[None]:
    """Context manager for work that the time limit after a signal must not cut short; it must have its own limit."""
    global _num_critical_sections
    with _lock:
        _num_critical_sections += 1
    try:
        yield
    finally:
        with _lock:
            _num_critical_sections -= 1


def in_critical_section() -> bool:
    """Whether any thread is in a `critical_section`."""
    return _num_critical_sections > 0


def at_forced_end(cleanup: Callable[[], Any]) -> None:
    """Registers a function to call, from another thread, if the program must be ended by force."""
    if _program is not None:
        _program.cleanups.append(cleanup)


def end(status: int, line: str = '') -> NoReturn:
    """Ends the program immediately, after a last line on standard error.

    Python's normal exit waits for threads and crashes if some of them do not end. TensorFlow takes seconds to shut
    down, and JAX waits for other hosts even if they have died.

    Args:
      status: Exit status.
      line: Last line to write; empty for none.
    """
    if _program is None:  # for example in tests
        if line and status == 1:
            sys.exit(line)
        sys.stderr.write(line and f'{line}\n')
        sys.exit(status)
    _program.over = True
    _limited(_release)
    end_process(status, line)


def end_process(status: int, line: str = '') -> NoReturn:
    """Ends this process without Python's normal exit, after a last line on standard error."""

    def write_line() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # The stream may be closed.
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if line and sys.stderr.isatty():
                sys.stderr.write(f'\r{_SHOW_CURSOR}')
            sys.stderr.write(line and f'{line}\n')  # in one call, because other processes may write to the stream
            sys.stderr.flush()

    for action in (clean_up, write_line):
        _limited(action)
    os._exit(status)


def _release() -> None:
    logging.shutdown()
    if 'multiprocessing.util' in sys.modules:
        # Releases semaphores; otherwise the resource tracker would print a warning after the last line.
        sys.modules['multiprocessing.util']._run_finalizers()


def _limited(action: Callable[[], None]) -> None:
    """Calls a function of a program that ends, but does not wait long for it: a lock or a full pipe may block it."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_LAST_S)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Context manager for starting programs that call `begin`: signals that arrive before that are deferred to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_swallowed(frame: types.FrameType | None) -> bool:
    """Whether Python would print and ignore an exception raised in this frame."""
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
