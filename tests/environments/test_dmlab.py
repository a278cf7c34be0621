"""DeepMind Lab: against a stand-in with the real module's interface and pitfalls, and the real one where installed."""

import concurrent.futures
import contextlib
import importlib
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import impala_jax
from impala_jax import data, environments
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import EnvironmentFailure, dmlab
from impala_jax.environments.base import environment_spec
from impala_jax.system import machine
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec
from tests.helpers.programs import ROOT, STAND_INS, children, command_line, marked_processes, wait_for

FORWARD, BACKWARD, FIRE = 0, 1, 8
PLAIN, LANGUAGE = 'dmlab/rooms_watermaze', 'dmlab/language_select_described_object'
PSYCHLAB = 'contributed/dmlab30/psychlab_continuous_recognition'
STEPS = 11  # of an episode of the stand-in: 42 frames, four a step


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The stand-in as `deepmind_lab`, here and in worker processes, and a folder for all temporary files."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.delitem(sys.modules, 'deepmind_lab', raising=False)
    folder = tmp_path / 'tmp'
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    monkeypatch.delenv('LP_NUM_THREADS', raising=False)
    yield importlib.import_module('deepmind_lab')
    del sys.modules['deepmind_lab']  # Not by monkeypatch, which would put it back.


@pytest.fixture(params=['stand-in', pytest.param('real', marks=pytest.mark.dmlab)])
def engine(request):
    """Both modules, one after the other."""
    return (
        request.getfixturevalue('stand_in') if request.param == 'stand-in' else importlib.import_module('deepmind_lab')
    )


@pytest.fixture
def make(tmp_path):
    """Vectors of environments that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(name=PLAIN, num_envs=1, seed=0, evaluation=False, **options):
            config = EnvironmentConfig(name=name, **{'level_cache': str(tmp_path / 'cache'), **options})
            vector = environments.make(config, num_envs, seed, evaluation=evaluation, timeout_s=120)
            stack.callback(vector.close)
            return vector

        yield make


def test_the_spec_has_a_picture_and_words(engine, tmp_path):
    spec = environments.spec(EnvironmentConfig(name=PLAIN, level_cache=str(tmp_path)))
    rgb, words = ArraySpec((72, 96, 3), np.dtype(np.uint8)), ArraySpec((16,), np.dtype(np.int32), bounds=(0, 1000))
    assert spec == EnvironmentSpec({'rgb': rgb, 'instruction': words}, 9, render_fps=15)
    assert not children()


def test_the_spec_of_the_suite_takes_one_engine(stand_in, monkeypatch):
    started = []

    class Counted(environments.ProcessVectorEnvironment):
        def __init__(self, config, *args, **kwargs):
            started.append(config.name)
            super().__init__(config, *args, **kwargs)

    monkeypatch.setattr(environments, 'ProcessVectorEnvironment', Counted)
    spec = environments.spec(EnvironmentConfig('dmlab30', level_cache='', dataset_path='dummy'))
    assert len(spec.tasks) == 30 and started == ['dmlab/rooms_collect_good_objects_train']
    assert spec._replace(tasks=()) == environments.spec(EnvironmentConfig(name=PLAIN, level_cache=''))
    started.clear()
    with pytest.raises(ConfigError, match='dmlab/psychlab_arbitrary_visuomotor_mapping needs pictures'):
        environments.spec(EnvironmentConfig('dmlab30', level_cache=''))
    assert not started


def test_an_episode_of_the_engine_is_whole(engine, make):
    """What holds of every level of either module."""
    vector = make(LANGUAGE, num_envs=2)
    timestep = vector.reset()
    assert timestep.observation['rgb'].shape == (2, 72, 96, 3) and timestep.observation['rgb'].dtype == np.uint8
    assert (timestep.observation['instruction'] > 0).any(axis=1).all()
    np.testing.assert_array_equal(timestep.step_type, FIRST)
    returns, ended = np.zeros(2), np.zeros(2, bool)
    for t in range(4000):
        before = timestep
        timestep, info = vector.step(np.full(2, t % 9))
        returns += np.where(ended, 0, timestep.reward)
        for i in np.flatnonzero((timestep.step_type == LAST) & ~ended):
            assert timestep.discount[i] == 0 and info.episode_return[i] == pytest.approx(returns[i])
            np.testing.assert_array_equal(timestep.observation['rgb'][i], before.observation['rgb'][i])
            ended[i] = True
        if ended.all():
            break
    assert ended.all()
    assert vector.render().shape == (320, 432, 3)


def test_time_rewards_and_the_end_of_an_episode(stand_in, make):
    vector = make(PLAIN)
    vector.reset()
    for _ in range(2):
        for t in range(1, STEPS + 1):
            timestep, info = vector.step([FORWARD])
            assert timestep.step_type == (LAST if t == STEPS else MID)
            assert timestep.reward == (2 if t == STEPS else 4)  # Of the last four frames only two are played.
            assert timestep.discount == (0 if t == STEPS else 1)
        assert info.episode_return == 42
        timestep, info = vector.step([FIRE])
        assert timestep.step_type == FIRST and timestep.reward == 0
    assert EnvironmentConfig(name=PLAIN).frames_per_step == 4
    vector = make(PLAIN, action_repeat=1)
    vector.reset()
    assert vector.step([FORWARD])[0].reward == 1


def test_the_nine_actions_are_those_of_the_paper(stand_in, make):
    vector = make(PLAIN)
    vector.reset()
    rewards = [vector.step([action])[0].reward[0] for action in range(9)]
    assert rewards == [4, -4, 0, 0, 0, 0, 4, 4, -2]
    sides = {tuple(action) for action in dmlab.ACTIONS[:, :4].tolist()}
    assert sides >= {(0, 0, -1, 0), (0, 0, 1, 0), (-20, 0, 0, 0), (20, 0, 0, 0), (-20, 0, 0, 1), (20, 0, 0, 1)}
    with pytest.raises(ValueError, match='actions must lie in'):
        vector.step([9])


def test_the_instruction_changes_inside_an_episode(stand_in, make):
    vector = make(LANGUAGE)
    seen = [vector.reset().observation['instruction'][0]]
    seen += [vector.step([0])[0].observation['instruction'][0] for _ in range(STEPS - 1)]
    assert len({tuple(words) for words in seen}) == 2
    for words, color in ((seen[0], 'red'), (seen[-1], 'blue')):
        assert words[0] == dmlab.word_ids('Pick')[0] and words[2] == dmlab.word_ids(color)[0]
    assert not make(PLAIN).reset().observation['instruction'].any()


def test_word_ids_are_checksums(caplog):
    words = dmlab.word_ids('Pick the  red object,')
    assert words.shape == (16,) and words.dtype == np.int32
    expected = [zlib.crc32(word) % 1000 + 1 for word in (b'Pick', b'the', b'red', b'object,')]
    assert words.tolist() == expected + [0] * 12
    assert expected[1] == 79  # the same in every process and version
    assert not dmlab.word_ids('').any()
    unknown = dmlab.word_ids('grünlich 物体 ' + 'x' * 1000)
    assert (unknown[:3] > 0).all() and not unknown[3:].any()
    every = np.concatenate([dmlab.word_ids(f'{i}') for i in range(20_000)])
    assert set(every.tolist()) == set(range(1001))

    dmlab._report_long_instructions.cache_clear()
    with caplog.at_level(logging.WARNING):
        long, longer = dmlab.word_ids('a b c d e f g h ' * 2 + 'left out'), dmlab.word_ids('a ' * 40)
    assert (long > 0).all() and (longer == longer[0]).all()
    assert len(caplog.records) == 1 and 'more than 16 words' in caplog.text


def test_all_levels_of_dmlab30_are_played(stand_in, tmp_path):
    levels = data.dmlab30_levels()
    assert len(levels) == 30
    assert {train: test for train, test in levels.items() if train != test} == {
        'rooms_collect_good_objects_train': 'rooms_collect_good_objects_test',
        'rooms_exploit_deferred_effects_train': 'rooms_exploit_deferred_effects_test',
    }
    for level in levels:
        for name in (level, f'contributed/dmlab30/{level}'):
            config = EnvironmentConfig(name=f'dmlab/{name}', level_cache='', dataset_path='dummy')
            for evaluation in (False, True):
                # In this process, which must not fork while it holds a Lab.
                environment = dmlab.factory(config, evaluation)(0)
                assert environment_spec(environment, level).num_actions == 9
                played = levels[level] if evaluation else level
                assert environment._lab._level == played  # pyright: ignore[reportAttributeAccessIssue]
                assert (environment._lab._mixer_seed == '0x600D5EED') == evaluation  # pyright: ignore
                assert environment.reset().first()
                environment.close()
    assert not os.listdir(machine.own_folder())


@pytest.mark.dmlab
@pytest.mark.slow
@pytest.mark.parametrize('level', list(data.dmlab30_levels()))
def test_all_levels_of_the_real_engine_are_played(level, make):
    vector = make(f'dmlab/{level}', dataset_path='dummy')
    assert vector.reset().step_type == FIRST
    assert vector.step([FORWARD])[0].step_type == MID


@pytest.mark.parametrize('level', ['seekavoid_arena_01', 'demos/random_maze'])
def test_levels_outside_dmlab30_are_played(level, engine, make):
    """Some of which have no instruction."""
    vector = make(f'dmlab/{level}', num_envs=2)
    for timestep in (vector.reset(), vector.step([FORWARD] * 2)[0]):
        assert timestep.observation['instruction'].shape == (2, 16)
        assert not timestep.observation['instruction'].any()
    assert timestep.step_type.tolist() == [MID] * 2


def test_a_level_of_dmlab30_without_instruction_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, '_WITHOUT_INSTRUCTION', {'contributed/dmlab30/rooms_watermaze'})
    with pytest.raises(ConfigError) as error:
        dmlab.factory(EnvironmentConfig(name=PLAIN, level_cache=''))(0)
    assert str(error.value) == (
        "DeepMind Lab cannot build 'dmlab/rooms_watermaze': Unknown observation 'INSTR'; is the build complete?"
    )
    assert not os.listdir(machine.own_folder())


def program_environment():
    """For a program that uses the stand-in as it stands here."""
    return {**os.environ, 'PYTHONPATH': f'{STAND_INS}:{ROOT}', 'TMPDIR': tempfile.gettempdir()}


def refusal(name=PLAIN, **options):
    """The one line that refuses an environment, and no process is left."""
    with pytest.raises(ConfigError) as error:
        environments.make(EnvironmentConfig(name=name, **{'level_cache': '', **options}), 1, 0, timeout_s=60)
    assert not children()
    assert '\n' not in str(error.value)
    return str(error.value)


def test_what_cannot_be_played_is_refused(stand_in, tmp_path):
    text = refusal('dmlab/rooms_watermase')
    assert 'dmlab/rooms_watermase' in text and "did you mean 'dmlab/rooms_watermaze'" in text
    with pytest.raises(ConfigError, match='rooms_watermaze'):
        dmlab.factory(EnvironmentConfig(name='dmlab/rooms_watermase', level_cache=''))(0)
    assert not os.listdir(machine.own_folder())
    text = refusal('dmlab/rooms_collect_good_objects_test')
    assert 'held out' in text and 'train on dmlab/rooms_collect_good_objects_train' in text
    text = refusal('dmlab/psychlab_continuous_recognition')
    assert '--environment.dataset-path' in text and "'dummy'" in text
    for name in (PLAIN, 'dmlab/psychlab_continuous_recognition'):
        assert 'No such file or directory' in refusal(name, dataset_path=str(tmp_path / 'none'))
    (tmp_path / 'file').touch()
    assert 'Not a directory' in refusal(level_cache=str(tmp_path / 'file' / 'cache'))
    with pytest.raises(ConfigError, match='environment.processes 2: each environment .* has its own process'):
        EnvironmentConfig(name=PLAIN, processes=2)


def test_a_folder_without_the_pictures_is_refused_where_they_are_needed(stand_in, make, tmp_path):
    name, folder = 'dmlab/psychlab_continuous_recognition', tmp_path / 'pictures'
    folder.mkdir()
    assert refusal(name, dataset_path=str(folder)) == (
        f"environment.dataset_path '{folder}' lacks 2400 of the 2400 pictures 0001.png to 2400.png that docs/dmlab.md "
        "describes, 0001.png first; add them, or give 'dummy'"
    )
    assert make(PLAIN, dataset_path=str(folder)).reset().step_type == FIRST  # As of an own level with other pictures.
    for i in range(2400):
        (folder / f'{i + 1:04d}.png').touch()
    assert make(name, dataset_path=str(folder)).reset().step_type == FIRST
    (folder / '0777.png').unlink()
    with pytest.raises(ConfigError, match='lacks 1 of the 2400 pictures .* 0777.png first'):
        make(name, dataset_path=str(folder))


@pytest.mark.parametrize('failure, reason', [('no library', 'Failed to connect RL API'), ('no GPU', 'exit code 3')])
def test_hardware_rendering_that_fails_is_refused_before_a_run_begins(failure, reason, stand_in, monkeypatch, capfd):
    monkeypatch.setenv('DMLAB_STAND_IN_HARDWARE', failure)
    assert environments.spec(EnvironmentConfig(name=PLAIN, level_cache='')).num_actions == 9
    with pytest.raises(ConfigError) as error:
        environments.spec(EnvironmentConfig(name=PLAIN, level_cache='', renderer='hardware'))
    text = str(error.value)
    assert reason in text and "'software' renders on the CPU" in text and '\n' not in text
    assert not children() and not os.listdir(machine.own_folder())


@pytest.mark.skipif(importlib.util.find_spec('deepmind_lab') is not None, reason='deepmind_lab is installed')
def test_without_the_module_the_error_says_what_to_do():
    text = refusal()
    assert 'deepmind_lab' in text and 'docs/dmlab.md' in text


def test_warnings_at_import_are_not_shown_and_others_are(stand_in, monkeypatch, make, capfd):
    monkeypatch.setenv('DMLAB_STAND_IN_WARNS', '1')
    monkeypatch.setenv('PYTHONWARNINGS', 'always')
    vector = make(num_envs=2)
    vector.reset()
    vector.close()
    output = ''.join(capfd.readouterr())
    code = "import warnings; from impala_jax.environments import dmlab; dmlab._import_engine(); warnings.warn('kept')"
    done = subprocess.run([sys.executable, '-c', code], env=program_environment(), capture_output=True, text=True)
    for text in ('pkg_resources is deprecated', 'the imp module is deprecated', '_SixMetaPathImporter'):
        assert text not in output and text not in done.stderr
    assert 'UserWarning: kept' in done.stderr


def workers():
    return {i: children(f'environments {i} to')[0] for i in range(3)}


def folders():
    """The engines' temporary folders: each process has one."""
    return [file.parent for file in Path(machine.own_folder()).rglob('engine')]


def test_each_environment_has_a_process_and_a_temporary_folder(stand_in, make):
    vector = make(num_envs=3)
    vector.reset()
    assert {int((folder / 'engine').read_text()) for folder in folders()} == set(workers().values())
    assert len(children()) == 3
    vector.close()
    assert not os.listdir(machine.own_folder())


def test_a_killed_process_is_replaced_and_its_folder_removed(stand_in, make, caplog):
    vector = make(num_envs=3)
    vector.reset()
    vector.step([FORWARD] * 3)
    before = {folder.parent for folder in folders()}
    os.kill(workers()[1], signal.SIGKILL)
    wait_for(lambda: not children('environments 1 to'))
    with caplog.at_level(logging.WARNING):
        timestep, info = vector.step([FORWARD] * 3)
    np.testing.assert_array_equal(timestep.step_type, [MID, FIRST, MID])
    np.testing.assert_array_equal(info.restarts, [0, 1, 0])
    assert 'exit code -9 (SIGKILL); it is replaced' in caplog.text
    after = {folder.parent for folder in folders()}
    assert len(after) == 3 and len(before & after) == 2
    assert {path.name for path in Path(machine.own_folder()).iterdir()} == {path.name for path in after}
    for _ in range(STEPS):
        timestep, info = vector.step([FORWARD] * 3)
    vector.close()
    assert not os.listdir(machine.own_folder())


def test_a_missing_map_ends_the_run_after_some_attempts(stand_in, make):
    vector = make('dmlab/tests/missing_map', max_failures=2)
    with pytest.raises(EnvironmentFailure, match='exit code 1.*2 times'):
        vector.reset()
    vector.close()
    assert not os.listdir(machine.own_folder())


@pytest.fixture
def slow(stand_in, monkeypatch, tmp_path):
    """Sets how long a reset takes; `compilers()` are the processes that take the time."""
    monkeypatch.setenv('RUN_MARK', str(tmp_path))

    def set_reset(seconds):
        monkeypatch.setenv('DMLAB_STAND_IN_RESET_S', f'{seconds}')

    set_reset.compilers = lambda: {pid for pid in marked_processes(tmp_path) if 'sleep' in command_line(pid)}
    return set_reset


def require_nothing_left(slow):
    assert not children()
    wait_for(lambda: not slow.compilers(), timeout_s=5)
    assert not folders()


def test_a_worker_killed_in_a_reset_is_replaced_at_once(slow, make, caplog):
    """Its compilers, which hold its pipe, would take a minute."""
    slow(60)
    vector = make(level_cache='')
    (worker,) = children('environments 0 to')
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        timestep = pool.submit(vector.reset)
        wait_for(lambda: len(slow.compilers()) == 2, timeout_s=30)
        compilers = slow.compilers()
        slow(0.1)
        os.kill(worker, signal.SIGKILL)
        start = time.monotonic()
        assert timestep.result(30).step_type == FIRST
        took = time.monotonic() - start
    assert took < 15 and 'exit code -9 (SIGKILL); it is replaced' in caplog.text
    wait_for(lambda: not compilers & slow.compilers(), timeout_s=5)
    vector.close()
    require_nothing_left(slow)


def test_a_reset_beyond_the_time_out_is_said_and_leaves_nothing(slow, tmp_path):
    slow(60)
    vector = environments.make(EnvironmentConfig(name=PLAIN, level_cache=''), 2, 0, timeout_s=8)
    start = time.monotonic()
    try:
        with pytest.raises(
            TimeoutError, match="waited 8 s for the worker process .* to answer 'reset'; raise timeout_s"
        ):
            vector.reset()
        assert len(slow.compilers()) == 4
    finally:
        vector.close()
    assert time.monotonic() - start < 8 + 10
    require_nothing_left(slow)


def test_a_run_over_slow_and_noisy_levels_trains(slow, monkeypatch, tmp_path, capfd):
    """Without instructions, too; every third episode or so has a step of a second."""
    slow(0.7)
    for name, value in (('STEP_S', '1'), ('STEP_EVERY', '31'), ('WARNS', '1')):
        monkeypatch.setenv(f'DMLAB_STAND_IN_{name}', value)
    config = impala_jax.Config(
        total_frames=1200,
        environment=EnvironmentConfig(name='dmlab/demos/random_maze', level_cache=''),
        network=impala_jax.NetworkConfig(torso='shallow', core='lstm', lstm_size=8),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=15, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=2, num_envs=2),
        evaluator=impala_jax.EvaluatorConfig(episodes=2, num_envs=2),
    )
    result = impala_jax.run(config, tmp_path / 'run', runtime='threads')
    assert result.frames == 1200 and result.evaluation is not None and len(result.evaluation.returns) == 2
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['episodes'] >= 4 and rows[-1]['environment_restarts'] == 0
    output = ''.join(capfd.readouterr())
    assert 'pkg_resources' not in output and 'Traceback' not in output
    require_nothing_left(slow)


def test_nothing_stays_when_the_parent_is_killed(stand_in, tmp_path):
    script = tmp_path / 'parent.py'
    script.write_text(f"""
import time
from impala_jax import environments
from impala_jax.config import EnvironmentConfig
if __name__ == '__main__':
    vector = environments.make(EnvironmentConfig(name={PLAIN!r}, level_cache=''), 2, 0)
    vector.reset()
    print('ready', flush=True)
    time.sleep(60)
""")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=program_environment())
    assert parent.stdout is not None and parent.stdout.readline() == b'ready\n'
    assert len(list(Path(tempfile.gettempdir()).rglob('engine'))) == 2
    parent.kill()
    parent.wait(10)
    # Its workers held the other ends of the pipe of its output, too: when it ends, they have ended.
    assert parent.stdout.read() == b''
    parent.stdout.close()
    wait_for(lambda: not os.listdir(tempfile.gettempdir()))


def test_seeds_decide_the_episodes(stand_in, make):
    def pictures(seed, evaluation=False):
        vector = make(num_envs=2, seed=seed, evaluation=evaluation)
        vector.reset()
        return np.stack([vector.step([0, 0])[0].observation['rgb'][:, 0, 0, 0] for _ in range(2 * STEPS)])

    first, again, other = pictures(1), pictures(1), pictures(2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9
    assert (first != pictures(1, evaluation=True)).mean() > 0.9  # for the mixer seed of tests
    assert (first[:, 0] != first[:, 1]).mean() > 0.9
    assert (first[:STEPS] != first[STEPS:]).mean() > 0.9


def test_a_run_with_it_resumes_with_new_episodes(stand_in, make):
    vector = make()
    vector.reset()
    with pytest.raises(NotImplementedError, match='resumes with new episodes: TypeError: cannot '):
        vector.get_state()


def test_the_software_renderer_has_no_threads_of_its_own(stand_in, monkeypatch):
    monkeypatch.setenv('LP_NUM_THREADS', '0')
    del os.environ['LP_NUM_THREADS']
    config = EnvironmentConfig(name=PLAIN, level_cache='', renderer='hardware')
    dmlab.factory(config)(0).close()
    assert os.environ['LP_NUM_THREADS'] == '0'


class TestLevelCache:
    def test_what_was_written_is_fetched(self, tmp_path):
        cache, other = dmlab.LevelCache(tmp_path / 'a' / 'cache'), dmlab.LevelCache(tmp_path / 'a' / 'cache')
        (tmp_path / 'map').write_bytes(b'walls')
        target = tmp_path / 'fetched'
        assert cache.fetch('some/key ../..', str(target)) is False and not target.exists()
        cache.write('some/key ../..', str(tmp_path / 'map'))
        assert other.fetch('some/key ../..', str(target)) is True and target.read_bytes() == b'walls'
        assert other.fetch('another', str(target)) is False
        assert [path.suffix for path in (tmp_path / 'a' / 'cache').iterdir()] == ['.pk3']

    def test_maps_are_compiled_once_by_all_processes(self, stand_in, make, tmp_path):
        vector = make(num_envs=2)
        for _ in range(12):
            vector.reset()
        assert len(list((tmp_path / 'cache').iterdir())) == 3  # as many as the stand-in has
        assert any((folder / 'compiled').exists() for folder in folders())
        vector.close()
        vector = make(num_envs=2, seed=1)
        vector.reset()
        assert len(folders()) == 2 and not any((folder / 'compiled').exists() for folder in folders())

    def test_a_file_appears_whole_or_not_at_all(self, tmp_path, monkeypatch):
        cache = dmlab.LevelCache(tmp_path / 'cache')
        (tmp_path / 'map').write_bytes(b'walls')

        def crash(_):
            assert not list((tmp_path / 'cache').glob('*.pk3'))
            raise KeyboardInterrupt

        monkeypatch.setattr(os, 'fsync', crash)
        with pytest.raises(KeyboardInterrupt):
            cache.write('key', str(tmp_path / 'map'))
        assert cache.fetch('key', str(tmp_path / 'fetched')) is False

    def test_a_full_disk_is_reported_once_and_trained_through(self, stand_in, make, tmp_path, caplog):
        disk = tmp_path / 'disk'
        disk.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', disk], capture_output=True).returncode:
            pytest.skip('no disk can be mounted here')
        try:
            vector = make(num_envs=3, level_cache=str(disk / 'cache'))
            for _ in range(4):
                vector.reset()
            for _ in range(2 * STEPS):
                vector.step([FORWARD] * 3)
            vector.close()
            assert not list((disk / 'cache').iterdir())
        finally:
            subprocess.run(['umount', disk], check=True)
        reports = [message for message in caplog.messages if 'level cache' in message]
        assert len(reports) == 1 and 'No space left on device' in reports[0]

    def test_of_processes_that_share_a_full_disk_one_reports(self, tmp_path, caplog, monkeypatch):
        def full(_):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', full)
        (tmp_path / 'map').write_bytes(b'walls')
        folder = tmp_path / 'cache'
        cache = dmlab.LevelCache(folder)
        with caplog.at_level(logging.WARNING):
            cache.write('key', str(tmp_path / 'map'))
            num_files = len(os.listdir('/proc/self/fd'))
            cache.write('key', str(tmp_path / 'map'))
        assert len(os.listdir('/proc/self/fd')) == num_files
        assert len(caplog.records) == 1 and 'No space left' in caplog.text and str(folder) in caplog.text
        assert not list(folder.iterdir())
        second = dmlab.LevelCache(folder)  # Its lock is another, as in another process.
        second.write('key', str(tmp_path / 'map'))
        assert len(caplog.records) == 1

    def test_what_cannot_be_read_is_compiled_again(self, tmp_path, caplog):
        cache = dmlab.LevelCache(tmp_path)
        cache._path('key').mkdir()
        assert cache.fetch('key', str(tmp_path / 'fetched')) is False
        assert not (tmp_path / 'fetched').exists() and 'cannot be read: Is a directory' in caplog.text

    @pytest.mark.parametrize('size', [0, 20, 4000])
    def test_a_damaged_file_is_removed_and_reported_once(self, size, tmp_path, caplog):
        cache, target = dmlab.LevelCache(tmp_path / 'cache'), tmp_path / 'fetched'
        (tmp_path / 'map').write_bytes(b'walls' * 1000)
        for key in 'abc':
            cache.write(key, str(tmp_path / 'map'))
            stored = cache._path(key).read_bytes()
            damaged = stored[: size - 1] + b'x' + stored[size:] if size else stored[:-1]
            cache._path(key).write_bytes(damaged)
        assert cache.fetch('a', str(target)) is False and cache.fetch('b', str(target)) is False
        assert not target.exists() and list((tmp_path / 'cache').iterdir()) == [cache._path('c')]
        assert len(caplog.records) == 1 and f"held a damaged file (or an older version's), {cache._path('a').name}" in (
            caplog.text
        )
        # Another process need not report it again, but does remove it.
        assert dmlab.LevelCache(tmp_path / 'cache').fetch('c', str(target)) is False
        assert not list((tmp_path / 'cache').iterdir()) and len(caplog.records) == 1
        cache.write('a', str(tmp_path / 'map'))
        assert cache.fetch('a', str(target)) is True and target.read_bytes() == b'walls' * 1000

    def test_a_whole_file_of_another_map_or_of_an_older_version_is_not_believed(self, tmp_path):
        cache = dmlab.LevelCache(tmp_path / 'cache')
        (tmp_path / 'map').write_bytes(b'walls')
        cache.write('a', str(tmp_path / 'map'))
        os.rename(cache._path('a'), cache._path('b'))
        cache._path('c').write_bytes(b'walls')
        for key in 'bc':
            assert cache.fetch(key, str(tmp_path / 'fetched')) is False
        assert not list((tmp_path / 'cache').iterdir())

    def test_a_damaged_map_does_not_end_the_engine(self, stand_in, make, tmp_path, caplog):
        vector = make(max_failures=1)
        for _ in range(12):
            vector.reset()
        vector.close()
        for path in (tmp_path / 'cache').iterdir():
            path.write_bytes(path.read_bytes()[:-100])
        vector = make(max_failures=1)
        for _ in range(12):
            vector.reset()
        assert len(caplog.records) == 1 and 'damaged' in caplog.text

    def test_a_cache_that_was_emptied_is_made_again(self, tmp_path):
        cache = dmlab.LevelCache(tmp_path / 'cache')
        (tmp_path / 'cache').rmdir()
        (tmp_path / 'map').write_bytes(b'walls')
        cache.write('key', str(tmp_path / 'map'))
        assert cache.fetch('key', str(tmp_path / 'fetched')) is True


class TestStandIn:
    """It refuses what the real one refuses: of constructors this is tested on both, where that is installed."""

    @pytest.mark.parametrize(
        'arguments, options, error',
        [
            ((b'seekavoid_arena_01', ['INSTR']), {}, TypeError),
            (('contributed/dmlab30/rooms_watermaze', ('INSTR',)), {}, TypeError),
            (('contributed/dmlab30/rooms_watermaze', ['RGBD_']), {}, ValueError),
            (('contributed/dmlab30/rooms_watermaze', ['INSTR'], {'widht': '96'}), {}, RuntimeError),
            (('contributed/dmlab30/rooms_watermaze', ['INSTR'], {'width': 96}), {}, TypeError),
            (('contributed/dmlab30/rooms_watermaze', ['INSTR']), {'renderer': 'gpu'}, RuntimeError),
            (('contributed/dmlab30/no_such_level', ['INSTR']), {}, RuntimeError),
            (('contributed/dmlab30/rooms_collect_good_objects_test', ['INSTR']), {}, RuntimeError),
        ],
    )
    def test_its_constructor_refuses_what_the_engines_does(self, engine, arguments, options, error):
        with pytest.raises(error):
            engine.Lab(*arguments, **options)

    def test_its_calls_are_those_of_the_engine(self, stand_in):
        lab = stand_in.Lab(
            'contributed/dmlab30/rooms_watermaze', ['RGB_INTERLEAVED', 'INSTR'], {'width': '96', 'height': '72'}
        )
        move = np.array([0, 0, 0, 1, 0, 0, 0], np.intc)
        with pytest.raises(RuntimeError):
            lab.step(move)
        with pytest.raises(ValueError):
            lab.reset(seed=np.int64(3))
        assert lab.reset(seed=3) is True
        with pytest.raises(TypeError):
            lab.step(move.tolist())
        with pytest.raises(ValueError):
            lab.step(move.astype(np.int64))
        with pytest.raises(ValueError):
            lab.step(move[:6])
        strided = np.repeat(move, 2)[::2]
        assert (strided == move).all() and lab.step(strided) == 0 and lab.step(move, num_steps=4) == 4.0
        assert type(lab.step(move)) is float
        with pytest.raises(TypeError):
            pickle.dumps(lab)
        assert lab.step(move, num_steps=60) == 36.0 and lab.num_steps() == 66 and not lab.is_running()
        for call in (lab.observations, lambda: lab.step(move)):
            with pytest.raises(RuntimeError):
                call()
        lab.close()

    def test_true_without_the_file_kills_the_process(self, stand_in):
        code = """
import deepmind_lab
class Cache:
    def fetch(self, key, path): return True
    def write(self, key, path): pass
deepmind_lab.Lab('seekavoid_arena_01', ['INSTR'], level_cache=Cache()).reset()
"""
        env = {**os.environ, 'PYTHONPATH': str(STAND_INS)}
        assert subprocess.run([sys.executable, '-c', code], env=env, timeout=60).returncode == -signal.SIGABRT

    def test_a_slow_reset_keeps_the_interpreters_lock(self, stand_in, monkeypatch, tmp_path):
        monkeypatch.setenv('DMLAB_STAND_IN_RESET_S', '0.5')
        cache = dmlab.LevelCache(tmp_path)
        for expected in (0.5, 0.0):  # The second one is cached.
            lab = stand_in.Lab('seekavoid_arena_01', ['INSTR'], level_cache=cache)
            ticks, stop = [time.monotonic()], threading.Event()

            def tick(ticks=ticks, stop=stop):
                while not stop.wait(0.02):
                    ticks.append(time.monotonic())

            ticker = threading.Thread(target=tick)
            ticker.start()
            start = time.monotonic()
            lab.reset(seed=3)
            took = time.monotonic() - start
            stop.set()
            ticker.join(10)
            assert expected <= took < expected + 0.4
            assert max(np.diff([*ticks, time.monotonic()])) >= expected - 0.1
            lab.close()

    def test_a_step_is_slow_now_and_then(self, stand_in, monkeypatch):
        monkeypatch.setenv('DMLAB_STAND_IN_STEP_S', '0.3')
        monkeypatch.setenv('DMLAB_STAND_IN_STEP_EVERY', '3')
        lab = stand_in.Lab('seekavoid_arena_01', ['INSTR'])
        lab.reset()
        slow = []
        for _ in range(6):
            start = time.monotonic()
            lab.step(np.zeros(7, np.intc))
            slow.append(time.monotonic() - start >= 0.3)
        assert slow == [False, False, True] * 2

    def test_what_compiles_maps_inherits_pipes_and_outlives_the_process(self, stand_in, tmp_path):
        ours, theirs = os.pipe()
        env = {'PYTHONPATH': str(STAND_INS), 'RUN_MARK': str(tmp_path), 'DMLAB_STAND_IN_RESET_S': '60'}
        code = "import deepmind_lab; deepmind_lab.Lab('seekavoid_arena_01', ['INSTR']).reset()"
        process = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **env}, pass_fds=(theirs,))
        os.close(theirs)
        try:
            wait_for(lambda: len(marked_processes(tmp_path)) == 3, process)
        finally:
            process.kill()
            process.wait(10)
            left = marked_processes(tmp_path)
            held = not select.select([ours], [], [], 0)[0]
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
        assert len(left) == 2 and held
        assert os.read(ours, 1) == b''
        os.close(ours)

    @pytest.mark.parametrize(
        'code, end',
        [
            ("lab = Lab('seekavoid_arena_01', []); lab.close(); lab.reset()", -signal.SIGSEGV),
            ("Lab('seekavoid_arena_01', [], level_cache=Damaged()).reset()", 1),
            (f"Lab('{PSYCHLAB}', [], {{'datasetPath': '.'}}).reset()", -signal.SIGABRT),
        ],
    )
    def test_what_ends_the_process(self, code, end):
        code = f"""
from pathlib import Path
from deepmind_lab import Lab
class Damaged:
    def fetch(self, key, path): return bool(Path(path).write_text('no map'))
{code}
"""
        env = {**os.environ, 'PYTHONPATH': str(STAND_INS)}
        done = subprocess.run([sys.executable, '-c', code], env=env, timeout=60, capture_output=True)
        assert done.returncode == end
