"""Sweeps: what a grid is made of, and that a sweep's table does not depend on how the sweep went."""

import csv
import math
import os
import re
import signal
import threading

import pytest

from impala_jax import config as config_lib
from impala_jax.config import (
    ConfigError,
    EnvironmentConfig,
)
from impala_jax.studies.ablation import CellFailed, Grid, run_sweep
from tests.helpers import programs
from tests.helpers.configs import small
from tests.helpers.programs import finish, marked_processes, wait_for

GRID = """
from impala_jax import (
    ActorConfig, Config, EnvironmentConfig, EvaluatorConfig, LearnerConfig, LoggingConfig, NetworkConfig
)
from impala_jax.studies.ablation import Grid


def get_grid():
    small = Config(
        total_frames=8000,
        environment=EnvironmentConfig(name='catch'),
        network=NetworkConfig(torso='mlp', mlp_sizes=(8,)),
        learner=LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
        actor=ActorConfig(num_actors=1, num_envs=2),
        evaluator=EvaluatorConfig(episodes=4, num_envs=4),
        logging=LoggingConfig(interval_updates=20),
    )
    axes = {'vtrace.correction': ('vtrace', 'none'), 'vtrace.rho_bar': (1.0, float('inf')), 'seed': (0, 1)}
    return Grid({'catch': small}, axes)
"""
NUM_CELLS = 6  # `none` has no rho_bar.


@pytest.fixture
def grid_file(tmp_path):
    path = tmp_path / 'grid.py'
    path.write_text(GRID)
    return path


def start(grid_file, output, *arguments):
    return programs.start(output, 'launch/ablate.py', '--grid', str(grid_file), '--output', str(output), *arguments)


def stop(process, output, number):
    """Sends a signal to a sweep, and waits until nothing of it is left."""
    process.send_signal(number)
    code, _, stderr = finish(process)
    if number != signal.SIGKILL:
        assert code == 128 + number, stderr
        assert stderr.splitlines() == [f'stopped by signal {number:d}; the same command resumes the sweep']
    wait_for(lambda: not marked_processes(output))


def finished(output):
    return len(list(output.glob('cells/*/done.json')))


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """The table of a sweep in one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp('unbroken')
    (folder / 'grid.py').write_text(GRID)
    code, stdout, stderr = finish(start(folder / 'grid.py', folder / 'sweep', '--processes', '1'))
    assert code == 0, stderr
    assert not stderr.strip(), stderr
    assert f'{NUM_CELLS}/{NUM_CELLS} cells' in stdout and stdout.splitlines()[-1].endswith('results.csv')
    return (folder / 'sweep' / 'results.csv').read_text()


def test_the_table_is_tidy(unbroken):
    rows = list(csv.DictReader(unbroken.splitlines()))
    assert len(rows) == NUM_CELLS * 10  # 200 updates, a row each 20
    assert list(rows[0])[:6] == ['cell', 'task', 'vtrace.correction', 'vtrace.rho_bar', 'seed', 'frames']
    assert {(row['vtrace.correction'], row['vtrace.rho_bar']) for row in rows} == {
        ('vtrace', '1.0'),
        ('vtrace', 'inf'),
        ('none', '1.0'),
    }
    for row in rows:
        assert -1 <= float(row['final_return']) <= 1
        assert float(row['entropy']) > 0
        assert not set(row) & {'wall_time_s', 'frames_per_second', 'log_rho_histogram'}
    assert len({row['final_return'] for row in rows if row['cell'] == rows[0]['cell']}) == 1


@pytest.mark.parametrize(
    'number', [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stopped_sweep_goes_on_and_gives_the_same_table(unbroken, grid_file, tmp_path, number):
    output = tmp_path / 'sweep'
    # Some seconds a cell, so that the signal comes inside one.
    process = start(grid_file, output, '--processes', '2')
    wait_for(lambda: finished(output) >= 2)
    stop(process, output, number)
    before = finished(output)
    assert 2 <= before < NUM_CELLS, 'it was over before the signal came'
    code, stdout, stderr = finish(start(grid_file, output, '--processes', '2'))
    assert code == 0, stderr
    assert (output / 'results.csv').read_text() == unbroken
    # Nothing is left to do.
    cells = {path: path.stat().st_mtime_ns for path in output.glob('cells/*/*')}
    assert finish(start(grid_file, output))[0] == 0
    assert cells == {path: path.stat().st_mtime_ns for path in output.glob('cells/*/*')}


@pytest.fixture(scope='module')
def programs_of_cells(tmp_path_factory):
    """A grid of two compiled programs, and its table."""
    folder = tmp_path_factory.mktemp('programs')
    path = folder / 'grid.py'
    two = "{'catch': small, 'bandit': dataclasses.replace(small, environment=EnvironmentConfig('delayed_bandit'))}"
    path.write_text('import dataclasses\n' + GRID.replace("{'catch': small}", two).replace('8000', '40_000'))
    code, stdout, stderr = finish(start(path, folder / 'sweep', '--runtime', 'device', '--processes', '2'))
    assert code == 0 and not stderr.strip(), stderr
    assert f'{2 * NUM_CELLS}/{2 * NUM_CELLS} cells' in stdout
    return path, (folder / 'sweep' / 'results.csv').read_text()


def test_the_table_of_compiled_programs_is_that_of_other_sweeps(programs_of_cells, unbroken):
    rows, others = (list(csv.DictReader(table.splitlines())) for table in (programs_of_cells[1], unbroken))
    assert list(rows[0]) == list(others[0])
    assert len(rows) == 2 * NUM_CELLS * 50  # 1,000 updates, a row each 20
    assert {row['task'] for row in rows} == {'catch', 'bandit'}
    assert all(-1 <= float(row['final_return']) <= 1 for row in rows if row['task'] == 'catch')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_stopped_programs_start_again_and_give_the_same_table(programs_of_cells, tmp_path, number):
    path, table = programs_of_cells
    output = tmp_path / 'sweep'
    process = start(path, output, '--runtime', 'device', '--processes', '1')
    wait_for(lambda: finished(output) == NUM_CELLS)
    stop(process, output, number)
    assert finished(output) < 2 * NUM_CELLS, 'it was over before the signal came'
    assert finish(start(path, output, '--runtime', 'device', '--processes', '1'))[0] == 0
    assert (output / 'results.csv').read_text() == table


def test_a_task_without_a_twin_in_jax_is_refused(tmp_path):
    cells = Grid({'acrobot': small(environment=EnvironmentConfig('gymnasium/Acrobot-v1'))}, {'seed': (3,)}).cells()
    with pytest.raises(ConfigError, match='has no twin in JAX'):
        run_sweep(cells, tmp_path / 'sweep', 1, runtime='device')
    assert not (tmp_path / 'sweep').exists()


def test_a_member_that_diverges_is_named_and_the_others_are_finished(tmp_path):
    settings = small(environment=EnvironmentConfig('jax/catch'))
    adam = config_lib.replace(settings, {'optimizer.name': 'adam', 'optimizer.epsilon': 1e-8, 'total_frames': 2000})
    cells = Grid({'catch': adam}, {'optimizer.learning_rate': (1e30, 1e-3)}).cells()
    with pytest.raises(
        CellFailed, match=r'error: cell \w+ \(task=catch, optimizer.learning_rate=1e\+30\): \d+ updates in'
    ):
        run_sweep(cells, tmp_path, 1, runtime='device')
    rows = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))
    assert {row['cell'] for row in rows} == {cells[1].id}
    with pytest.raises(ConfigError, match='has results of --runtime device, and the numbers of lockstep differ'):
        run_sweep(cells, tmp_path, 1)


def test_a_cell_that_fails_ends_the_sweep_with_its_name(tmp_path):
    cells = Grid({'catch': small(), 'wrong': small(environment=EnvironmentConfig(name='cach'))}, {'seed': (3,)}).cells()
    with pytest.raises(CellFailed, match=r"task=wrong, seed=3(.|\n)*unknown environment.name 'cach'"):
        run_sweep(cells, tmp_path, 1)
    rows = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))
    assert {row['task'] for row in rows} == {'catch'}


@pytest.mark.timeout(120)
def test_a_cell_that_fails_ends_the_others(tmp_path, monkeypatch):
    # The process it failed in is idle by then, the other one busy. On Python 3.12 the sweep waited for that for ever.
    monkeypatch.setenv('METRICS', str(tmp_path / 'cells' / '*' / 'metrics.jsonl'))
    wrong = small(environment=EnvironmentConfig(name='tests.helpers.factories:raises_when_another_learns'))
    cells = Grid({'catch': small(total_frames=2_000_000), 'wrong': wrong}, {'seed': (3,)}).cells()
    with pytest.raises(CellFailed, match='task=wrong'):
        run_sweep(cells, tmp_path, 2)
    assert len(list(tmp_path.glob('cells/*/checkpoints/0*'))) == 1  # It can be resumed.


@pytest.mark.timeout(120)
def test_a_cell_that_is_stopped_for_good_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr('impala_jax.system.stop_watch.STOPPED_S', 1.0)
    cells = Grid({'catch': small(total_frames=2_000_000)}, {'seed': (3,)}).cells()

    def stop_it():
        wait_for(lambda: list(tmp_path.glob('cells/*/metrics.jsonl')))
        for pid in programs.children('multiprocessing.spawn'):
            os.kill(pid, signal.SIGSTOP)

    threading.Thread(target=stop_it, daemon=True).start()
    with pytest.raises(CellFailed, match=r'waited for its process \d+, which was stopped for 1 s'):
        run_sweep(cells, tmp_path, 1)


def test_a_grid_stays_within_the_theory_unless_told():
    levels = (1.0, 4.0, math.inf)
    grid = Grid({'catch': small()}, {'vtrace.rho_bar': levels, 'vtrace.c_bar': levels})
    inside = [(cell.config.vtrace.rho_bar, cell.config.vtrace.c_bar) for cell in grid.cells()]
    assert inside == [(rho, c) for rho in levels for c in levels if c <= rho]
    assert len(grid.cells(outside_theory=True)) == 9
    assert grid.num_outside_theory() == 3


def test_what_has_no_effect_is_left_out():
    axes = {'vtrace.correction': ('vtrace', 'one_step_is'), 'vtrace.c_bar': (0.5, 1.0)}
    cells = Grid({'catch': small()}, axes).cells()
    assert [tuple(cell.values.values()) for cell in cells] == [
        ('catch', 'vtrace', 0.5),
        ('catch', 'vtrace', 1.0),
        ('catch', 'one_step_is', 1.0),
    ]


def test_ids_name_the_configuration():
    grid = Grid({'catch': small()}, {'seed': (0, 1)})
    ids = [cell.id for cell in grid.cells()]
    assert len(set(ids)) == 2 and all(re.fullmatch('[0-9a-f]{12}', i) for i in ids)
    assert ids == [cell.id for cell in grid.cells()]
    changed = grid.override(lambda config: config_lib.replace(config, {'total_frames': 800}))
    assert not set(ids) & {cell.id for cell in changed.cells()}


@pytest.mark.parametrize(
    'axes, message',
    [
        ({'vtrace.rhobar': (1.0,)}, "unknown configuration field 'vtrace.rhobar'; did you mean 'vtrace.rho_bar'"),
        ({'replay.fraction': (2.0,)}, r'replay.fraction must lie in \[0, 1\), got 2.0'),
    ],
)
def test_axes_that_cannot_be(axes, message):
    with pytest.raises(ConfigError, match=message):
        Grid({'catch': small()}, axes).cells()


def test_an_axis_is_not_overridden():
    grid = Grid({'catch': small()}, {'seed': (0, 1)})
    with pytest.raises(ConfigError, match='seed is an axis of the grid'):
        grid.override(lambda config: config_lib.replace(config, {'seed': 5}))


def test_replace_sets_fields_at_once():
    config = config_lib.replace(small(), {'vtrace.c_bar': 4.0, 'vtrace.rho_bar': 4.0, 'vtrace.lambda': 0.9, 'seed': 7})
    assert (config.vtrace.c_bar, config.vtrace.rho_bar, config.vtrace.lambda_, config.seed) == (4.0, 4.0, 0.9, 7)
    assert config_lib.get(config, 'vtrace.lambda') == 0.9
