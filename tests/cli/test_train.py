"""The command `impala train`."""

import json

from tests.helpers.commands import train, write


def test_missing_arguments_get_one_line(call):
    status, _, reason = call('train', '--config', 'configs/catch.py')
    assert status != 0 and len(reason.splitlines()) == 1 and '--workdir' in reason


def test_an_unwritable_workdir_gets_one_line(call, tmp_path):
    file = write(tmp_path / 'file', '')
    status, _, reason = train(call, file / 'run')
    assert status != 0 and len(reason.splitlines()) == 1 and str(file) in reason


def halve(path):
    """Cuts every file of a checkpoint in half."""
    for file in path.rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_checkpoint_cut_in_half_is_not_resumed(call, finished, caplog):
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


def test_a_configuration_that_does_not_fit_the_checkpoint_is_refused(call, finished):
    status, _, reason = train(call, finished, '--network.core', 'lstm', '--loss.discount', '0.9')
    assert status != 0 and len(reason.splitlines()) == 1
    assert 'network.core' in reason and 'loss.discount' in reason and '0.9' in reason and 'workdir' in reason
