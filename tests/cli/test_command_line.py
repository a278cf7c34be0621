"""Bad input gets one clear line that names the value and the remedy, before any long work; and what it needs to say."""

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from impala_jax.cli import command_line
from impala_jax.cli import main as cli
from impala_jax.config import ConfigError
from impala_jax.evaluation import evaluator as evaluation
from impala_jax.rundir import checkpoint
from impala_jax.system import program
from tests.helpers.programs import ROOT

TINY = (
    '--runtime threads --total-frames 400 --learner.batch-size 4 --learner.unroll-length 10 --learner.num-devices 1 '
    '--actor.num-actors 1 --actor.num-envs 4 --evaluator.episodes 2 --network.mlp-sizes 8'
).split()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command with arguments, as the shell would; returns its exit status, output and last line of errors."""

    def call(name, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', ['impala', name, *map(str, arguments)])
        # Commands silence other libraries for their whole process, which is this one.
        monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        reason = ended.value.code if isinstance(ended.value.code, str) else output.err.strip()
        status = 1 if isinstance(ended.value.code, str) else ended.value.code
        return status, output.out, reason

    return call


def train(call, workdir, *arguments, config='configs/catch.py'):
    return call('train', '--config', config, '--workdir', workdir, *TINY, *arguments)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--learner.batchsize', '8'], ['--learner.batchsize', "'--learner.batch-size'"]),
        (['--seeed', '8'], ['--seeed', "'--seed'"]),
        (['--seed', 'five'], ['--seed five', '--fields']),
        (['--learner.batch-size', '-3'], ['learner.batch_size', '-3']),
        (['--learner.num-devices', '3'], ['learner.batch_size 4', '3 devices', 'try 6']),
        (['--learner.num-devices', '1000', '--learner.batch-size', '1000'], ['num_devices is 1000', 'has 8']),
        (['--environment.name', 'cach'], ["'cach'", "'catch'"]),
        (['--environment.name', 'no_such_module:make'], ['no_such_module']),
        pytest.param(['--environment.name', 'atari/pnog'], ["'pnog'", "'atari/pong'"], marks=pytest.mark.atari),
        (['--network.torso', 'shalow'], ["'shalow'", "'shallow'"]),
        (['--network.torso', 'flax.linen:NoTorso'], ['flax.linen:NoTorso']),
        (['--vtrace.c-bar', '2'], ['vtrace.c_bar 2', 'outside-theory']),
        (['--runtime', 'thread'], ["'thread'", "'threads'"]),
        (['--environment.name', 'tests.helpers.factories:different', '--environment.processes', '1'], ['actions']),
        (['--runtime', 'lockstep', '--actor.num-envs', '3'], ['batch_size 4', '3 environments']),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else None,
)
def test_bad_values_get_one_line(call, tmp_path, arguments, words):
    status, _, reason = train(call, tmp_path / 'run', *arguments)
    assert status != 0
    assert len(reason.splitlines()) == 1, reason
    for word in words:
        assert word in reason
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_bad_configuration_files(call, tmp_path):
    for config, word in (
        ('configs/cach.py', "'configs/catch.py'"),
        ('cach', "'catch'"),
        ('no/catch.py', "'catch'"),
        ('catch.txt', 'ends in .py'),
        (write(tmp_path / 'empty.py', ''), 'get_config'),
        (write(tmp_path / 'wrong.py', 'def get_config():\n    return 3\n'), 'int'),
    ):
        status, _, reason = train(call, tmp_path / 'run', config=str(config))
        assert status != 0 and len(reason.splitlines()) == 1 and word in reason, reason


def test_a_bare_name_is_a_configuration_of_the_package(call, tmp_path, monkeypatch):
    assert command_line.load_config_file('catch') == command_line.load_config_file('configs/catch.py')
    # Also one that imports another, and whatever lies here.
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'catch', 'no configuration')
    write(tmp_path / 'catch.py', 'import nonsense')
    assert command_line.load_config_file('minisuite_pbt').environment.name == 'minisuite'
    assert command_line.load_config_file('catch').environment.name == 'catch'
    assert set(command_line.load_grid_file('table2').tasks) == {'catch', 'delayed_bandit', 'cartpole'}


@pytest.mark.parametrize(
    'arguments, status, words',
    [
        ([], 2, ['a command is missing', '--help']),
        (['trian'], 2, ["'trian'", "'train'"]),
        (['--verbose'], 2, ['--verbose', '--help']),
        (['train', '--confg', 'catch'], 2, ['--config']),
    ],
)
def test_bad_commands_get_one_line(monkeypatch, capsys, arguments, status, words):
    monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
    monkeypatch.setattr(sys, 'argv', ['impala', *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_every_command_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    for name in cli.COMMANDS:
        monkeypatch.setattr(sys, 'argv', ['impala', name, '--help'])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr().out
        assert not ended.value.code and f'usage: impala {name}' in output, output


@pytest.mark.parametrize(
    'argv, orig_argv, itself, commands',
    [
        (
            ['launch/tpu_pod.py', '--a', '1'],
            ['python', '-u', 'launch/tpu_pod.py', '--a', '1'],
            ['-u', 'launch/tpu_pod.py'],
            ['python launch/local.py', 'python launch/plot.py', 'make doctor'],
        ),
        (
            ['impala pod', '--a', '1'],
            ['python', '/bin/impala', 'pod', '--a', '1'],
            ['/bin/impala', 'pod'],
            ['impala train', 'impala plot', 'impala doctor'],
        ),
        (
            ['python -m impala_jax pod'],
            ['python', '-m', 'impala_jax', 'pod'],
            ['-m', 'impala_jax', 'pod'],
            [f'python -m impala_jax {name}' for name in ('train', 'plot', 'doctor')],
        ),
    ],
    ids=['script', 'command', 'module'],
)
def test_a_program_knows_how_it_was_started(monkeypatch, argv, orig_argv, itself, commands):
    monkeypatch.setattr(sys, 'argv', argv)
    monkeypatch.setattr(sys, 'orig_argv', orig_argv)
    assert program.itself() == [sys.executable, *itself]
    assert [program.command(name) for name in ('train', 'plot', 'doctor')] == commands


def test_programs_listen_to_signals_before_they_import_anything_that_takes_time():
    for path in [*(ROOT / 'launch').glob('*.py'), ROOT / 'impala_jax' / '__main__.py']:
        first, second = ast.parse(path.read_text()).body[1:3]
        assert ast.unparse(first) == 'from impala_jax.system import stopping'
        assert ast.unparse(second) == 'stopping.begin()'
    code = """
import impala_jax.system.stopping, sys
impala_jax.system.stopping.begin = lambda: print(sorted({'jax', 'numpy', 'rich', 'tyro'} & set(sys.modules)))
import impala_jax.__main__
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == '[]', done.stderr


def test_every_command_but_the_doctor_is_a_script_too(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['launch/local.py'])
    scripts = {program.command(name) for name in cli.COMMANDS}
    assert scripts == {f'python launch/{path.name}' for path in (ROOT / 'launch').glob('*.py')} | {'make doctor'}


def test_missing_arguments(call):
    status, _, reason = call('train', '--config', 'configs/catch.py')
    assert status != 0 and len(reason.splitlines()) == 1 and '--workdir' in reason


def test_unwritable_workdir(call, tmp_path):
    file = write(tmp_path / 'file', '')
    status, _, reason = train(call, file / 'run')
    assert status != 0 and len(reason.splitlines()) == 1 and str(file) in reason


@pytest.fixture
def finished(call, tmp_path):
    """The workdir of a run that has ended, with two checkpoints."""
    assert train(call, tmp_path)[0] == 0
    assert train(call, tmp_path, '--total-frames', '800')[0] == 0
    assert checkpoint.steps(tmp_path / 'checkpoints') == [10, 20]
    return tmp_path


def halve(path):
    """Cuts every file of a checkpoint in half."""
    for file in path.rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_checkpoint_cut_in_half(call, finished, caplog):
    newest, before = '000000020', '000000010'
    halve(finished / 'checkpoints' / newest)
    assert train(call, finished, '--total-frames', '800')[0] == 0
    assert newest in caplog.text and 'damaged' in caplog.text
    rows = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    assert [row['learner_steps'] for row in rows].count(20) == 1 and rows[-1]['frames'] == 800

    halve(finished / 'checkpoints' / newest)
    halve(finished / 'checkpoints' / before)
    status, _, reason = train(call, finished, '--total-frames', '800')
    assert status != 0 and len(reason.splitlines()) == 1 and 'no checkpoint' in reason and 'workdir' in reason


def test_a_configuration_that_does_not_fit_the_checkpoint(call, finished):
    status, _, reason = train(call, finished, '--network.core', 'lstm', '--loss.discount', '0.9')
    assert status != 0 and len(reason.splitlines()) == 1
    assert 'network.core' in reason and 'loss.discount' in reason and '0.9' in reason and 'workdir' in reason


COUNT_FRAMES = 'import imageio.v2, sys; print(sum(1 for _ in imageio.v2.get_reader(sys.argv[1]).iter_data()))'


@pytest.mark.parametrize('video', ['a.mp4', 'a.gif'])
def test_evaluate(finished, video):
    pytest.importorskip('imageio_ffmpeg')

    def python(*arguments):
        # ffmpeg is started by a fork, which this process, where JAX runs and warnings are errors, does not allow.
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            **{'cwd': ROOT, 'env': environment, 'timeout': 200, 'capture_output': True, 'text': True, 'check': True},
        ).stdout

    stdout = python(
        *('launch/evaluate.py', '--workdir', finished, '--episodes', 7, '--num-envs', 3),
        *('--json', finished / 'scores.json', '--video', finished / video),
    )
    assert 'catch: 7 games at 800 frames' in stdout
    # A game of Catch is ten pictures.
    assert int(python('-c', COUNT_FRAMES, finished / video)) == 10
    scores = json.loads((finished / 'scores.json').read_text())
    assert scores['episodes'] == 7 and scores['checkpoint_step'] == 20 and scores['human_normalised'] is None
    assert set(scores) >= {'mean_return', 'median_return', 'stderr', 'min_return', 'max_return'}
    assert scores['min_return'] <= scores['mean_return'] <= scores['max_return'] and not scores['greedy']


def test_evaluate_bad_input(call, finished, tmp_path):
    for arguments, word in (
        (['--workdir', tmp_path / 'nothing'], 'no checkpoint'),
        (['--workdir', finished, '--episodes', 0], '--episodes'),
        (['--workdir', finished, '--video', tmp_path / 'a.avi'], '.mp4 or .gif'),
        (['--workdir', finished, '--video', tmp_path / 'no' / 'a.mp4'], 'no directory'),
        (['--workdir', finished, '--json', tmp_path / 'no' / 'a.json'], 'no directory'),
        (['--workdir', finished, '--json', tmp_path], 'there is a directory of this name'),
        (['--workdir', finished, '--greeedy'], '--greeedy'),
    ):
        status, _, reason = call('evaluate', *arguments)
        assert status != 0 and len(reason.splitlines()) == 1 and word in reason, reason


def test_standard_error():
    scores = evaluation.Evaluation([1.0, 2.0, 4.0])
    assert scores.stderr == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert evaluation.Evaluation([3.0]).stderr == 0


def suite_of(*returns):
    tasks = {str(i): evaluation.Evaluation(list(values)) for i, values in enumerate(returns)}
    return evaluation.Evaluation([value for values in returns for value in values], tasks)


def test_the_error_of_a_suite_is_that_of_its_tasks():
    """Tasks that always give the same are known exactly, however much they differ."""
    assert suite_of([0.0] * 50, [1.0] * 50).stderr == 0
    rng = np.random.default_rng(0)
    means = [np.mean([*rng.normal(0, 1, 10), *rng.normal(50, 3, 30)]) for _ in range(20_000)]
    errors = [suite_of(rng.normal(0, 1, 10), rng.normal(50, 3, 30)).stderr for _ in range(1_000)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.02)


def test_overrides_reach_every_field():
    config = command_line.override(
        command_line.load_config_file(str(ROOT / 'configs' / 'catch.py')),
        ['--vtrace.lambda', '0.9', '--vtrace.rho-bar', 'inf', '--evaluator.greedy', '--learner.num-devices', '2'],
    )
    assert config.vtrace.lambda_ == 0.9 and config.vtrace.rho_bar == float('inf')
    assert config.evaluator.greedy and config.learner.num_devices == 2
    with pytest.raises(ConfigError, match='did you mean'):
        command_line.override(config, ['--vtrace.lamda', '0.9'])


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_every_configuration_file_is_valid(path):
    command_line.load_config_file(str(path))
