"""Progress display of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_INTERVAL_S = 10.0


class ProgressLine:
    """A progress line at the bottom of a terminal, below log messages."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=None),
            TextColumn('{task.fields[text]}', markup=False),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = None
        self._replaced: list[logging.Handler] = []
        self._handler = RichHandler(console=console, show_time=False, show_path=False)

    def open(self, frames: int, total: int) -> None:
        """Shows the line and redirects log messages to above it."""
        root = logging.getLogger()
        self._replaced = [handler for handler in root.handlers if _writes_to_terminal(handler)]
        for handler in self._replaced:
            root.removeHandler(handler)
        root.addHandler(self._handler)
        self._task = self._progress.add_task('', total=total, completed=frames, text='starting ...')
        self._progress.start()

    def update(self, frames: int, total: int, rate: float, row: dict[str, float | int]) -> None:
        """Shows frames, frames per second (`rate`), and the most important metrics of `row`."""
        if self._task is not None:
            text = '  '.join(_fit_width(_phrases(frames, total, rate, row), self._console.width - 12))
            self._progress.update(self._task, completed=frames, text=text)

    def close(self) -> None:
        """Removes the line and restores the handlers of log messages."""
        self._progress.stop()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._replaced:
            root.addHandler(handler)


class PlainProgress:
    """A plain line every ten seconds, for a file, a pipe or a notebook."""

    def __init__(self, console: Console):
        self._console = console
        self._last_time = -math.inf
        self._pending: str | None = None

    def open(self, frames: int, total: int) -> None:
        """Does nothing."""

    def update(self, frames: int, total: int, rate: float, row: dict[str, float | int]) -> None:
        """Prints a line if the last one is old enough."""
        percent = f'{100 * frames / total:5.1f} %'
        self._pending = '  '.join([percent, *_phrases(frames, total, rate, row)])
        if time.monotonic() - self._last_time >= _PLAIN_INTERVAL_S:
            self._print()

    def close(self) -> None:
        """Prints the newest line, if `update` has not printed it."""
        with contextlib.suppress(OSError, ValueError):  # The reader of a pipe may have ended.
            self._print()

    def _print(self) -> None:
        if self._pending is not None:
            print(self._pending, file=self._console.file, flush=True)
            self._last_time, self._pending = time.monotonic(), None


def is_live(console: Console) -> bool:
    """Whether `ProgressLine` can redraw its line on this console."""
    return console.is_terminal and not console.is_jupyter and not console.is_dumb_terminal


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, 'stream', None)
    if stream is None:  # absl's handler wraps the one that writes.
        stream = getattr(getattr(handler, 'python_handler', None), 'stream', None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _phrases(frames: int, total: int, rate: float, row: dict[str, float | int]) -> list[str]:
    """The parts of the progress line, most important first."""
    phrases = [f'{format_number(frames)}/{format_number(total)} frames', f'{format_number(rate)} frames/s']
    if 'episode_return_last_100' in row:
        value = row['episode_return_last_100']
        phrases.append(f'return {value:.2f}' if abs(value) < 1000 else f'return {value:,.0f}')
    phrases.append(f'{format_duration((total - frames) / rate)} left' if rate > 0 else 'stalled')
    if 'policy_lag_mean' in row:
        phrases.append(f'lag {row["policy_lag_mean"]:.1f}')
    return phrases


def _fit_width(phrases: list[str], width: int) -> list[str]:
    """The longest prefix of the phrases that fits, at least one."""
    while len(phrases) > 1 and len('  '.join(phrases)) > width:
        phrases = phrases[:-1]
    return phrases


def format_number(value: float) -> str:
    """Formats a number with three significant digits and a unit, as in 12.3k."""
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= 0.9995 * size:
            return f'{value / size:.3g}{unit}' if value < 999.5 * size else f'{value / size:.0f}{unit}'
    return f'{value:.3g}' if value < 999.5 else f'{value:.0f}'


def format_duration(seconds: float) -> str:
    """Formats a duration in seconds in its two largest units, as in 3 h 05 min."""
    seconds = int(max(seconds, 0) + 0.5)
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 48:
        return f'{hours // 24} d {hours % 24} h'
    if hours:
        return f'{hours} h {minutes % 60:02d} min'
    return f'{minutes} min {seconds % 60:02d} s' if minutes else f'{seconds} s'
