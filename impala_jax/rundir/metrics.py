"""What a run writes of itself: `metrics.jsonl`, TensorBoard scalars, the progress line, `config.json`, the summary."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

from impala_jax import config as config_lib
from impala_jax.config import Config, ConfigError
from impala_jax.rundir.format import FORMAT
from impala_jax.system import program
from impala_jax.system.machine import expand_home, open_standard_streams
from impala_jax.types import StepInfo

Number = float | int | np.number


class Histogram(NamedTuple):
    """Counts between edges; an object of lists in `metrics.jsonl`."""

    edges: Sequence[float]  # N + 1
    counts: list[int]  # N


METRICS = 'metrics.jsonl'
EVALUATIONS = 'evaluations.jsonl'
SCHEDULE = 'pbt.jsonl'
RUN_CONFIG = 'config.json'
TENSORBOARD = 'tensorboard'

_logger = logging.getLogger(__name__)

_PLAIN_INTERVAL_S = 10.0
_RECENT_EPISODES = 100
_VERSIONS_OF = (
    'jax jaxlib flax optax rlax chex numpy orbax-checkpoint dm-env ale-py gymnasium dm-launchpad dm-reverb '
    'tensorflow tensorflow-cpu'
).split()


class LearnerStats:
    """Counts what batches tell beside the loss; `row` gives it and begins anew.

    Args:
      tasks: the names of a suite's tasks, which are counted apart as well; () for a single environment.
    """

    def __init__(self, tasks: Sequence[str] = ()):
        self.episodes = 0  # of the whole run
        self._recent: deque[float] = deque(maxlen=_RECENT_EPISODES)
        self._restarts = 0  # of the whole run
        self._first_version = 0
        self._row_returns: list[float] = []
        self._tasks = tasks
        self._task_recent: list[deque[float]] = [deque(maxlen=_RECENT_EPISODES) for _ in tasks]
        self._task_row_returns: list[list[float]] = [[] for _ in tasks]
        self._row_lags: list[np.ndarray] = []
        self._row_replay_lags: list[np.ndarray] = []
        self._row_wait_s = 0.0
        self._row_start = time.monotonic()

    def add_batch(
        self,
        info: StepInfo,
        lag: np.ndarray,
        num_fresh: int,
        task: np.ndarray | None = None,
        game_version: np.ndarray | None = None,
    ) -> None:
        """Counts a batch.

        Args:
          info: [T, B].
          lag: [B] updates between the parameters that acted and those that learn.
          num_fresh: the first this many of the batch are new, the others are replayed: they were counted before.
          task: [B] int32, the tasks' ids; needed where there are tasks.
          game_version: [T, B] int32, as in `Trajectory`; None: all returns count.
        """
        returns = np.asarray(info.episode_return, np.float64)[:, :num_fresh]
        did_end = np.asarray(info.episode_ended)[:, :num_fresh]
        self.episodes += int(did_end.sum())
        if game_version is not None:
            did_end = did_end & (game_version[:, :num_fresh] >= self._first_version)
        ended = returns[did_end].tolist()
        self._recent.extend(ended)
        self._row_returns.extend(ended)
        for task_id, (recent, row_returns) in enumerate(zip(self._task_recent, self._task_row_returns, strict=True)):
            own = np.asarray(task)[:num_fresh] == task_id
            ended = returns[:, own][did_end[:, own]].tolist()
            recent.extend(ended)
            row_returns.extend(ended)
        self._restarts += int(np.sum(info.restarts[:, :num_fresh]))
        self._row_lags.append(np.asarray(lag[:num_fresh]))
        if num_fresh < lag.size:
            self._row_replay_lags.append(np.asarray(lag[num_fresh:]))

    def add_wait(self, wait_s: float) -> None:
        """Counts time in which the learner waited for a batch."""
        self._row_wait_s += wait_s

    @property
    def mean_returns(self) -> list[float] | None:
        """The mean return of the last 100 episodes of each task, of a single one too; None while one has fewer."""
        windows = self._task_recent or [self._recent]
        full = all(len(recent) == _RECENT_EPISODES for recent in windows)
        return [float(np.mean(recent)) for recent in windows] if full else None

    def forget_returns(self, version: int = 0) -> None:
        """Drops all returns, and those to come of games that began with parameters older than `version`.

        Such games are still under way, or wait in the queue.
        """
        self._first_version = version
        for returns in (self._recent, self._row_returns, *self._task_recent, *self._task_row_returns):
            returns.clear()

    def row(self) -> dict[str, Number | Histogram]:
        """The counts since the last row, those of the whole run, and `learner_wait_fraction`.

        `policy_lag_mean`, `_min` and `_max` are those of new trajectories, `policy_lag_histogram` that of all. Of a
        suite there are also `episode_return/<task>`, `episode_return_last_100/<task>`, and, once each task has ended an
        episode, `suite_return_last_100`, the mean of the latter over the tasks.
        """
        now = time.monotonic()
        row: dict[str, Number | Histogram] = {'episodes': self.episodes}
        if self._row_returns:
            row['episode_return'] = float(np.mean(self._row_returns))
        if self._recent:
            row['episode_return_last_100'] = float(np.mean(self._recent))
        for name, recent, returns in zip(self._tasks, self._task_recent, self._task_row_returns, strict=True):
            if returns:
                row[f'episode_return/{name}'] = float(np.mean(returns))
            if recent:
                row[f'episode_return_last_100/{name}'] = float(np.mean(recent))
        if self._tasks and all(self._task_recent):
            row['suite_return_last_100'] = float(np.mean([np.mean(recent) for recent in self._task_recent]))
        if self._row_lags:
            lags = np.concatenate(self._row_lags)
            row |= {
                'policy_lag_mean': float(lags.mean()),
                'policy_lag_min': int(lags.min()),
                'policy_lag_max': int(lags.max()),
                'policy_lag_histogram': _lag_histogram(np.concatenate(self._row_lags + self._row_replay_lags)),
            }
        if self._row_replay_lags:
            row['replay_lag_mean'] = float(np.concatenate(self._row_replay_lags).mean())
        row['environment_restarts'] = self._restarts
        row['learner_wait_fraction'] = min(1.0, self._row_wait_s / max(now - self._row_start, 1e-9))
        self._row_returns, self._row_lags, self._row_replay_lags = [], [], []
        self._task_row_returns = [[] for _ in self._tasks]
        self._row_wait_s, self._row_start = 0.0, now
        return row

    def state(self) -> dict[str, Any]:
        """Arrays for a checkpoint, of varying length."""
        tasks = {
            str(i): {'recent': np.array(recent, np.float64), 'row_returns': np.array(returns, np.float64)}
            for i, (recent, returns) in enumerate(zip(self._task_recent, self._task_row_returns, strict=True))
        }
        return {
            **({'tasks': tasks} if tasks else {}),
            'counts': np.array([self.episodes, self._restarts], np.int64),
            'first_version': np.array(self._first_version, np.int64),
            'recent': np.array(self._recent, np.float64),
            'row_returns': np.array(self._row_returns, np.float64),
            'row_lags': _joined(self._row_lags),
            'row_replay_lags': _joined(self._row_replay_lags),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        for i in range(len(self._tasks)):
            self._task_recent[i] = deque(state['tasks'][str(i)]['recent'].tolist(), maxlen=_RECENT_EPISODES)
            self._task_row_returns[i] = state['tasks'][str(i)]['row_returns'].tolist()
        self.episodes, self._restarts = (int(count) for count in state['counts'])
        self._first_version = int(state.get('first_version', 0))  # Older checkpoints lack it.
        self._recent = deque(state['recent'].tolist(), maxlen=_RECENT_EPISODES)
        self._row_returns = state['row_returns'].tolist()
        self._row_lags = [state['row_lags']] if state['row_lags'].size else []
        self._row_replay_lags = [state['row_replay_lags']] if state['row_replay_lags'].size else []


class MetricsLogger:
    """Writes rows to `metrics.jsonl` and TensorBoard, and shows a person how far the run is.

    A terminal sees one progress line, with log messages above it; anything else a plain line every ten seconds. Use it
    as a context manager, so that the terminal is itself again whatever happens.
    """

    def __init__(self, workdir: Path, config: Config, *, console: Console | None = None):
        self._workdir = Path(workdir)
        self._total_frames = config.total_updates * config.frames_per_update
        self._console = console or Console()
        self._view = _Line(self._console) if _is_live(self._console) else _Plain(self._console)
        self._view_open = False
        self._tensorboard: _TensorBoard | None = None
        self._start = time.monotonic()
        self._last_frames = 0
        self._last_time = self._start
        self._smooth_rate: float | None = None
        self._resumed_from: int | None = None
        self._closed = False

    def __enter__(self) -> MetricsLogger:
        self._open_view()
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def resume(self, frames: int, wall_time_s: float | None = None) -> None:
        """Goes on after `frames`; call it on every start, before the first row, with 0 for a fresh one.

        Rows beyond `frames`, which the run will write again, are dropped, and so is a line that a kill has torn.

        Args:
          frames: the checkpoint's.
          wall_time_s: the checkpoint's; None takes it from the last row that is kept.
        """
        kept = drop_rows(self._workdir / METRICS, frames)
        drop_rows(self._workdir / EVALUATIONS, frames)
        recorded = kept[-1].get('wall_time_s', 0.0) if kept else 0.0
        self._last_time = time.monotonic()
        self._start = self._last_time - (recorded if wall_time_s is None else wall_time_s)
        self._last_frames = self._resumed_from = frames

    @property
    def wall_time_s(self) -> float:
        """Time the run has taken so far, over all its starts; for a checkpoint's metadata."""
        return time.monotonic() - self._start

    def write(self, row: dict[str, Number | Histogram]) -> None:
        """Writes a row, which must hold `frames`, an int; a number that is not finite is left out.

        `wall_time_s` and `frames_per_second` (since the last row) are added.
        """
        now = time.monotonic()
        frames = int(row['frames'])  # pyright: ignore[reportArgumentType]
        rate = (frames - self._last_frames) / max(now - self._last_time, 1e-9)
        self._last_frames, self._last_time = frames, now
        self._smooth_rate = rate if self._smooth_rate is None else 0.8 * self._smooth_rate + 0.2 * rate
        clock = {'wall_time_s': now - self._start, 'frames_per_second': rate}
        histograms = {name: value for name, value in row.items() if isinstance(value, Histogram)}
        finite = _finite({name: value for name, value in (row | clock).items() if name not in histograms})
        append_row(self._workdir / METRICS, finite | {name: value._asdict() for name, value in histograms.items()})
        if self._tensorboard is None:
            self._tensorboard = _TensorBoard(self._workdir / TENSORBOARD, self._resumed_from)
        self._tensorboard.write(finite, histograms)
        self._open_view()
        self._view.update(frames, self._total_frames, self._smooth_rate, finite)

    def close(self) -> None:
        """Restores the terminal and flushes everything; may be called again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._view_open:
            self._view.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _open_view(self) -> None:
        if not self._view_open:
            self._view_open = True
            atexit.register(self.close)  # for whoever forgets: a terminal without its cursor is a nuisance
            self._view.open(self._last_frames, self._total_frames)


class _TensorBoard:
    """Scalars and histograms in TensorBoard's event file; the x axis counts frames.

    tensorboardX's own SummaryWriter has a thread that a full disk kills, after which its callers wait for ever.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        # Only here, for what reads a run needs none of it.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._proto: Any = event_pb2  # Generated code, which type checkers cannot see into.
        self._summary_proto: Any = summary_pb2
        self._writer: event_file_writer.EventsWriter | None = None
        with self._reported():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
            if purge_step is not None:  # TensorBoard itself forgets what earlier files hold from there on.
                start = self._proto.SessionLog(status=self._proto.SessionLog.START)
                self._write(purge_step + 1, session_log=start)

    def write(self, row: dict[str, float | int], histograms: dict[str, Histogram]) -> None:
        with self._reported():
            if self._writer is not None:
                proto = self._summary_proto
                values = [proto.Summary.Value(tag=tag, simple_value=value) for tag, value in row.items()]
                for tag, (edges, counts) in histograms.items():
                    histogram = proto.HistogramProto(
                        min=edges[0], max=edges[-1], num=sum(counts), bucket_limit=edges[1:], bucket=counts
                    )
                    values.append(proto.Summary.Value(tag=tag, histo=histogram))
                self._write(int(row['frames']), summary=proto.Summary(value=values))
                self._writer.flush()

    def close(self) -> None:
        with self._reported():
            if self._writer is not None:
                self._writer.close()

    def _write(self, frames: int, **content: Any) -> None:
        if self._writer is not None:
            self._writer.write_event(self._proto.Event(wall_time=time.time(), step=frames, **content))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A run does not end for want of a plot: the rows are in `metrics.jsonl` as well."""
        try:
            yield
        except OSError as error:
            self._writer = None
            _logger.warning('cannot write TensorBoard events any more: %s', error)


class _Line:
    """One line at the bottom of a terminal."""

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
        root = logging.getLogger()
        self._replaced = [handler for handler in root.handlers if _writes_to_terminal(handler)]
        for handler in self._replaced:
            root.removeHandler(handler)
        root.addHandler(self._handler)
        self._task = self._progress.add_task('', total=total, completed=frames, text='starting ...')
        self._progress.start()

    def update(self, frames: int, total: int, rate: float, row: dict[str, float | int]) -> None:
        if self._task is not None:
            text = '  '.join(_fit_width(_phrases(frames, total, rate, row), self._console.width - 12))
            self._progress.update(self._task, completed=frames, text=text)

    def close(self) -> None:
        self._progress.stop()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._replaced:
            root.addHandler(handler)


class _Plain:
    """A plain line now and then, for a file, a pipe or a notebook."""

    def __init__(self, console: Console):
        self._console = console
        self._last_time = -math.inf
        self._pending: str | None = None

    def open(self, frames: int, total: int) -> None:
        pass

    def update(self, frames: int, total: int, rate: float, row: dict[str, float | int]) -> None:
        percent = f'{100 * frames / total:5.1f} %'
        self._pending = '  '.join([percent, *_phrases(frames, total, rate, row)])
        if time.monotonic() - self._last_time >= _PLAIN_INTERVAL_S:
            self._print()

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # The reader of a pipe may have gone.
            self._print()

    def _print(self) -> None:
        if self._pending is not None:
            print(self._pending, file=self._console.file, flush=True)
            self._last_time, self._pending = time.monotonic(), None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as one line, written at once.

    Raises:
      OSError: the file cannot be written.
    """
    line = json.dumps(row, allow_nan=False) + '\n'
    with path.open('ab', buffering=0) as file:
        try:
            file.write(line.encode())
        except OSError as error:
            raise OSError(error.errno, f'cannot write a row: {error.strerror}', str(path)) from error


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of its end; lines that are none (torn by a kill) are left out."""
    rows = []
    try:
        with path.open('rb') as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and line.endswith(b'\n'):
                rows.append(row)
    return rows


def drop_rows(path: Path, frames: int) -> list[dict[str, Any]]:
    """Rewrites `path` without the rows beyond `frames` and without torn lines, atomically; returns what is left."""
    rows = [row for row in read_rows(path) if row.get('frames', 0) <= frames]
    content = ''.join(json.dumps(row) + '\n' for row in rows)
    if path.exists() and path.read_bytes() != content.encode():
        write_atomically(path, content)
    return rows


def write_run_config(workdir: Path, config: Config) -> None:
    """Makes the workdir and writes `config.json`: the configuration as run, and the versions it ran with.

    Raises:
      ConfigError: the workdir cannot be written.
    """
    versions = {'python': platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    content = (
        json.dumps({'format': FORMAT, 'config': config_lib.to_dict(config), 'versions': versions}, indent=2) + '\n'
    )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(workdir) / RUN_CONFIG, content)
    except OSError as error:
        raise ConfigError(
            f'cannot write to --workdir {workdir}: {error.strerror}; give a directory that can be written'
        ) from error


def summary(workdir: Path) -> str:
    """What a run came to, in a few lines, from its files."""
    workdir = Path(workdir)
    lines = []
    rows = read_rows(workdir / METRICS)
    if rows:
        frames, wall_time_s = rows[-1]['frames'], rows[-1].get('wall_time_s', 0.0)
        lines.append(f'Trained     {frames:,} frames in {_duration(wall_time_s)}')
        episodes = rows[-1].get('episodes', 0)
        recent = [row['episode_return_last_100'] for row in rows if 'episode_return_last_100' in row]
        if recent:
            count = min(episodes, _RECENT_EPISODES)
            lines.append(f'Return      {recent[-1]:.2f}, mean of the last {count} training episode{"s"[: count != 1]}')
        else:
            lines.append('Return      no training episode has ended')
    evaluations = read_rows(workdir / EVALUATIONS)
    if evaluations:
        last = evaluations[-1]
        spread = ''.join(
            f', {label} {last[name]:.2f}'
            for name, label in (('stderr', 'standard error'), ('median_return', 'median'))
            if last.get(name) is not None
        )
        lines.append(
            f'Evaluation  {last["mean_return"]:.2f}, mean of {last["episodes"]} episodes{spread} '
            f'(at {last["frames"]:,} frames)'
        )
    lines.append(f'Files       {workdir}')
    lines.append(f'Evaluate    {program.command("evaluate")} --workdir {shlex.quote(str(workdir))} --episodes 100')
    return '\n'.join(lines)


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """Prints `summary`, unwrapped, so that its last line can be copied."""
    print(summary(workdir), file=console.file if console else sys.stdout, flush=True)


def quiet_libraries() -> None:
    """Silences the chatter of other libraries but none of their errors; call it before they are imported."""
    open_standard_streams()
    if expand_home('~') is None:
        os.environ.setdefault('KERAS_HOME', os.devnull)  # Keras, which Reverb imports, would make a folder named `~`.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # TensorFlow and XLA: errors only
    os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
    os.environ.setdefault('GLOG_minloglevel', '2')
    for name in ('absl', 'flax', 'h5py', 'jax', 'matplotlib', 'orbax', 'tensorflow'):
        logging.getLogger(name).setLevel(logging.ERROR)
    # 'No GPU/TPU found' is no news on a CPU; a GPU that is there but unused is.
    xla_bridge = logging.getLogger('jax._src.xla_bridge')
    xla_bridge.setLevel(logging.WARNING)
    xla_bridge.addFilter(_is_error_or_unused_gpu)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings('ignore', category=category)
    # Programs that are started anew (ffmpeg, a worker) are not forked copies of JAX.
    warnings.filterwarnings('ignore', message=r'os\.fork\(\) was called')
    libraries = (
        'absl ale_py chex distrax flax gym gymnasium jax jaxlib launchpad numpy optax orbax portpicker reverb rlax '
        'tensorboardX tensorflow tensorflow_probability tensorstore tree'
    ).replace(' ', '|')
    warnings.filterwarnings('ignore', module=rf'({libraries})(\.|$)')
    warnings.filterwarnings('ignore', message=r'(\x1b\[\d+m)?WARN: ')  # gymnasium, in the name of its caller
    if importlib.util.find_spec('ale_py'):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # Its banner


def _is_error_or_unused_gpu(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or 'may be present' in record.getMessage()


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_jupyter and not console.is_dumb_terminal


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, 'stream', None)
    if stream is None:  # absl's wraps the handler that writes.
        stream = getattr(getattr(handler, 'python_handler', None), 'stream', None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _phrases(frames: int, total: int, rate: float, row: dict[str, float | int]) -> list[str]:
    """The parts of the progress line, the most important first."""
    phrases = [f'{_compact(frames)}/{_compact(total)} frames', f'{_compact(rate)} frames/s']
    if 'episode_return_last_100' in row:
        value = row['episode_return_last_100']
        phrases.append(f'return {value:.2f}' if abs(value) < 1000 else f'return {value:,.0f}')
    phrases.append(f'{_duration((total - frames) / rate)} left' if rate > 0 else 'stalled')
    if 'policy_lag_mean' in row:
        phrases.append(f'lag {row["policy_lag_mean"]:.1f}')
    return phrases


def _fit_width(phrases: list[str], width: int) -> list[str]:
    """As many of the phrases as fit, at least one."""
    while len(phrases) > 1 and len('  '.join(phrases)) > width:
        phrases = phrases[:-1]
    return phrases


def _compact(value: float) -> str:
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= 0.9995 * size:
            return f'{value / size:.3g}{unit}' if value < 999.5 * size else f'{value / size:.0f}{unit}'
    return f'{value:.3g}' if value < 999.5 else f'{value:.0f}'


def _duration(seconds: float) -> str:
    seconds = int(max(seconds, 0) + 0.5)
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 48:
        return f'{hours // 24} d {hours % 24} h'
    if hours:
        return f'{hours} h {minutes % 60:02d} min'
    return f'{minutes} min {seconds % 60:02d} s' if minutes else f'{seconds} s'


def _lag_histogram(lags: np.ndarray) -> Histogram:
    """Bins 0, 1, 2-3, 4-7, 8-15 and so on, as many as there is something in."""
    edges = [0, 1]
    while edges[-1] <= lags.max():
        edges.append(2 * edges[-1])
    return Histogram(edges, np.histogram(lags, np.array(edges) - 0.5)[0].tolist())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _finite(row: dict[str, Any]) -> dict[str, float | int]:
    plain = {name: value.item() if hasattr(value, 'item') else value for name, value in row.items()}
    return {name: value for name, value in plain.items() if math.isfinite(value)}


def write_atomically(path: Path, content: str) -> None:
    """Writes a file whose readers see all of it or what was there before."""
    temporary = path.with_name(f'.{re.sub(r"[^a-z.]", "", path.name)}-{os.getpid()}')
    try:
        with temporary.open('w', encoding='utf-8', errors='backslashreplace') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
