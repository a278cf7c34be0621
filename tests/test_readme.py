"""Every command and example of the README and of the pages in docs/ runs, with small budgets."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import impala_jax
from impala_jax.cli import command_line
from impala_jax.config import get
from impala_jax.rundir.rows import read_rows
from impala_jax.runtimes.supervisor import free_port
from tests.helpers import programs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCKS = [
    (language, textwrap.dedent(block))
    for page in PAGES
    for language, block in re.findall(r'^ *```(\w+)\n(.*?)^ *```', page.read_text(), re.MULTILINE | re.DOTALL)
]


def lines_of(wanted):
    """The commands in blocks of a language; one that several pages show is there once."""
    return list(dict.fromkeys(line for language, block in BLOCKS if language == wanted for line in block.splitlines()))


LINES = lines_of('bash')
ELSEWHERE = lines_of('console')  # They need other machines.
JOINED = [line for line in LINES if '--serve-actors' in line or 'launch/actors.py' in line]
TRAIN = [line for line in LINES if 'launch/local.py' in line and line not in JOINED]
EVALUATE = [line for line in LINES if 'launch/evaluate.py' in line]
PLOT = [line for line in LINES if 'launch/plot.py' in line]
ABLATE = [line for line in LINES if 'launch/ablate.py' in line]
PBT = [line for line in LINES if 'launch/pbt.py' in line]
POD = [line for line in LINES if 'launch/tpu_pod.py' in line]
EXPERTS = [line for line in LINES if 'launch/experts.py' in line]
PYTHON = [block for language, block in BLOCKS if language == 'python']
FILES = {block.split('\n', 1)[0][2:]: block for block in PYTHON if block.startswith('# my_')}
EXAMPLES = [block for block in PYTHON if block not in FILES.values()]
# One small update and one game, in the runtime that starts fastest.
SMALL = '--runtime threads --total-frames 2000 --evaluator.episodes 1 --actor.num-actors 1 --actor.num-envs 2'.split()
# By configuration. A suite's tasks each need an environment, and an evaluation plays games of all; games of Pong last
# longer than those of Breakout, which are evaluated.
MORE = {'minisuite': ['--actor.num-envs', '4'], 'atari57': '--actor.num-envs 57 --evaluator.episodes 0'.split()}
MORE |= {'atari': ['--learner.batch-size', '4'], 'pong': ['--evaluator.episodes', '0']}
MORE['dmlab30'] = '--actor.num-envs 30 --evaluator.episodes 0'.split()
MARKS = {'atari57': [pytest.mark.slow, pytest.mark.atari], 'dmlab30': [pytest.mark.slow]}


def test_no_command_or_example_is_left_out():
    """A command of a new kind has to be added here."""
    others = [line for line in LINES if line not in TRAIN + JOINED + POD + EVALUATE + PLOT + ABLATE + PBT + EXPERTS]
    # CI runs the first two, and the last one with other cases; requirements/install.sh, and so every run of CI, does
    # what the third does.
    by_ci = ['make train', 'make test', "pip install -e '.[atari,video,plot]'"]
    assert others == [*by_ci, "make chaos ARGS='--cases 60 --processes 2'"]
    assert (
        len(TRAIN) == 15
        and len(JOINED) == 2
        and len(POD) == 1
        and len(EVALUATE) == 3
        and len(PLOT) == 6
        and len(ABLATE) == len(CELLS)
        and len(PBT) == 1
        and len(EXPERTS) == 1
        and len(FILES) == 7
        and len(EXAMPLES) == 2
    )


def test_commands_for_other_machines_are_parsed():
    own = [line for line in ELSEWHERE if line.startswith('python ')]
    shell = {'(umask', 'export'}
    others = {'gcloud', 'kubectl', 'nft', 'ssh', 'ray', 'sbatch', 'scancel'}  # tests/test_deploy.py has the last three.
    assert {line.split()[0] for line in ELSEWHERE} == {'python', 'impala'} | shell | others
    (joins,) = [line.split()[2:] for line in ELSEWHERE if line.startswith('impala train ')]
    assert command_line.train_arguments(joins).config.ray_address == '10.0.0.1:6379'
    assert len(own) == 2
    for host, line in enumerate(own):
        assert line.split()[1] == 'launch/tpu_pod.py'
        assert command_line.pod_arguments(line.split()[2:]).host_id == host
    (train,) = [line for line in ELSEWHERE if 'launch/tpu_pod.py' in line and line not in own]
    inner = shlex.split(train)[-1].removeprefix('--command=').partition('launch/tpu_pod.py ')[2]
    assert command_line.pod_arguments(inner.split()).train.config.learner.batch_size == 256


def test_fields_in_the_table_of_configuration_exist():
    table = (ROOT / 'docs' / 'configuration.md').read_text().partition('|---|---|---|\n')[2]
    config, names = impala_jax.Config(), []
    for row in table.splitlines():
        first, *others = re.findall('`(.+?)`', row.split('|')[1])
        names += [first, *(first.rpartition('.')[0] + other for other in others)]
    assert len(names) > len(dataclasses.fields(config))
    for name in names:
        get(config, name)


def test_all_public_names_are_in_the_reference():
    reference = ''.join(path.read_text() for path in (ROOT / 'docs' / 'api').glob('*.rst'))
    documented = set(re.findall(r'^\.\. auto\w+:: impala_jax\.(\w+)', reference, re.MULTILINE))
    assert documented >= set(impala_jax.__all__)
    for name, value in vars(impala_jax.tabular).items():
        if inspect.isfunction(value) and value.__module__.startswith('impala_jax.') and not name.startswith('_'):
            is_check = name in ('as_policies', 'require_distributions')
            assert is_check or f'impala_jax.tabular.{name}\n' in reference, name


def run(arguments, tmp_path, environment=None):
    # These programs run for a few updates, which take less time than XLA's optimisations.
    hasty = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    environment = os.environ | hasty | {'PYTHONPATH': f'{tmp_path}:{ROOT}'} | (environment or {})
    # One device, as a person has: the tests' own eight would not divide a small batch.
    environment.pop('XLA_FLAGS', None)
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'Warning' not in result.stderr, result.stderr
    return result.stdout


def arguments_of(line, tmp_path):
    words = [word for word in shlex.split(line) if not word.startswith('PYTHONPATH=')]
    assert words[0] == 'python'
    return [str(tmp_path / word) if word.startswith('runs/') else word for word in words[1:]]


def config_of(line):
    return next((name for name in MORE if f'configs/{name}.py' in line), '')


def train(line, tmp_path):
    """Runs a command that trains."""
    stand_ins = ROOT / 'tests' / 'stand_ins'
    lab = 'dmlab' in line and importlib.util.find_spec('deepmind_lab') is None
    for name, block in FILES.items():
        (tmp_path / name).write_text(block)
    arguments = arguments_of(line, tmp_path)
    environment = {'PYTHONPATH': f'{stand_ins}:{ROOT}', 'HOME': str(tmp_path)} if lab else None
    small = SMALL[2:] if '--runtime device' in line else SMALL
    assert 'Trained' in run([*arguments, *small, *MORE.get(config_of(line), [])], tmp_path, environment)
    (workdir,) = (tmp_path / 'runs').iterdir()
    assert ('logit_penalty' in read_rows(workdir / 'metrics.jsonl')[-1]) == ('my_loss' in line)
    return environment


# What the two others train is evaluated below.
TRAINED_HERE = [line for line in TRAIN if not line.endswith(('runs/catch', 'runs/minisuite'))]


@pytest.mark.parametrize('line', [pytest.param(line, marks=MARKS.get(config_of(line), ())) for line in TRAINED_HERE])
def test_training_commands(line, tmp_path):
    if 'pong' in line or 'atari' in line:
        pytest.importorskip('ale_py')
    if 'my_environment' in line:
        pytest.importorskip('gymnasium')
    environment = train(line, tmp_path)
    if config_of(line) == 'dmlab30':
        arguments = arguments_of(next(line for line in EVALUATE if 'dmlab30' in line), tmp_path)
        arguments = [str(tmp_path / word) if word.startswith('dmlab30.') else word for word in arguments]
        run([*arguments, '--episodes', '1'], tmp_path, environment)
        assert (tmp_path / 'dmlab30.png').exists()


@pytest.mark.launchpad
def test_commands_for_actors_on_other_machines(tmp_path):
    """As they stand, but for a port that is free here, and less to do."""
    port = str(free_port())
    small = '--total-frames 2000 --evaluator.episodes 1'.split()
    serve, join = ([word.replace('5000', port) for word in arguments_of(line, tmp_path)] for line in JOINED)
    actors = programs.start(tmp_path / 'actors', *join)
    try:
        assert 'Trained' in run([*serve, *small], tmp_path)
    finally:
        actors.terminate()
        code, stdout, stderr = programs.finish(actors, 60)
    assert code == 128 + signal.SIGTERM and 'joined the learner' in stdout, stdout + stderr


def test_pod_command(tmp_path):
    stdout = run([*arguments_of(POD[0], tmp_path), *SMALL], tmp_path)
    assert '4 x cpu' in stdout and 'Trained' in stdout


def test_training_evaluation_and_plot_commands(tmp_path):
    train(next(line for line in TRAIN if 'runs/catch' in line), tmp_path)
    arguments = arguments_of(next(line for line in EVALUATE if 'runs/catch' in line), tmp_path)
    video = importlib.util.find_spec('imageio_ffmpeg') is not None
    if not video:
        arguments = arguments[: arguments.index('--video')]
    arguments = [str(tmp_path / word) if word.endswith(('.json', '.mp4')) else word for word in arguments]
    assert 'mean' in run(arguments, tmp_path)
    assert (tmp_path / 'scores.json').exists()
    assert (tmp_path / 'catch.mp4').exists() == video
    if importlib.util.find_spec('matplotlib') is not None:
        arguments = arguments_of(next(line for line in PLOT if ' curve ' in line), tmp_path)
        run([str(tmp_path / word) if word.endswith('.png') else word for word in arguments], tmp_path)
        assert (tmp_path / 'catch.png').exists()


def test_suite_commands(tmp_path):
    """Training on a suite, its evaluation and its figure."""
    train(next(line for line in TRAIN if 'runs/minisuite' in line), tmp_path)
    evaluate = next(line for line in EVALUATE if '--suite minisuite' in line)
    suite, profile = (next(line for line in PLOT if f'plot.py {kind} ' in line) for kind in ('suite', 'profile'))
    few = [*arguments_of(evaluate, tmp_path), '--episodes', '2']
    for arguments in (few, arguments_of(suite, tmp_path), arguments_of(profile, tmp_path)):
        run([str(tmp_path / word) if word.startswith('suite.') else word for word in arguments], tmp_path)
    assert all((tmp_path / name).exists() for name in ('suite.json', 'suite.png', 'suite.svg', 'suite.profile.svg'))


# Cells by grid.
CELLS = {'table2': 720, 'lag': 3600, 'minatar': 160, 'truncation': 1440, 'lambda': 540, 'learning_rate': 600}


def test_ablation_commands(tmp_path):
    """The commands as they stand list their cells; those of one grid, task and seed run, on a small budget."""
    for line in ABLATE:
        cells = run([*arguments_of(line, tmp_path), '--list'], tmp_path).splitlines()
        assert len(cells) == next(number for name, number in CELLS.items() if f'/{name}.py' in line), line
    arguments = arguments_of(ABLATE[0], tmp_path)
    grid = tmp_path / 'grid.py'
    grid.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / 'configs' / 'ablations')!r})
import dataclasses, table2, tasks

def get_grid():
    grid = table2.get_grid()
    return dataclasses.replace(grid, tasks={{'catch': tasks.CATCH}}, axes=grid.axes | {{'seed': (0,)}})
""")
    arguments[arguments.index('--grid') + 1] = str(grid)
    run([*arguments, *'--total-frames 800 --evaluator.episodes 2 --logging.interval-updates 5'.split()], tmp_path)
    if importlib.util.find_spec('matplotlib') is not None:
        table = run(arguments_of(next(line for line in PLOT if ' table ' in line), tmp_path), tmp_path)
        assert all(name in table for name in ('V-trace', '1-step IS', 'ε-correction', 'no correction', 'catch'))


def figure(line, tmp_path):
    """Draws the figure of a command into the test's folder, if there is what draws."""
    if importlib.util.find_spec('matplotlib') is None:
        return
    arguments = [str(tmp_path / word) if word.endswith('.png') else word for word in arguments_of(line, tmp_path)]
    run(arguments, tmp_path)
    assert Path(arguments[-1]).stat().st_size > 10_000


def test_population_commands(tmp_path):
    small = '--runtime threads --members 2 --total-frames 4000 --evaluator.episodes 1'.split()
    assert 'launch/evaluate.py' in run([*arguments_of(PBT[0], tmp_path), *small], tmp_path)
    assert len(list(tmp_path.glob('runs/*/member_*/evaluations.jsonl'))) == 2
    figure(next(line for line in PLOT if 'plot.py pbt' in line), tmp_path)


def test_experts_commands(tmp_path):
    """Its cells are listed; tests/studies/test_sweeps_of_experts.py runs such cells, and writes such a table."""
    arguments = arguments_of(EXPERTS[0], tmp_path)
    assert len(run([*arguments, '--list'], tmp_path).splitlines()) == 5
    table = tmp_path / 'runs' / 'experts' / 'results.csv'
    table.parent.mkdir(parents=True)
    tasks = impala_jax.environments.suites.tasks(impala_jax.EnvironmentConfig('minisuite'))
    lines = ['cell,task,seed,frames,final_return,' + ','.join(f'final_return/{task}' for task in tasks)]
    lines += [f'{i},{task},0,1000,{0.1 * i}' + ',' * len(tasks) for i, task in enumerate(tasks)]
    lines += [f'{len(tasks)},minisuite,0,4000,0.5' + ',0.5' * len(tasks)]
    table.write_text('\n'.join(lines) + '\n')
    figure(next(line for line in PLOT if 'plot.py experts' in line), tmp_path)


def test_example_with_a_configuration(tmp_path):
    (block,) = [block for block in EXAMPLES if 'impala_jax.run(' in block]
    assert -1.0 <= float(run(['-c', block.replace('runs/', f'{tmp_path}/runs/')], tmp_path).splitlines()[-1]) <= 1.0


def test_example_by_hand_learns(tmp_path):
    (block,) = [block for block in EXAMPLES if 'impala_jax.run(' not in block]
    assert float(run(['-c', block], tmp_path).splitlines()[-1]) > 0.8  # A random policy's is -0.6.
