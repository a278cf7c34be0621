"""What is promised, and whether it was kept."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cases import SIGNALS, Case
from .processes import Process
from .recipes import Recipe

_TIMES = ('wall_time_s', 'frames_per_second', 'learner_wait_fraction')
_CRASHES = ('Fatal Python error', 'Segmentation fault', 'terminate called', 'core dumped')
_DISK = r'(?i)disk is full|no space left|cannot|not permitted|permission denied|no such file|not a directory|read-only'


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How long things may take, s."""

    signal_s: float = 10.0  # from a signal that is handled to the end
    leftovers_s: float = 30.0  # from the end until nothing is left
    failure_s: float = 60.0  # from a failure to the end, where nobody has to wait for a time-out
    finish_s: float = 150.0  # a whole run

    def times(self, slack: float) -> Bounds:
        """For a machine that is slower, or does other work too."""
        return Bounds(*(slack * value for value in dataclasses.astuple(self)))


class Failure(NamedTuple):
    """A promise that was not kept."""

    promise: str
    expected: str
    seen: str


class Expected(NamedTuple):
    """How a program may end after a fault."""

    statuses: tuple[int, ...]  # Besides 0 of a run that is finished
    within_s: float  # of the fault, if it is not finished
    must_finish: bool = False
    reason: str | None = None  # What the last line matches; None: there need not be one.


class End(NamedTuple):
    """How a program did end."""

    status: int | None  # As `subprocess`; None: it had to be killed.
    after_s: float  # the fault
    stderr: str
    is_finished: bool  # by its files
    early: bool = False  # The fault came before a program can have prepared for it.


def expected(case: Case, recipe: Recipe, role: str, bounds: Bounds) -> Expected:
    """What is promised after a fault that hit a process of this role ('' for none)."""
    number = signal.Signals[case.fault] if case.family in ('signal', 'kill', 'stop') else None
    if case.family == 'signal' and role in ('main', 'actors'):
        assert number is not None
        return Expected((128 + number,), bounds.signal_s, reason=r'(?i)stopped|signal|interrupted')
    if case.family == 'kill' and role in ('main', 'actors') or case.family == 'damage':
        return Expected((-signal.SIGKILL,), bounds.signal_s)
    if case.family in ('signal', 'kill'):
        if role == 'environment':
            return Expected((), bounds.finish_s, must_finish=True)
        assert number is not None
        words = rf'(?i){number.name}|signal {int(number)}\b|killed|stopped|died|ended'
        # Simulated hosts hand on the status of the one that was killed.
        statuses = (1,) if case.family == 'kill' and case.runtime != 'pod' else (1, 128 + number)
        # Members of a population end alone, and the others go on.
        within_s = bounds.finish_s if case.runtime == 'pbt' else bounds.failure_s
        return Expected(statuses, within_s, reason=words)
    if case.family == 'stop':
        if case.lasts_s is not None or role == 'main':
            return Expected((), bounds.finish_s, must_finish=True)
        return Expected((1,), bounds.failure_s + recipe.patience_s, reason=r'(?i)waited|answer|stopped|failed|gone')
    if case.family == 'disk':
        return Expected((1,), bounds.finish_s if case.runtime == 'pbt' else bounds.failure_s, reason=_DISK)
    if case.fault == 'hangs' and not recipe.is_served:
        return Expected((1,), bounds.failure_s + recipe.patience_s, reason=r'waited .* for the worker')
    if case.family == 'connection' or case.target == 'once':
        return Expected((), bounds.finish_s, must_finish=True)
    assert case.family == 'environment'
    within_s = bounds.finish_s if case.runtime == 'pbt' else bounds.failure_s
    return Expected((1,), within_s, reason=r'(?i)environment|emulator')


def end(end: End, expected: Expected, own_traceback: bool = False) -> list[Failure]:
    """Judges status, duration and last words.

    Args:
      own_traceback: An environment has raised, and its traceback is shown.
    """
    failures = []
    if end.status is None or (end.status != 0 and end.after_s > expected.within_s):
        how = 'it had to be killed' if end.status is None else f'it ended with status {end.status}'
        failures.append(
            Failure('ends within its bound', f'within {expected.within_s:.0f} s', f'after {end.after_s:.1f} s {how}')
        )
    if end.status is None:
        return failures
    if end.status == 0:
        if not end.is_finished:
            wanted = ' or '.join(map(str, expected.statuses))
            failures.append(Failure('status', f'{wanted or "another"}, as the run is not finished', '0'))
    elif expected.must_finish:
        failures.append(Failure('goes on', 'status 0, with the run finished', f'status {end.status}'))
    elif end.status not in expected.statuses and not (end.early and end.status < 0):
        wanted = ' or '.join(map(str, expected.statuses))
        failures.append(Failure('status', wanted, str(end.status)))
    silent = end.early and end.status < 0
    return failures + words(end.stderr, end.status, None if silent else expected.reason, own_traceback)


def words(stderr: str, status: int, reason: str | None, own_traceback: bool = False) -> list[Failure]:
    """Judges what a program has said."""
    failures = []
    lines = stderr.rstrip().splitlines()
    crashes = [line for line in lines if any(crash in line for crash in _CRASHES)]
    if crashes:
        failures.append(Failure('no crash', 'no message of a crash', crashes[0]))
    tracebacks = sum(line.startswith('Traceback (most recent') for line in lines)
    if tracebacks and not own_traceback:
        raised = next((line for line in lines if re.match(r'[\w.]+(Error|Interrupt|Exception|Failure)\b', line)), '')
        failures.append(Failure('one line, no traceback', 'no traceback', f'{tracebacks}, the first of {raised!r}'))
    if status in (0, -signal.SIGKILL):
        return failures
    last = lines[-1] if lines else ''
    if reason is not None and not (last[:1].strip() and re.search(reason, last)):
        failures.append(Failure('the last line says why', f'a line that matches {reason}', repr(last[:300])))
    return failures


def leftovers(left: Sequence[Process], files: Sequence[Path], bound_s: float) -> list[Failure]:
    """Judges what is there after the end."""
    failures = []
    if left:
        seen = '; '.join(map(str, left[:6])) + (f'; and {len(left) - 6} more' if len(left) > 6 else '')
        failures.append(Failure('nothing is left', f'no process {bound_s:.0f} s after the end', seen))
    if files:
        seen = ', '.join(str(path.name) for path in files[:6])
        failures.append(Failure('nothing is left', 'no file in the temporary folder', seen))
    return failures


def files(recipe: Recipe, torn: bool) -> list[Failure]:
    """Judges the files of each run.

    Args:
      torn: Whether the last line of a file may be incomplete, as after a kill.
    """
    failures = []
    for run in recipe.runs:
        name = '' if run == recipe.folder else f'{run.relative_to(recipe.folder)}/'
        for file, strictly in (('metrics.jsonl', True), ('evaluations.jsonl', False), ('pbt.jsonl', False)):
            for text in _row_faults(run / file, recipe.total_frames, strictly, torn):
                failures.append(Failure('files are valid and monotone', f'good rows in {name}{file}', text))
        for file in (run / 'config.json', run / 'done.json'):
            if file.exists() and not _is_json(file):
                failures.append(Failure('files are valid and monotone', f'JSON in {name}{file.name}', 'something else'))
        for path in sorted(path for pattern in ('checkpoints/*', '**/replay/*') for path in run.glob(pattern)):
            text = _damage_of(path) if path.name.isdecimal() else ''
            if text:
                where = path.relative_to(run)
                failures.append(Failure('files are valid and monotone', f'{name}{where} is good', text))
    return failures


def saved(recipe: Recipe) -> list[Failure]:
    """Judges, after a stop that was asked for, that the checkpoint has all that the rows tell of."""
    failures = []
    for run in recipe.runs:
        rows = _rows(run / 'metrics.jsonl')
        if not rows or (run / 'done.json').exists():
            continue
        last = rows[-1].get('learner_steps', 0)
        steps = saved_steps(run)
        if not steps or steps[-1] < last:
            seen = f'the last row of {run.name} is at update {last}, the checkpoints at {steps}'
            failures.append(Failure('a stopped run is saved', f'a checkpoint at update {last} or later', seen))
    return failures


def finished(recipe: Recipe) -> list[Failure]:
    """Judges that each run has all of its frames, and was evaluated."""
    if recipe.is_sweep and not (recipe.folder / 'results.csv').exists():
        return [Failure('no frames are lost', 'results.csv', 'there is none')]
    failures = []
    if len(recipe.runs) != recipe.num_runs:
        failures.append(Failure('no frames are lost', f'{recipe.num_runs} runs', f'{len(recipe.runs)}'))
    for run in recipe.runs:
        for file in ('metrics.jsonl', 'evaluations.jsonl'):
            rows = _rows(run / file)
            last = rows[-1].get('frames') if rows else None
            if last != recipe.total_frames:
                wanted = f'a last row at {recipe.total_frames} frames'
                failures.append(Failure('no frames are lost', wanted, f'{run.name}/{file} ends at {last}'))
        if recipe.saves and not recipe.is_sweep and saved_steps(run)[-1:] != [recipe.num_updates]:
            seen = f'{run.name} has {saved_steps(run)}'
            failures.append(Failure('no frames are lost', f'a checkpoint at update {recipe.num_updates}', seen))
        temporary = [path.name for path in (run / 'checkpoints').glob('.temporary-*')]
        if temporary:
            failures.append(Failure('nothing is left', 'no partial checkpoint', ', '.join(temporary)))
    return failures


def is_finished(recipe: Recipe) -> bool:
    """Whether the files say that the command has nothing left to do."""
    return not finished(recipe)


def goes_on(before: dict[Path, list[dict[str, Any]]], recipe: Recipe) -> list[Failure]:
    """Judges that the rows before the checkpoint that was resumed are still there.

    Args:
      before: What `kept_rows` gave before the command was started again.
    """
    failures = []
    for run, rows in before.items():
        now = _rows(run / 'metrics.jsonl')[: len(rows)]
        if now != rows:
            at = next((i for i, (a, b) in enumerate(zip(rows, now, strict=False)) if a != b), len(now))
            seen = f'row {at} of {len(rows)} in {run.name} is another one'
            failures.append(Failure('the same command goes on', 'the rows up to the checkpoint stay', seen))
    return failures


def kept_rows(recipe: Recipe) -> dict[Path, list[dict[str, Any]]]:
    """The rows of each run up to its newest good checkpoint, of one that saves none all rows."""
    kept = {}
    for run in recipe.runs:
        if not recipe.saves:
            kept[run] = _rows(run / 'metrics.jsonl')
            continue
        steps = saved_steps(run)
        good = [step for step in steps[-3:] if not _damage_of(run / 'checkpoints' / f'{step:09d}')]
        if good and not (run / 'done.json').exists():
            kept[run] = [row for row in _rows(run / 'metrics.jsonl') if row.get('learner_steps', 0) <= good[-1]]
    return kept


class Learned(NamedTuple):
    """What a run that repeats bit for bit has to repeat."""

    rows: dict[str, list[dict[str, Any]]]  # by the run's name, without times
    parameters: dict[str, dict[str, np.ndarray]]  # of its last checkpoint, by the leaf's path
    table: str  # of a sweep


def learned(recipe: Recipe) -> Learned:
    """What there is to compare of a finished program."""
    from impala_jax.rundir import checkpoint

    rows, parameters = {}, {}
    for run in recipe.runs:
        rows[run.name] = [
            {name: value for name, value in row.items() if name not in _TIMES} for row in _rows(run / 'metrics.jsonl')
        ]
        if saved_steps(run):
            state = checkpoint.restore(run, {'learner': None}).state
            parameters[run.name] = dict(_leaves(state, ''))
    table = recipe.folder / 'results.csv'
    return Learned(rows, parameters, table.read_text() if table.exists() else '')


def same(reference: Learned, now: Learned, with_rows: bool = True) -> list[Failure]:
    """Judges that both are equal bit for bit."""
    promise, wanted = 'bit for bit', 'as a run that nothing disturbs'
    if with_rows and now.rows != reference.rows:
        for run, rows in reference.rows.items():
            mine = now.rows.get(run, [])
            for i, (a, b) in enumerate(zip(rows, mine, strict=False)):
                if a != b:
                    names = [name for name in a if a.get(name) != b.get(name)] + [name for name in b if name not in a]
                    seen = f'row {i} of {run} differs in {", ".join(names[:5])}'
                    return [Failure(promise, wanted, seen)]
        return [Failure(promise, wanted, 'another number of rows')]
    if with_rows and now.table != reference.table:
        return [Failure(promise, wanted, 'results.csv differs')]
    if now.parameters.keys() != reference.parameters.keys():
        return [Failure(promise, wanted, f'checkpoints of {sorted(now.parameters)}')]
    for run, leaves in reference.parameters.items():
        mine = now.parameters[run]
        if mine.keys() != leaves.keys():
            return [Failure(promise, wanted, f'{run} has other leaves')]
        for name, leaf in leaves.items():
            if not (
                leaf.dtype == mine[name].dtype and np.array_equal(leaf, mine[name], equal_nan=leaf.dtype.kind == 'f')
            ):
                return [Failure(promise, wanted, f'{name} of {run} differs')]
    return []


def saved_steps(run: Path) -> list[int]:
    """The updates of a run's checkpoints, good or not, ascending."""
    try:
        return sorted(int(path.name) for path in (run / 'checkpoints').iterdir() if path.name.isdecimal())
    except OSError:
        return []


def _damage_of(path: Path) -> str:
    from impala_jax.rundir import checkpoint_format

    try:
        checkpoint_format.load(path, checkpoint_format.verify(path))
    except checkpoint_format.Damaged as error:
        return str(error)
    return ''


def num_restarts(recipe: Recipe) -> float:
    """How often environments were built again, as the last rows tell."""
    return sum(rows[-1].get('environment_restarts', 0) for run in recipe.runs if (rows := _rows(run / 'metrics.jsonl')))


def has_rows(recipe: Recipe, frames: int = 0) -> bool:
    """Whether a run has a row of so many frames."""
    return any(
        rows and rows[-1].get('frames', 0) >= frames for run in recipe.runs for rows in [_rows(run / 'metrics.jsonl')]
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and line.endswith(b'\n'):
            rows.append(row)
    return rows


def _row_faults(path: Path, total_frames: int, strictly: bool, torn: bool) -> list[str]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    faults, before = [], -1
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not line.endswith(b'\n'):
                raise ValueError
            frames = row['frames']
        except (ValueError, TypeError, KeyError):
            if not (torn and i == len(lines) - 1):
                faults.append(f'line {i + 1} of {len(lines)} is torn: {line[:80]!r}')
            continue
        if frames < before or (strictly and frames == before):
            faults.append(f'line {i + 1}: {frames} frames after {before}')
        if frames > total_frames:
            faults.append(f'line {i + 1}: {frames} frames of {total_frames}')
        before = frames
    return faults[:3]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (ValueError, OSError):
        return False
    return True


def _leaves(tree: Any, path: str) -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in _leaves(tree[name], f'{path}/{name}')]
    return [(path, np.asarray(tree))]


assert set(SIGNALS) == {'SIGTERM', 'SIGINT', 'SIGHUP'}  # What `expected` gives 128 + n for.
