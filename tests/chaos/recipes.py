"""Which command a case starts, what it leaves in which folder, and how many frames it has to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.helpers.programs import ROOT, STAND_INS

from .cases import Case

_BATCH, _UNROLL = 4, 10
_SMALL = (
    f'--learner.batch-size {_BATCH} --learner.unroll-length {_UNROLL} --learner.num-devices 1 --network.torso mlp '
    '--network.mlp-sizes 16 --evaluator.num-envs 4 --checkpoint.interval-s 0.7 --logging.interval-s 0.5 '
    '--logging.interval-updates 10'
).split()
# Updates that take some seconds, and games that take two.
_UPDATES = {'catch': 1000, 'steady': 250, 'children': 250, 'slow': 100, 'dmlab': 50}
_LONG_EVALUATION = {'catch': 4000, 'steady': 800, 'children': 800, 'slow': 100, 'dmlab': 100}
_CELLS = 3

_GRID = """
import dataclasses
from impala_jax.studies.ablation import Grid
from impala_jax.cli.command_line import load_config_file


def get_grid():
    return Grid({{'catch': load_config_file({config!r})}}, {{'seed': {seeds!r}}})
"""


class Recipe(NamedTuple):
    """How a program is run and what it promises to leave behind; paths are absolute."""

    command: list[str]  # behind the interpreter's name; the same one resumes
    folder: Path  # where the command writes
    own_runs: list[Path]  # the workdirs of its runs; a sweep's are found
    num_updates: int  # of each run
    frames_per_update: int
    environment: dict[str, str]  # variables
    timeout_s: float  # its own --timeout-s
    patience_s: float  # how long something that hangs may take to be given up
    actors: list[str] | None = None  # a second command, of actors
    is_sweep: bool = False
    saves: bool = True  # checkpoints
    repeats: bool = False  # bit for bit
    files: Mapping[Path, str] = {}  # that the command reads

    def prepare(self) -> None:
        """Writes what the command reads."""
        for path, text in self.files.items():
            path.write_text(text)

    @property
    def total_frames(self) -> int:
        return self.num_updates * self.frames_per_update

    @property
    def is_served(self) -> bool:
        return self.actors is not None

    @property
    def runs(self) -> list[Path]:
        """The workdirs of its runs, of a sweep those that have begun."""
        return sorted((self.folder / 'cells').glob('*')) if self.is_sweep else self.own_runs

    @property
    def num_runs(self) -> int:
        return _CELLS if self.is_sweep else len(self.own_runs)


def recipe(case: Case, folder: Path, slack: float, free_port: Callable[[], int]) -> Recipe:
    """The recipe of a case.

    Args:
      folder: Of the case; the command writes into its `run`.
      slack: Multiplies time-outs.
      free_port: Gives a port of this machine that nobody listens at.
    """
    run = folder / 'run'
    # Time-outs that end a case in reasonable time where something hangs for good; else ample ones.
    hangs = (case.family == 'stop' and case.lasts_s is None) or case.fault == 'hangs'
    timeout_s = slack * (10.0 if hangs else 60.0)
    long_evaluation = case.moment == 'evaluation'
    episodes = _LONG_EVALUATION[case.environment] if long_evaluation else 4
    num_updates = _UPDATES[case.environment]
    arguments = [
        *_SMALL,
        *_environment_arguments(case, folder),
        *('--evaluator.episodes', str(episodes), '--evaluator.interval-s', '1000' if long_evaluation else '1'),
        *('--timeout-s', f'{timeout_s:g}', '--environment.max-failures', '3'),
        *('--actor.num-envs', '2', *case.options),
    ]
    fresh = _BATCH // 2 if '--replay.fraction' in case.options else _BATCH
    frames_per_update = fresh * _UNROLL * (4 if case.environment == 'dmlab' else 1)
    if '--replay.fraction' in case.options and case.runtime == 'lockstep':
        arguments += ['--actor.num-actors', '1']  # A batch has two new trajectories.
    config = ['--config', 'configs/catch.py']
    runs, served = [run], None
    files: dict[Path, str] = {}
    if case.runtime in ('lockstep', 'threads', 'launchpad', 'local_mp'):
        runtime = 'launchpad' if case.runtime == 'local_mp' else case.runtime
        command = ['launch/local.py', *config, '--workdir', str(run), '--runtime', runtime]
        command += ['--launch-type', case.runtime] if case.runtime == 'local_mp' else []
    elif case.runtime == 'pod':
        command = ['launch/tpu_pod.py', *config, '--workdir', str(run), '--runtime', 'threads', '--simulate-hosts', '2']
    elif case.runtime == 'pbt':
        command = ['launch/pbt.py', *config, '--workdir', str(run), '--members', '2', '--runtime']
        command += ['lockstep' if case.seed % 2 else 'threads']
        if '--replay.fraction' in case.options:
            arguments += ['--actor.num-actors', '1']
        num_updates //= 2
        frames = num_updates * frames_per_update
        arguments += ['--pbt.burn-in-frames', str(frames // 4), '--pbt.interval-frames', str(frames // 4)]
        runs = [run / 'member_00', run / 'member_01']
    elif case.runtime == 'serve':
        port, near = free_port(), free_port()
        command = ['launch/local.py', *config, '--workdir', str(run), '--runtime', 'launchpad']
        command += ['--serve-actors', str(port), '--actor.num-actors', '0']
        num_updates //= 2  # Each trajectory crosses the proxy.
        served = ['launch/actors.py', '--learner', f'localhost:{near}', '--num-actors', '2', '--wait-s', '600']
        if case.environment not in ('catch', 'dmlab'):
            served += _environment_arguments(case, folder)[:2]  # Code is imported only if their own command names it.
    else:
        assert case.runtime == 'sweep'
        files[folder / 'grid.py'] = _GRID.format(config=str(ROOT / 'configs' / 'catch.py'), seeds=tuple(range(_CELLS)))
        command = ['launch/ablate.py', '--grid', str(folder / 'grid.py'), '--output', str(run), '--processes', '2']
        num_updates //= 2
    arguments += ['--total-frames', str(num_updates * frames_per_update)]
    path = [ROOT, STAND_INS] if case.environment == 'dmlab' else [ROOT]
    variables = {'PYTHONPATH': ':'.join(map(str, path)), 'CHAOS_SWITCH': str(folder / 'trouble')}
    if case.runtime == 'serve':
        variables['IMPALA_ACTORS_SECRET'] = 'both ends of the harness know it'
    if case.family == 'environment':
        after = 0 if case.target == 'always' and case.victim < 0.3 else 200
        variables |= {'CHAOS_TROUBLE': case.fault, 'CHAOS_AFTER': str(after)}
        variables |= {'CHAOS_ONCE': '1'} if case.target == 'once' else {}
    return Recipe(
        [*command, *_last_ones(arguments)],
        run,
        runs,
        num_updates,
        frames_per_update,
        variables,
        timeout_s,
        2 * timeout_s,
        served,
        is_sweep=case.runtime == 'sweep',
        repeats=case.runtime in ('lockstep', 'sweep'),
        files=files,
    )


def _environment_arguments(case: Case, folder: Path) -> list[str]:
    if case.environment == 'catch':
        return []
    if case.environment == 'dmlab':
        levels = str(folder / 'levels')
        return ['--environment.name', 'dmlab/rooms_watermaze', '--environment.level-cache', levels]
    return ['--environment.name', f'tests.chaos.environments:{case.environment}', '--environment.processes', '1']


def _last_ones(arguments: list[str]) -> list[str]:
    """Without the options that a later one replaces."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return [word for option in options.items() for word in option]
