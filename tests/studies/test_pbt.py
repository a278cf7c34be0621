"""Populations: the paper's rules, a folder that no kill makes unreadable, and hyperparameters that compile nothing."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax.config import (
    ConfigError,
    PBTConfig,
)
from impala_jax.rundir import checkpoint
from impala_jax.rundir.checkpoint import Checkpointer
from impala_jax.rundir.rows import append_row, read_rows
from impala_jax.rundir.stats import LearnerStats
from impala_jax.studies import pbt
from impala_jax.studies.pbt import Hyperparameters, Member
from impala_jax.training import hooks
from impala_jax.types import StepInfo
from tests.helpers import programs
from tests.helpers.populations import SMALL, TEMPLATE
from tests.helpers.programs import ROOT, command_line, finish, marked_processes, wait_for

GOOD = 0.03  # A learning rate with which SMALL learns.


def with_pbt(config, **values):
    return dataclasses.replace(config, pbt=dataclasses.replace(config.pbt, **values))


# What is drawn, and how it changes.


def test_first_hyperparameters_are_log_uniform():
    config = PBTConfig(learning_rate=(1e-5, 1e-3), entropy_cost=(1e-4, 1e-2), epsilon=(0.1, 1e-5))
    rng = np.random.default_rng(0)
    drawn = [pbt.draw(config, rng) for _ in range(4000)]
    for values, low, high in (
        ([d.learning_rate for d in drawn], 1e-5, 1e-3),
        ([d.entropy_cost for d in drawn], 1e-4, 1e-2),
    ):
        positions = (np.log(values) - math.log(low)) / (math.log(high) - math.log(low))
        np.testing.assert_allclose(np.quantile(positions, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
        assert 0 <= positions.min() and positions.max() <= 1
    epsilons = [d.epsilon for d in drawn]
    assert set(epsilons) == {0.1, 1e-5} and 0.45 < np.mean(np.array(epsilons) == 0.1) < 0.55


def test_each_hyperparameter_is_mutated_with_probability_a_third():
    rng, before = np.random.default_rng(0), Hyperparameters(1e-3, 1e-2, 0.1)
    factors = np.array([np.divide(pbt.mutate(before, PBTConfig(), rng), before) for _ in range(6000)])  # [N, 3]
    for value, share in ((1.2, 0.165), (1 / 1.2, 0.165), (1.0, 0.67)):
        np.testing.assert_allclose(np.isclose(factors, value).mean(axis=0), share, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(factors.T) - np.eye(3), 0, atol=0.05)  # Each by itself.


def test_members_differ_and_can_be_restarted():
    configs = [pbt.member_config(SMALL, index) for index in range(5)]
    assert configs == [pbt.member_config(SMALL, index) for index in range(5)]
    assert [config.pbt.member for config in configs] == list(range(5))
    for name in ('seed', 'optimizer.learning_rate', 'loss.entropy_cost'):
        assert len({config_lib.get(config, name) for config in configs}) == 5
    assert len({config.optimizer.epsilon for config in configs}) == 1  # There is one to draw from.
    other = pbt.member_config(dataclasses.replace(SMALL, seed=1), 0)
    assert other.seed != configs[0].seed and other.optimizer.learning_rate != configs[0].optimizer.learning_rate


@pytest.mark.parametrize(
    'values, message',
    [
        ({'learning_rate': (1e-3, 1e-4)}, 'pbt.learning_rate must be two positive numbers'),
        ({'entropy_cost': (0.0, 1e-4)}, 'pbt.entropy_cost must be two positive numbers'),
        ({'epsilon': ()}, 'pbt.epsilon must be positive'),
        ({'interval_frames': 0}, 'pbt.interval_frames must be positive, got 0'),
        ({'mutation_probability': 33}, r'pbt.mutation_probability must lie in \[0, 1\], got 33'),
        ({'member': -1}, 'pbt.member must be 0 or more, got -1'),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        PBTConfig(**values)


def test_fitness_is_the_mean_of_capped_human_normalised_scores():
    """Pong's random and human scores are -20.7 and 14.6, Breakout's 1.7 and 30.5."""
    assert pbt.fitness(['atari/pong'], [14.6]) == pytest.approx(1.0)
    assert pbt.fitness(['atari/pong', 'atari/breakout'], [21.0, 1.7]) == pytest.approx(0.5)
    assert pbt.fitness(['atari/pong', 'atari/breakout'], [14.6, 1.7 - 28.8]) == pytest.approx(0.0)  # Not from below.
    assert pbt.fitness(['catch', 'minisuite/catch'], [-1.0, 3.0]) == 1.0


def test_fitness_waits_for_the_episodes_of_each_task():
    def batch(stats, task, count, value):
        returns = np.full([count, 1], value, np.float32)
        info = StepInfo(returns, np.ones([count, 1], bool), np.zeros([count, 1], np.int32))
        stats.add_batch(info, np.zeros(1, np.int32), 1, np.array([task], np.int32))

    stats = LearnerStats(('a', 'b'))
    batch(stats, 0, 300, 1.0)
    batch(stats, 1, 99, 2.0)
    assert stats.mean_returns is None
    batch(stats, 1, 1, 2.0)
    assert stats.mean_returns == [1.0, 2.0]
    batch(stats, 1, 50, 4.0)
    assert stats.mean_returns == [1.0, 3.0]  # Of the last 100.
    stats.forget_returns()
    assert stats.mean_returns is None and 'episode_return' not in stats.row()
    alone = LearnerStats()
    batch(alone, 0, 100, 0.5)
    assert alone.mean_returns == [0.5]


# The rule, on checkpoints of another's.


def member(population, index=0, config=SMALL):
    config = pbt.member_config(config, index)
    folder = pbt.member_folder(population, index)
    folder.mkdir(parents=True, exist_ok=True)
    result = Member(config, folder)
    result.resume(0, None)
    return result


def publish(population, index, fitness, hyperparameters=Hyperparameters(0.1, 0.2, 0.3), step=1):  # noqa: B008
    config = pbt.member_config(SMALL, index)
    checkpointer = Checkpointer(pbt.member_folder(population, index) / checkpoint.DIRECTORY, config, keep=2)
    state = {'learner': {'weights': np.full(3, index, np.float32)}}
    metadata = {'pbt': {'hyperparameters': hyperparameters._asdict(), 'fitness': fitness}}
    checkpointer.save(step, state, metadata)


@pytest.mark.parametrize(
    'own, other, copies',
    [
        (0.5, 0.56, True),
        (0.5, 0.54, False),  # Better, but not by the margin.
        (0.5, 0.3, False),
        (-0.5, -0.44, True),  # Absolute, not a share of anything.
        (None, 0.9, False),  # As one that has just become a copy.
        (0.5, None, False),
    ],
)
def test_a_member_copies_one_that_is_better_by_the_margin(own, other, copies, tmp_path):
    publish(tmp_path, 1, other)
    subject = member(tmp_path, config=with_pbt(SMALL, mutation_probability=1.0))
    before = subject.hyperparameters
    state = subject.evolve(3000, own, TEMPLATE)
    assert (state is not None) == copies
    row = read_rows(tmp_path / 'member_00' / 'pbt.jsonl')[-1]
    assert row['frames'] == 3000 and row['fitness'] == own and row['copied'] == copies
    if copies:
        np.testing.assert_array_equal(state['learner']['weights'], [1, 1, 1])
        ratios = np.divide(subject.hyperparameters, (0.1, 0.2, 0.3))
        assert all(np.isclose(ratio, 1.2) or np.isclose(ratio, 1 / 1.2) for ratio in ratios)
        assert row['other'] == 1 and row['other_fitness'] == other
    else:
        assert subject.hyperparameters == before
    assert Hyperparameters(**{name: row[name] for name in Hyperparameters._fields}) == subject.hyperparameters


def test_without_a_threshold_nothing_is_copied(tmp_path):
    publish(tmp_path, 1, 100.0)
    assert member(tmp_path, config=with_pbt(SMALL, threshold=math.inf)).evolve(3000, 0.0, TEMPLATE) is None


def test_the_other_is_drawn_uniformly_from_those_that_are_there(tmp_path):
    publish(tmp_path, 0, 0.0)  # Its own.
    for index in (1, 3, 7):
        publish(tmp_path, index, 1.0)
    (tmp_path / 'member_05').mkdir()  # Has not published yet.
    subject = member(tmp_path)
    drawn = [int(subject.evolve(frames, 0.0, TEMPLATE)['learner']['weights'][0]) for frames in range(0, 60_000, 1000)]
    assert all(10 <= drawn.count(index) <= 30 for index in (1, 3, 7)) and len(drawn) == 60
    # Repeated, as after a kill, the draws are the same.
    again = member(tmp_path)
    assert [int(again.evolve(f, 0.0, TEMPLATE)['learner']['weights'][0]) for f in range(0, 60_000, 1000)] == drawn
    assert again.hyperparameters == subject.hyperparameters


def test_alone_it_goes_on(tmp_path):
    assert member(tmp_path).evolve(3000, 0.0, TEMPLATE) is None


def test_what_cannot_be_read_is_passed_over(tmp_path, caplog):
    subject = member(tmp_path)
    publish(tmp_path, 1, 0.5, step=1)
    publish(tmp_path, 1, 0.9, step=2)
    folder = tmp_path / 'member_01' / checkpoint.DIRECTORY
    (folder / '000000002' / 'checkpoint.json').write_text('{')
    assert subject.evolve(3000, 0.0, TEMPLATE) is not None
    assert read_rows(tmp_path / 'member_00' / 'pbt.jsonl')[-1]['other_fitness'] == 0.5  # The one before.
    (folder / '000000001' / 'checkpoint.json').write_text('{')
    assert subject.evolve(4000, 0.0, TEMPLATE) is None
    assert 'skipping the comparison with member_01' in caplog.text
    # Another network's.
    publish(tmp_path, 1, 0.9, step=3)
    assert subject.evolve(5000, 0.0, {'learner': {'weights': np.zeros(4, np.float32)}}) is None


def test_when_a_comparison_is_due(tmp_path):
    subject = member(tmp_path)  # 40 frames an update, 150 updates
    due = [update * 40 for update in range(1, 151) if subject.is_due(update)]
    assert due == [2000, 3000, 4000, 5000]  # Not at 6000: nothing is left to train.
    odd = member(tmp_path, config=with_pbt(SMALL, burn_in_frames=2500, interval_frames=999))
    # The first update that passes a multiple of 999.
    assert [update * 40 for update in range(1, 151) if odd.is_due(update)] == [3000, 4000, 5000]


# In a run.


def run_member(population, index, config, runtime='lockstep', **replacements):
    config = config_lib.replace(pbt.member_config(config, index), replacements)
    return impala_jax.run(config, pbt.member_folder(population, index), runtime)


def learner_state(population, index):
    return checkpoint.restore(pbt.member_folder(population, index), {'learner': None})


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """A population of one member, which has learned to catch, and its frames."""
    folder = tmp_path_factory.mktemp('good')
    config = config_lib.replace(SMALL, {'total_frames': 24_000, 'pbt.learning_rate': (GOOD, GOOD)})
    run_member(folder, 1, config)
    assert learner_state(folder, 1).metadata['pbt']['fitness'] > 0
    return folder


def copy_of(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_bad_member_goes_on_from_a_good_one(good, tmp_path):
    """Which has ended: a member needs nobody alive."""
    population = copy_of(good, tmp_path)
    # It cannot learn by itself, and does not change what it copied.
    bad = config_lib.replace(SMALL, {'pbt.learning_rate': (1e-12, 1e-12), 'pbt.mutation_probability': 0.0})
    run_member(population, 0, bad)
    first, *rest = read_rows(population / 'member_00' / 'pbt.jsonl')
    assert first['frames'] == 0 and first['learning_rate'] == pytest.approx(1e-12)
    assert [row['frames'] for row in rest] == [2000, 3000, 4000, 5000]
    assert rest[0]['copied'] and rest[0]['other'] == 1 and rest[0]['fitness'] < rest[0]['other_fitness'] - 0.05
    assert rest[0]['learning_rate'] == pytest.approx(GOOD)
    # Fewer than 100 episodes of the copy have ended.
    assert rest[1]['fitness'] is not None or not rest[1]['copied']
    state, original = learner_state(population, 0), learner_state(population, 1)
    assert state.state['learner']['num_updates'] == 150  # Its own frames count.
    assert state.metadata['pbt']['fitness'] > rest[0]['fitness'] + 0.3
    assert original.step == 600


def test_a_member_of_threads_copies_too(good, tmp_path):
    population = copy_of(good, tmp_path)
    bad = config_lib.replace(SMALL, {'pbt.learning_rate': (1e-12, 1e-12), 'pbt.mutation_probability': 0.0})
    run_member(population, 0, bad, runtime='threads')
    rows = read_rows(population / 'member_00' / 'pbt.jsonl')
    assert any(row.get('copied') for row in rows)
    assert learner_state(population, 0).metadata['pbt']['fitness'] > rows[1]['fitness'] + 0.3


def test_only_games_of_the_copy_count(good, tmp_path, monkeypatch):
    """Not those of the parameters it replaced, which acted for a lag of 20 updates and in games under way."""
    counted = []

    class Recorded(LearnerStats):
        def add_batch(self, info, lag, num_fresh, task=None, game_version=None):
            before = len(self._row_returns)
            super().add_batch(info, lag, num_fresh, task, game_version)
            versions = game_version[info.episode_ended]
            counted.append((self._first_version, versions, len(self._row_returns) - before))

    monkeypatch.setattr(hooks, 'LearnerStats', Recorded)
    bad = config_lib.replace(SMALL, {'pbt.learning_rate': (1e-12, 1e-12), 'pbt.mutation_probability': 0.0})
    population = copy_of(good, tmp_path)
    # Unrolls of a third of a game.
    run_member(population, 0, bad, policy_lag=20, total_frames=3500, **{'learner.unroll_length': 3})
    [copied] = [row for row in read_rows(population / 'member_00' / 'pbt.jsonl') if row.get('copied')]
    first = copied['frames'] // 12
    assert [version for version, _, _ in counted] == [0] * first + [first] * (len(counted) - first)
    assert all(count == (versions >= first).sum() for _, versions, count in counted[first:])
    old = sum(len(versions) - count for _, versions, count in counted[first:])
    assert old >= 4 * 6, old  # Six games in the lag, of each of four environments.
    assert sum(count for _, _, count in counted[first:]) > 20


def test_the_copy_is_exact(good, tmp_path):
    population = copy_of(good, tmp_path)
    bad = config_lib.replace(SMALL, {'pbt.learning_rate': (1e-12, 1e-12), 'pbt.mutation_probability': 0.0})
    # One update after the copy, with what little the schedule leaves of the learning rate.
    run_member(population, 0, bad, total_frames=2040, **{'optimizer.schedule': 'linear'})
    rows = read_rows(population / 'member_00' / 'metrics.jsonl')
    copied, original = learner_state(population, 0), learner_state(population, 1)
    # The schedule is that of its own frames: 1 of 51 updates is left.
    assert rows[-1]['learning_rate'] == pytest.approx(GOOD / 51, rel=1e-4)
    distance = [
        np.abs(a - b).max()
        for a, b in zip(
            jax.tree.leaves(copied.state['learner']['params']),
            jax.tree.leaves(original.state['learner']['params']),
            strict=True,
        )
    ]
    assert max(distance) < 3 * GOOD / 51
    counts = [state.state['learner']['opt_state'] for state in (copied, original)]
    assert max(map(np.max, jax.tree.leaves(counts[0]))) == max(map(np.max, jax.tree.leaves(counts[1]))) + 1


@pytest.mark.parametrize('stop_at', [1000, 2040, 2520])
def test_a_member_resumes_bit_for_bit(good, tmp_path, stop_at):
    """Before its copy, right after, and while it waits for the copy's first episodes."""
    bad = config_lib.replace(SMALL, {'pbt.learning_rate': (1e-12, 1e-12), 'optimizer.schedule': 'constant'})
    for name in ('whole', 'parts'):
        (tmp_path / name).mkdir()
        copy_of(good, tmp_path / name)
    run_member(tmp_path / 'whole', 0, bad)
    run_member(tmp_path / 'parts', 0, bad, total_frames=stop_at)
    run_member(tmp_path / 'parts', 0, bad)
    whole, parts = (learner_state(tmp_path / name, 0) for name in ('whole', 'parts'))
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert whole.metadata['pbt'] == parts.metadata['pbt']
    assert (tmp_path / 'whole/member_00/pbt.jsonl').read_text() == (tmp_path / 'parts/member_00/pbt.jsonl').read_text()


# The shared folder.

_KILLED_AT_EACH_STEP = """
import os, signal, sys, threading
from pathlib import Path

import numpy as np

from impala_jax.rundir import checkpoint
from impala_jax.studies import pbt
from impala_jax.rundir.checkpoint import Checkpointer
from impala_jax.rundir.lock import only_process
from tests.helpers.populations import SMALL, TEMPLATE

EVENTS = {'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.listdir', 'os.scandir', 'shutil.rmtree'}
population = Path(sys.argv[1])
countdown = None


def hook(event, args):
    global countdown
    if countdown is not None and event in EVENTS and any(str(population) in str(arg) for arg in args):
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def read():
    saved = checkpoint.restore(population / 'member_00', TEMPLATE)
    np.testing.assert_array_equal(saved.state['learner']['weights'], saved.step)
    assert saved.metadata['pbt']['fitness'] == saved.step
    assert pbt.members(population)[-1].name == 'member_01'
    return saved.step


def live(kill_at):
    global countdown
    step = read() + 1
    countdown = kill_at
    pbt.join(population, SMALL)
    config, folder = pbt.member_config(SMALL, 0), pbt.member_folder(population, 0)
    with only_process(folder):
        member = pbt.Member(config, folder)
        checkpointer = Checkpointer(folder / checkpoint.DIRECTORY, config, keep=2)
        saved = checkpointer.restore_latest(TEMPLATE)
        member.resume(saved.step, saved.metadata['pbt'])
        assert member.evolve(step, 0.0, TEMPLATE) is not None
        state = {'learner': {'weights': np.full(3, step, np.float32)}}
        checkpointer.save(step, state, {'pbt': member.metadata(float(step))})
    countdown = None
    assert read() == step


sys.addaudithook(hook)
for kill_at in range(10_000):
    pid = os.fork()
    if pid == 0:
        try:
            live(kill_at)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        continue
    assert status == 0, f'after a kill at operation {kill_at - 1}'
    print(kill_at)
    break
"""


@pytest.mark.slow
def test_a_member_killed_at_any_file_operation_leaves_a_good_folder(tmp_path):
    """In turn at each one of a member's life, on what the kill before it left behind."""
    publish(tmp_path, 0, 1.0)
    publish(tmp_path, 1, 1.0)
    # What is in a checkpoint tells its step: of member 0 it was its number.
    checkpointer = Checkpointer(tmp_path / 'member_00' / checkpoint.DIRECTORY, pbt.member_config(SMALL, 0), keep=2)
    metadata = {'pbt': {'hyperparameters': Hyperparameters(0.1, 0.2, 0.3)._asdict(), 'fitness': 2.0}}
    checkpointer.save(2, {'learner': {'weights': np.full(3, 2, np.float32)}}, metadata)
    result = subprocess.run(
        [sys.executable, '-c', _KILLED_AT_EACH_STEP, str(tmp_path)],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) > 50
    assert [path.name for path in pbt.members(tmp_path)] == ['member_00', 'member_01']


def test_another_configuration_cannot_join(tmp_path):
    pbt.join(tmp_path, SMALL)
    pbt.join(tmp_path, dataclasses.replace(SMALL, total_frames=7000))  # As any run can be prolonged.
    with pytest.raises(ConfigError, match='cannot join the population in .* differs in seed: 0 there, 3 now'):
        pbt.join(tmp_path, dataclasses.replace(SMALL, seed=3))
    path = tmp_path / 'population.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content['config']))  # As version 0.1 wrote it.
    pbt.join(tmp_path, SMALL)
    path.write_text(json.dumps(content | {'format': 99}))
    with pytest.raises(ConfigError, match='population.json has format 99, and impala_jax .* reads formats 1 to'):
        pbt.join(tmp_path, SMALL)
    for damaged in ('{', '[]'):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match='is damaged; delete it'):
            pbt.join(tmp_path, SMALL)


def test_a_summary_names_the_best_member_and_those_without_a_return(tmp_path):
    for index, row in enumerate([{}, {'episode_return_last_100': 0.5}]):
        publish(tmp_path, index, fitness=None)
        folder = pbt.member_folder(tmp_path, index)
        append_row(folder / 'metrics.jsonl', {'frames': 40, **row})
        append_row(folder / pbt.SCHEDULE, {'frames': 0, 'fitness': None, **Hyperparameters(0.1, 0.2, 0.3)._asdict()})
    best, other, command = pbt.summary(tmp_path).splitlines()
    assert best.startswith('member_01  return 0.50  learning rate 0.1  ')
    assert other.startswith('member_00  no episode has ended  learning rate 0.1  ')
    assert command.endswith('member_01')


# The command line.

CONFIG = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers.populations import SMALL


def get_config():
    return SMALL
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text(CONFIG.format(root=str(ROOT)))
    return path


def start(config_file, workdir, *arguments):
    command = ['launch/pbt.py', '--config', str(config_file), '--workdir', str(workdir), *arguments]
    return programs.start(workdir, *command)


def test_a_population_trains_and_a_member_joins_late(config_file, tmp_path):
    population = tmp_path / 'population'
    code, stdout, stderr = finish(start(config_file, population, '--members', '2', '--runtime', 'lockstep'))
    assert code == 0, stderr
    assert not stderr.strip(), stderr
    assert [path.name for path in pbt.members(population)] == ['member_00', 'member_01']
    assert 'launch/evaluate.py --workdir' in stdout.splitlines()[-1] and 'learning rate' in stdout
    before = {path: path.read_bytes() for path in population.glob('member_0[01]/*.jsonl')}
    code, _, stderr = finish(start(config_file, population, '--member', '4', '--runtime', 'lockstep'))
    assert code == 0, stderr
    assert [path.name for path in pbt.members(population)] == ['member_00', 'member_01', 'member_04']
    rows = read_rows(population / 'member_04' / 'pbt.jsonl')
    assert {row.get('other') for row in rows[1:]} <= {0, 1} and rows[1]['other_fitness'] is not None
    assert before == {path: path.read_bytes() for path in before}
    config = json.loads((population / 'member_04' / 'config.json').read_text())['config']
    assert config_lib.from_dict(config) == pbt.member_config(SMALL, 4)


@pytest.mark.parametrize(
    'number', [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stopped_population_leaves_no_process_and_goes_on(number, config_file, tmp_path):
    population = tmp_path / 'population'
    arguments = ['--members', '2', '--runtime', 'threads', '--checkpoint.interval-s', '0.5']
    process = start(config_file, population, *arguments, '--total-frames', '100000000')
    wait_for(lambda: len(pbt.members(population)) == 2)
    process.send_signal(number)
    code, _, stderr = finish(process)
    wait_for(lambda: not marked_processes(population))
    if number != signal.SIGKILL:
        assert code == 128 + number, stderr
        assert 'the same command resumes' in stderr.splitlines()[-1]
    steps = [checkpoint.steps(path / checkpoint.DIRECTORY)[-1] for path in pbt.members(population)]
    assert min(steps) > 0
    frames = 40 * (max(steps) + 50)
    code, stdout, stderr = finish(start(config_file, population, *arguments, '--total-frames', str(frames)))
    assert code == 0, stdout + stderr
    assert [learner_state(population, i).step for i in (0, 1)] == [-(-frames // 40)] * 2


def test_a_suspended_member_is_not_waited_for(config_file, tmp_path):
    """The others go on, and the population says which one it was."""
    program = tmp_path / 'pbt.py'
    program.write_text("""
from impala_jax.cli import pbt
from impala_jax.system import stop_watch

stop_watch.STOPPED_S = 1.0
pbt.main()
""")
    population = tmp_path / 'population'
    arguments = ['--members', '2', '--runtime', 'threads', '--checkpoint.interval-s', '0.5']
    command = [str(program), '--config', str(config_file), '--workdir', str(population), *arguments]
    process = programs.start(population, *command, '--total-frames', '40000')
    wait_for(lambda: read_rows(population / 'member_01' / 'metrics.jsonl'), process)
    (member,) = (pid for pid in marked_processes(population) if '--member\0001' in command_line(pid))
    os.kill(int(member), signal.SIGSTOP)
    code, _, stderr = finish(process)
    reason = 'error: the member was stopped for 1 s (SIGSTOP), and was killed'
    assert (code, stderr.strip()) == (1, f'member 1 failed: {reason} (the same command resumes)')
    assert learner_state(population, 0).step == 1000


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--members', '0'], 'error: --members must be positive, got 0'),
        (['--member', '-1'], 'error: --member must be 0 or more, got -1'),
        (['--pbt.treshold', '1'], "error: unknown option --pbt.treshold; did you mean '--pbt.threshold'"),
        (['--pbt.learning-rate', '1e-2', '1e-3'], 'error: pbt.learning_rate must be two positive numbers'),
        (['--member', '0', '--runtime', 'fast'], "error: unknown runtime 'fast'"),
        (['--members', '2', '--environment.name', 'cach'], "failed: error: unknown environment.name 'cach'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, config_file, tmp_path):
    code, _, stderr = finish(start(config_file, tmp_path / 'population', *arguments))
    assert code != 0 and message in stderr.splitlines()[-1], stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_population_beats_the_same_members_by_themselves(tmp_path):
    """On the minisuite, from learning rates of a tenth of a good one and less; same frames, over three seeds."""
    final = {'population': [], 'alone': []}
    for seed in (0, 1, 2):
        for name, threshold in (('population', '0.2'), ('alone', 'inf')):
            workdir = tmp_path / f'{name}{seed}'
            arguments = ['--members', '4', '--runtime', 'lockstep', '--evaluator.episodes', '50', '--seed', str(seed)]
            arguments += ['--pbt.threshold', threshold]
            process = start(ROOT / 'configs' / 'minisuite_pbt.py', workdir, *arguments)
            _, stderr = process.communicate(timeout=1200)
            assert process.returncode == 0, stderr
            means = [read_rows(path / 'evaluations.jsonl')[-1]['mean_return'] for path in pbt.members(workdir)]
            assert len(means) == 4
            final[name].append(means)
    population, alone = (np.array(final[name]) for name in ('population', 'alone'))  # [seeds, members]
    # Where no member has learned anything there is nothing to copy; measured: 0.48 against -0.02 over all seeds.
    assert (population.mean(axis=1) > alone.mean(axis=1) - 0.05).all(), final
    assert population.mean() > alone.mean() + 0.3, final
