"""Bad input gets one clear line that names the value and the remedy, before any long work; and what it needs to say."""

import pytest

from impala_jax.cli import command_line
from impala_jax.config import ConfigError
from tests.helpers.commands import train, write
from tests.helpers.programs import ROOT


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


def test_bad_configuration_files_get_one_line(call, tmp_path):
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


def test_overrides_reach_every_field():
    config = command_line.override(
        command_line.load_config_file(str(ROOT / 'configs' / 'catch.py')),
        ['--vtrace.lambda', '0.9', '--vtrace.rho-bar', 'inf', '--evaluator.greedy', '--learner.num-devices', '2'],
    )
    assert config.vtrace.lambda_ == 0.9 and config.vtrace.rho_bar == float('inf')
    assert config.evaluator.greedy and config.learner.num_devices == 2
    with pytest.raises(ConfigError, match='did you mean'):
        command_line.override(config, ['--vtrace.lamda', '0.9'])


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--coordinator', 'a:1'], 'go together'),
        (['--coordinator', 'a', '--num-hosts', '2', '--host-id', '0'], 'is not HOST:PORT'),
        (['--coordinator', 'a:1', '--num-hosts', '2', '--host-id', '2'], '--host-id 2 of --num-hosts 2'),
        (['--coordinator', 'a:1', '--num-hosts', '2', '--host-id', '0', '--simulate-hosts', '2'], 'exclude each other'),
        (['--simulate-hosts', '0'], '--simulate-hosts must be positive, got 0'),
        (['--runtime', 'lockstep'], 'lockstep'),
        (['--launch-type', 'local_mp'], 'local_mt'),
        (['--learner.batchsize', '8'], "'--learner.batch-size'"),
    ],
)
def test_bad_options_of_a_pod_are_refused(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=words):
        command_line.pod_arguments(['--config', 'configs/catch.py', '--workdir', 'x', *arguments])
