"""The command `impala evaluate`."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.programs import ROOT

COUNT_FRAMES = 'import imageio.v2, sys; print(sum(1 for _ in imageio.v2.get_reader(sys.argv[1]).iter_data()))'


@pytest.mark.parametrize('video', ['a.mp4', 'a.gif'])
def test_a_run_is_evaluated_with_scores_and_a_video(finished, video):
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


def test_bad_input_gets_one_line(call, finished, tmp_path):
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
