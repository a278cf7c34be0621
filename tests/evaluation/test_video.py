"""Videos: whatever an environment renders is a picture or one line, and never costs the scores."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import impala_jax
from impala_jax import environments
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import base
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.evaluation.video import Recording, VideoError, check_video
from tests.helpers import factories
from tests.helpers.programs import ROOT

pytestmark = pytest.mark.filterwarnings('ignore:os.fork')  # ffmpeg is a program of its own.


def record(steps=9):
    """A recording of a game of `factories.draws`."""
    environment = SerialVectorEnvironment(factories.draws, 1, seed=0, name='tests.helpers.factories:draws')
    recording = Recording(7)
    environment.reset()
    for _ in range(steps):
        recording.add(environment.render)
        environment.step(np.zeros(1, np.int32))
    environment.close()
    return recording


@pytest.mark.parametrize(
    'kind, size, value',
    [
        ('board', (320, 160), None),
        ('grey', (200, 150), 80),
        ('rgba', (200, 150), 80),
        ('floats', (200, 150), 127),
        ('integers', (200, 150), 80),
        ('flags', (200, 150), 255),
        ('growing', (200, 150), 80),
    ],
)
def test_pictures_of_any_kind_are_taken(monkeypatch, kind, size, value):
    monkeypatch.setenv('PICTURES', kind)
    recording = record()
    assert recording.problem is None and len(recording.frames) == 9
    for frame in recording.frames:
        assert frame.shape == (*size, 3) and frame.dtype == np.uint8
        assert value is None or (frame == value).all()


@pytest.mark.parametrize('colours', [1, 3])
@pytest.mark.parametrize('frames', [0, 4])
def test_observations_are_pictures_wherever_their_channels_are(frames, colours):
    """Of stacked frames the newest one."""
    grey = colours == 1
    image = np.random.RandomState(0).randint(0, 256, [40, 30, colours]).astype(np.uint8)
    expected = np.repeat(image, 3, axis=-1) if grey else image
    if frames:
        stack = np.stack([*np.zeros([frames - 1, *image.shape], np.uint8), image])
        seen = [stack, stack.transpose(0, 3, 1, 2)] + (
            [stack[..., 0], stack[..., 0].transpose(1, 2, 0)] if grey else []
        )
    else:
        seen = [image, image.transpose(2, 0, 1)] + ([image[..., 0]] if grey else [])
    for observation in seen:
        np.testing.assert_array_equal(base.picture(observation, 40, 30), expected)
    for shape in ((5,), (1, 7), (6, 7, 8, 9)):
        with pytest.raises(NotImplementedError, match='is not an image'):
            base.picture(np.zeros(shape))


@pytest.mark.parametrize(
    'kind, problem',
    [
        ('none', "render() of environment 'tests.helpers.factories:draws' returned None instead of an image"),
        ('text', 'returned a str instead of'),
        ('list', 'returned a list instead of'),
        ('vector', 'returned an array of shape (3,) and dtype uint8 instead of'),
        ('wide_floats', 'returned float64 values from 1.5 to 1.5 instead of'),
        ('raises', 'render() failed: no light'),
    ],
)
def test_what_is_not_a_picture_is_one_line(monkeypatch, tmp_path, kind, problem):
    monkeypatch.setenv('PICTURES', kind)
    recording = record()
    assert recording.problem is not None and problem in recording.problem and recording.frames == []
    pytest.importorskip('imageio_ffmpeg')
    (tmp_path / 'a.mp4').write_bytes(b'of another day')
    with pytest.raises(VideoError) as error:
        recording.write(tmp_path / 'a.mp4')
    assert '\n' not in str(error.value) and problem in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'of another day']


def test_the_reason_of_a_worker_is_kept():
    def render():
        raise base.EnvironmentFailure('in the worker process:\nTraceback ...\nValueError: boom')

    recording = Recording(5.0)
    recording.add(render)
    assert recording.problem == 'render() failed: ValueError: boom'


def test_an_environment_that_does_not_answer_ends_the_games():
    def render():
        raise TimeoutError('waited 5 s')

    with pytest.raises(TimeoutError):
        Recording(7).add(render)


@pytest.mark.parametrize('ending', ['mp4', 'gif'])
def test_a_video_has_the_environments_rate(tmp_path, ending):
    imageio = pytest.importorskip('imageio.v2')
    pytest.importorskip('imageio_ffmpeg')
    path = tmp_path / f'a.{ending}'
    record().write(path)
    with imageio.get_reader(path) as reader:
        data = reader.get_meta_data()
    assert data['fps'] == 7 if ending == 'mp4' else data['duration'] == pytest.approx(1000 / 7, abs=10)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'name, rate',
    [
        ('tests.helpers.factories:draws', 7),
        ('catch', None),
        pytest.param('gymnasium/CartPole-v1', 50, marks=pytest.mark.atari),  # whose packages include Gymnasium
        pytest.param('atari/pong', 15, marks=pytest.mark.atari),
    ],
)
def test_environments_state_their_rate(name, rate):
    environment = environments.make(EnvironmentConfig(name, processes=int('/' not in name)), 1, seed=0)
    environment.close()
    assert environment.spec.render_fps == rate


def test_a_file_that_cannot_be_written_is_refused_before_the_games(tmp_path):
    for path, message in (
        (tmp_path / 'a.avi', 'must end in .mp4 or .gif'),
        (tmp_path / 'none' / 'a.mp4', 'there is no directory'),
        (tmp_path / 'folder.mp4', 'there is a directory of this name'),
    ):
        (tmp_path / 'folder.mp4').mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=message):
            check_video(path)


def test_a_video_that_fails_costs_no_scores(tmp_path, monkeypatch, capsys):
    pytest.importorskip('imageio_ffmpeg')
    config = impala_jax.Config(
        total_frames=1,
        environment=EnvironmentConfig('tests.helpers.factories:draws', processes=1),
        network=impala_jax.NetworkConfig(mlp_sizes=(8,)),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=2, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=1, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=0),
    )
    impala_jax.run(config, tmp_path / 'run', runtime='threads')
    assert 'the network reads observation [10, 5] float32: an mlp\n' in capsys.readouterr().out
    scores, video = tmp_path / 'scores.json', tmp_path / 'a.mp4'
    arguments = ['--workdir', tmp_path / 'run', '--episodes', '3', '--json', scores, '--video', video]
    done = subprocess.run(
        [sys.executable, 'launch/evaluate.py', *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'PICTURES': 'text', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    reason = f"error: --video {video}: render() of environment 'tests.helpers.factories:draws' returned a str"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(reason), done.stderr
    assert 'mean' in done.stdout and json.loads(scores.read_text())['episodes'] == 3 and not video.exists()

    monkeypatch.setenv('PICTURES', 'none')
    with pytest.raises(VideoError, match='returned None') as error:
        impala_jax.evaluate(tmp_path / 'run', episodes=3, video=video)
    assert error.value.scores is not None and error.value.scores['episodes'] == 3
