"""One case from its start to its verdict: run, break, judge, repair, run again, judge."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes.supervisor import free_port

from . import faults, judge, processes, recipes
from .cases import Case
from .faults import Struck
from .judge import Bounds, End, Failure
from .processes import Program, Stopped
from .proxy import Proxy
from .recipes import Recipe

KEPT, FAILED, SKIPPED, NOT_APPLIED = 'as promised', 'failed', 'skipped', 'not applied'
"""Outcomes. `not applied`: the run ended, as it should, before the fault."""
_OVERTIME_S = 60.0  # How long a program that is too late is waited for, so that the report says how late it is.
_UNPREPARED_S = 1.0  # Before this a Python program may not have come to its own first line.
_LONG_STOP_S = 8.0
_MAX_RETURNS = 5  # How often actors that have ended are started again.


class Experiment:
    """A case, conducted.

    Args:
      case: What is run and broken.
      recipe: How.
      folder: Holds all of it; emptied first.
      slack: Multiplies the bounds.
      is_stopped: Whether the harness was told to stop.
      reference: Gives what an undisturbed run of the case learns.
    """

    def __init__(
        self,
        case: Case,
        recipe: Recipe,
        folder: Path,
        slack: float,
        is_stopped: Callable[[], bool],
        reference: Callable[[], judge.Learned] | None = None,
        bounds: Bounds | None = None,
    ):
        self.case, self.recipe, self.folder = case, recipe, folder
        self.bounds = (bounds or Bounds()).times(slack)
        self.failures: list[Failure] = []
        self.facts: dict[str, Any] = {}  # for the report
        self._slack = slack
        self._is_stopped = is_stopped
        self._reference = reference
        self._programs: list[Program] = []
        self._actors: Program | None = None
        self._actors_may_end = recipe.is_served and case.fault == 'hangs'  # They say so, and end.
        self._num_returns = 0
        self._proxy: Proxy | None = None

    def conduct(self) -> str:
        """Returns the outcome. Whatever was started is ended, and what was done to the file system is taken back."""
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._clean)
                stack.enter_context(faults.disk_of(self.case, self.recipe.folder))
                if self.recipe.actors is not None:
                    port = self.recipe.command[self.recipe.command.index('--serve-actors') + 1]
                    near = self.recipe.actors[self.recipe.actors.index('--learner') + 1].rpartition(':')[2]
                    self._proxy = Proxy(int(near), int(port))
                    stack.callback(self._proxy.close)
                    self._actors = self._start_actors()
                was_applied = self._break_and_judge()
                if self.recipe.actors is not None:
                    self._end_actors()
        finally:
            faults.release(self.folder)
        return FAILED if self.failures else KEPT if was_applied else NOT_APPLIED

    def _break_and_judge(self) -> bool:
        case, recipe = self.case, self.recipe
        switch = Path(recipe.environment['CHAOS_SWITCH'])
        if case.family == 'environment' or case.environment == 'slow':
            switch.touch()
        program = self._start('first')
        struck, since, early = self._strike(program)
        if struck is None:  # It has ended before.
            self._judge_end(program, Struck('', '', lambda: None), program.started, False, undisturbed=True)
        else:
            self.facts['fault'] = struck.what
            if case.environment == 'slow':
                switch.unlink(missing_ok=True)  # Resets that have begun go on; a run that goes on has to finish.
            lasts_s = case.lasts_s
            if case.family == 'stop' and struck.role == 'main' and lasts_s is None:
                lasts_s = _LONG_STOP_S  # There was no other process.
            if lasts_s is not None:
                self._wait(lambda: program.status is not None, lasts_s)
                struck.undo()
                since = time.monotonic()
            self._judge_end(program, struck, since, early)
        if case.family == 'disk' and struck is not None:
            struck.undo()
        was_applied = struck is not None
        switch.unlink(missing_ok=True)
        if case.family == 'damage' and struck is not None:
            was_applied = self._damage()
        self._finish()
        self._compare(struck)
        return was_applied

    # Programs.

    def _start(self, name: str) -> Program:
        program = Program(self.recipe.command, self.folder, str(self.folder), name, self.recipe.environment)
        self._programs.append(program)
        return program

    def _start_actors(self) -> Program:
        assert self.recipe.actors is not None
        name = f'actors{self._num_returns}'
        program = Program(self.recipe.actors, self.folder, f'{self.folder}/actors', name, self.recipe.environment)
        self._programs.append(program)
        return program

    def _clean(self) -> None:
        for program in self._programs:
            program.kill()

    def _wait(self, condition: Callable[[], bool], bound_s: float) -> bool:
        def looked() -> bool:
            self._look_after_actors()
            return condition()

        return processes.wait(looked, bound_s, self._is_stopped)

    def _look_after_actors(self) -> None:
        """Actors outlast the learner; those that have ended are started again, as a cluster does."""
        if self._actors is None or self._actors.status is None:
            return
        if not self._actors_may_end:
            lines = self._actors.words()[1].strip().splitlines() or ['nothing']
            seen = f'status {self._actors.status}: {lines[-1][:200]}'
            self.failures.append(Failure('actors go on', 'actors that look for the learner again', seen))
        self._actors_may_end = False
        self._num_returns += 1
        if self._num_returns > _MAX_RETURNS:
            self._actors = None
        else:
            self._actors = self._start_actors()

    # The fault.

    def _strike(self, program: Program) -> tuple[Struck | None, float, bool]:
        """What was broken (None: the program had ended), when, and whether too early for a program to be prepared."""
        case = self.case
        if case.family == 'environment':
            sign = Path(f'{self.recipe.environment["CHAOS_SWITCH"]}.struck')
            self._wait(lambda: program.status is not None or sign.exists(), self.bounds.finish_s)
            struck = Struck('', case.kind, lambda: None) if sign.exists() else None
            return struck, time.monotonic(), False
        if not self._wait(lambda: program.status is not None or self._has_come(program), self.bounds.finish_s):
            self.failures.append(Failure('goes on', f'{case.moment} within {self.bounds.finish_s:.0f} s', 'nothing'))
        self._wait(lambda: program.status is not None, case.delay_s if case.moment != 'start' else 0)
        if program.status is not None:
            return None, 0.0, False
        role_of_actors = case.target == 'actors'
        self._actors_may_end = role_of_actors and case.family != 'stop'
        actors = self._actors
        struck = faults.strike(case, self.recipe, program, actors, self._proxy)
        now = time.monotonic()
        self.facts['after_start_s'] = round(now - program.started, 2)
        if role_of_actors and actors is not None and case.family != 'stop':
            self._judge_actors(actors, struck, now)
        return struck, now, now - program.started < _UNPREPARED_S * self._slack

    def _has_come(self, program: Program) -> bool:
        """Whether the case's moment has come; after the start, with its delay."""
        recipe = self.recipe
        if self.case.moment == 'start':
            return time.monotonic() - program.started >= self.case.delay_s
        if self.case.moment == 'row':
            return judge.has_rows(recipe)
        if self.case.moment == 'half':
            return judge.has_rows(recipe, recipe.total_frames // 2)
        steps = [step for run in recipe.runs for step in judge.saved_steps(run)]
        return max(steps, default=-1) >= (recipe.num_updates if self.case.moment == 'evaluation' else 0)

    # The verdicts.

    def _judge_end(
        self, program: Program, struck: Struck, since: float, early: bool, undisturbed: bool = False
    ) -> None:
        """Waits for the program's end, and judges it, what it leaves, and its files."""
        case, recipe, bounds = self.case, self.recipe, self.bounds
        expected = judge.expected(case, recipe, struck.role, bounds)
        if struck.role == 'actors' or undisturbed:
            expected = judge.Expected((), bounds.finish_s, must_finish=True)
        handled = case.family in ('signal', 'kill') and struck.role == 'main'
        limit_s = max(expected.within_s + _OVERTIME_S * self._slack, 0.0 if handled else bounds.finish_s)
        self._wait(lambda: program.status is not None, limit_s)
        after_s = time.monotonic() - since
        status = program.status
        self.facts |= {'status': status, 'ended_after_s': round(after_s, 2)}
        if status is None:
            self.facts['processes'] = [str(process) for process in processes.marked(program.mark)]
            program.kill()
        end = End(status, after_s, program.words()[1], judge.is_finished(recipe), early)
        self._add(judge.end(end, expected, self._own_traceback), program)
        if not (case.is_again_at_once and status == -signal.SIGKILL):  # Else they are looked for after the second run.
            self._judge_leftovers(program, with_files=status not in (None, -signal.SIGKILL))
        if case.fault not in ('removed', 'replaced by a file') or undisturbed:
            torn = case.family in ('kill', 'stop', 'damage', 'disk') or status is None or status < 0
            self._add(judge.files(recipe, torn), program)
            if case.family == 'signal' and status is not None and status > 0 and recipe.saves and not undisturbed:
                self._add(judge.saved(recipe), program)

    @property
    def _own_traceback(self) -> bool:
        return self.case.family == 'environment'

    def _judge_leftovers(self, program: Program, with_files: bool = True) -> None:
        bound_s = self.bounds.leftovers_s
        self._wait_slowly(lambda: not processes.marked(program.mark), bound_s)
        left = processes.end_all(program.mark)
        files = sorted(program.temporary.iterdir()) if with_files else []
        self._add(judge.leftovers(left, files, bound_s), program)

    def _wait_slowly(self, condition: Callable[[], bool], bound_s: float) -> bool:
        return processes.wait(condition, bound_s, self._is_stopped, poll_s=0.5)

    def _damage(self) -> bool:
        """Damages checkpoints between two starts; returns whether there were enough of them."""
        count, restore = faults.damage(self.case, self.recipe, self.folder / 'good')
        self.facts['fault'] = f'{count} checkpoints {self.case.fault}'
        if not count:
            return False
        if self.case.target == 'newest':
            return True  # It is passed over when the same command is started again.
        program = self._start('damaged')
        since = time.monotonic()
        self._wait(lambda: program.status is not None, self.bounds.failure_s + _OVERTIME_S * self._slack)
        end = End(program.status, time.monotonic() - since, program.words()[1], False)
        program.kill()
        expected = judge.Expected((1,), self.bounds.failure_s, reason=r'no checkpoint in .* is good|cell .*')
        self._add(judge.end(end, expected), program)
        self._judge_leftovers(program)
        restore()
        return True

    def _finish(self) -> None:
        """The same command again has to end with a finished run."""
        kept = judge.kept_rows(self.recipe)
        program = self._start('again')
        limit_s = self.bounds.finish_s + _OVERTIME_S * self._slack
        self._wait(lambda: program.status is not None, limit_s)
        status, after_s = program.status, time.monotonic() - program.started
        self.facts['again'] = {'status': status, 'after_s': round(after_s, 2)}
        if status is None:
            self.facts['again']['processes'] = [str(process) for process in processes.marked(program.mark)]
            program.kill()
        if status is None or after_s > self.bounds.finish_s:
            seen = f'{"it had to be killed" if status is None else f"status {status}"} after {after_s:.0f} s'
            self._add([Failure('the same command finishes', f'within {self.bounds.finish_s:.0f} s', seen)], program)
        elif status != 0:
            last = (program.words()[1].strip().splitlines() or ['nothing'])[-1]
            seen = f'status {status}: {last[:300]}'
            self._add([Failure('the same command finishes', 'status 0', seen)], program)
        self._add(judge.words(program.words()[1], status or 0, None), program)
        self._judge_leftovers(program)
        if status == 0:
            self._add(judge.finished(self.recipe), program)
            self._add(judge.files(self.recipe, torn=False), program)
            self._add(judge.goes_on(kept, self.recipe), program)

    def _compare(self, struck: Struck | None) -> None:
        """Lockstep: equal to a run that nothing disturbs, unless environments were lost or cannot be saved."""
        case = self.case
        lost = struck is not None and struck.role == 'environment' and case.family in ('kill', 'stop')
        if self._reference is None or self.failures or case.family == 'environment' or lost:
            return
        if case.environment == 'dmlab' and struck is not None:
            return
        now = judge.learned(self.recipe)
        self._add(judge.same(self._reference(), now, with_rows=case.fault != 'removed'), self._programs[-1])
        self.facts['compared'] = True

    def _judge_actors(self, actors: Program, struck: Struck, since: float) -> None:
        expected = judge.expected(self.case, self.recipe, struck.role, self.bounds)
        limit_s = expected.within_s + _OVERTIME_S * self._slack
        processes.wait(lambda: actors.status is not None, limit_s, self._is_stopped)
        self._judge_end_of_actors(actors, since, expected)

    def _judge_end_of_actors(self, actors: Program, since: float, expected: judge.Expected) -> None:
        end = End(actors.status, time.monotonic() - since, actors.words()[1], False)
        self.facts['actors'] = {'status': end.status, 'ended_after_s': round(end.after_s, 2)}
        self._add(judge.end(end, expected), actors)
        if end.status is None:
            actors.kill()
        self._judge_leftovers(actors, with_files=end.status not in (None, -signal.SIGKILL))

    def _end_actors(self) -> None:
        """When the run is finished."""
        if self._actors is None or self._actors.status is not None:
            return
        actors, self._actors = self._actors, None
        since = time.monotonic()
        actors.signal(signal.SIGTERM)
        expected = judge.Expected((128 + signal.SIGTERM,), self.bounds.signal_s, reason=r'(?i)stopped|signal')
        processes.wait(
            lambda: actors.status is not None, expected.within_s + _OVERTIME_S * self._slack, self._is_stopped
        )
        self._judge_end_of_actors(actors, since, expected)

    def _add(self, failures: list[Failure], program: Program) -> None:
        self.failures += [
            failure._replace(promise=f'{failure.promise} ({program.stderr.stem})') for failure in failures
        ]

    def tails(self, num_lines: int = 30) -> str:
        """The last lines of all that was written."""
        parts = []
        for program in self._programs:
            command = shlex.join([sys.executable, *program.command])
            parts.append(f'--- {program.stderr.stem}: {command}')
            for text in program.words():
                parts += text.rstrip().splitlines()[-num_lines:]
        return '\n'.join(parts)


class References:
    """What undisturbed runs learn, computed once per configuration, code and Python."""

    def __init__(self, folder: Path, is_stopped: Callable[[], bool]):
        self._folder = folder
        self._is_stopped = is_stopped
        self._lock = threading.Lock()

    def of(self, case: Case, slack: float) -> judge.Learned:
        """Raises RuntimeError if an undisturbed run fails."""
        draft = recipes.recipe(case, Path('/case'), slack, free_port)
        content = repr((draft.command, code_version(), sys.version_info[:2]))
        folder = self._folder / hashlib.sha256(content.encode()).hexdigest()[:16]
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            recipe = recipes.recipe(case, folder, slack, free_port)
            if not (folder / 'done').exists():
                shutil.rmtree(recipe.folder, ignore_errors=True)
                recipe.prepare()
                program = Program(recipe.command, folder, str(folder), 'reference', recipe.environment)
                try:
                    limit_s = 2 * Bounds().finish_s * slack
                    processes.wait(lambda: program.status is not None, limit_s, self._is_stopped)
                    if program.status != 0:
                        raise RuntimeError(f'an undisturbed run ends with {program.status}: {program.words()[1]}')
                finally:
                    program.kill()
                (folder / 'done').touch()
            return judge.learned(recipe)


def conduct(
    case: Case, folder: Path, references: References, slack: float, is_stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Conducts a case; returns its verdict, as a row of results. Raises `Stopped`."""
    began = time.monotonic()
    verdict: dict[str, Any] = {'seed': case.seed, 'line': case.line, 'kind': case.kind, 'runtime': case.runtime}
    verdict |= {'environment': case.environment, 'slack': slack, 'failures': []}
    clear(folder)
    folder.mkdir(parents=True)
    reason = faults.missing(case, folder)
    if reason is not None:
        shutil.rmtree(folder)
        return verdict | {'outcome': SKIPPED, 'reason': reason}
    recipe = recipes.recipe(case, folder, slack, free_port)
    recipe.prepare()
    reference = (lambda: references.of(case, slack)) if recipe.repeats else None
    experiment = Experiment(case, recipe, folder, slack, is_stopped, reference)
    outcome = experiment.conduct()
    verdict |= {'outcome': outcome, 'failures': [failure._asdict() for failure in experiment.failures]}
    verdict |= experiment.facts | {'seconds': round(time.monotonic() - began, 1)}
    if outcome == FAILED:
        verdict['output'] = experiment.tails()
    else:
        shutil.rmtree(folder)
    return verdict


def clear(folder: Path) -> None:
    """Removes a case's folder, and what an earlier experiment that was killed has left running in it."""
    if folder.exists():
        faults.release(folder)
        for mark in (str(folder), f'{folder}/actors'):
            processes.end_all(mark)
        shutil.rmtree(folder)


__all__ = ['FAILED', 'KEPT', 'NOT_APPLIED', 'SKIPPED', 'Experiment', 'References', 'Stopped', 'clear', 'conduct']
