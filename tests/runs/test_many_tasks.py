"""Many tasks through whole runs: what trajectories, metrics and evaluations say of each task."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.build import make_agent
from impala_jax.cli.command_line import load_config_file
from impala_jax.config import ConfigError, EnvironmentConfig, NetworkConfig
from impala_jax.environments import suites
from impala_jax.evaluation.evaluator import Evaluator
from impala_jax.rundir import checkpoint
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from tests.helpers.programs import ROOT

CONFIGS = ROOT / 'configs'
RUNTIMES = ['lockstep', 'threads', pytest.param('launchpad', marks=pytest.mark.launchpad)]
TASKS = suites.tasks(EnvironmentConfig('minisuite'))


def small_config(**changes):
    """40 updates, 1600 frames; each actor has all tasks."""
    config = impala_jax.Config(
        total_frames=1600,
        environment=EnvironmentConfig('minisuite'),
        network=NetworkConfig(torso='mlp', core='lstm', lstm_size=8, mlp_sizes=(8,)),
        learner=impala_jax.LearnerConfig(batch_size=8, unroll_length=10, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=2, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=3, num_envs=2),
        logging=impala_jax.LoggingConfig(interval_updates=5),
    )
    return dataclasses.replace(config, **changes)


def run(config, workdir, runtime):
    """In a process of its own if Launchpad runs it, which takes over the signals that pytest-timeout needs."""
    if runtime != 'launchpad':
        impala_jax.run(config, workdir, runtime)
        return
    code = f"""
import impala_jax
from impala_jax import config
impala_jax.run(config.from_dict({config_lib.to_dict(config)!r}), {str(workdir)!r}, 'launchpad')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PLAIN: dict[str, Any] = {}
POPART_AND_REPLAY: dict[str, Any] = {
    'popart': impala_jax.PopArtConfig(enabled=True),
    'replay': impala_jax.ReplayConfig(fraction=0.5, capacity=20),
    'learner': impala_jax.LearnerConfig(batch_size=16, unroll_length=10, num_devices=1),
}


@pytest.mark.parametrize(
    'runtime, changes',
    [
        ('lockstep', PLAIN),
        ('threads', POPART_AND_REPLAY),
        pytest.param('launchpad', POPART_AND_REPLAY, marks=pytest.mark.launchpad),
    ],
)
def test_a_run_reports_each_task(runtime, changes, tmp_path):
    run(small_config(**changes), tmp_path, runtime)
    row = rows_of(tmp_path / 'metrics.jsonl')[-1]
    for name in ('episode_return_last_100', 'episode_return_last_100/minisuite/go_to_colour', 'suite_return_last_100'):
        assert name in row
    found = {name for row in rows_of(tmp_path / 'metrics.jsonl') for name in row}
    assert {name for name in found if name.startswith('episode_return/')} == {f'episode_return/{t}' for t in TASKS}
    np.testing.assert_allclose(
        row['suite_return_last_100'], np.mean([row[f'episode_return_last_100/{task}'] for task in TASKS]), rtol=1e-6
    )
    assert row['frames'] == 1600
    evaluation = rows_of(tmp_path / 'evaluations.jsonl')[-1]
    assert evaluation['episodes'] == 12
    np.testing.assert_allclose(
        evaluation['mean_return'], np.mean([evaluation[f'mean_return/{task}'] for task in TASKS]), rtol=1e-6
    )
    scores = impala_jax.evaluate(tmp_path, episodes=2)
    assert tuple(scores['tasks']) == TASKS and scores['episodes'] == 8
    assert all(scores['tasks'][task]['episodes'] == 2 for task in TASKS)
    catch = scores['tasks']['minisuite/catch']
    assert {catch['min_return'], catch['max_return']} <= {-1.0, 1.0}


def test_a_trajectory_carries_its_task():
    """Where there are words, it is the task that has them, whatever actor it comes from."""
    config = small_config(actor=impala_jax.ActorConfig(num_actors=2, num_envs=5))
    agent = make_agent(config.network, environments.spec(config.environment))
    params, ids = agent.init(jax.random.PRNGKey(0)), []
    for index in range(2):
        actor = nodes.make_actor(host_share(config), agent, index)
        trajectory = actor.unroll(0, params)
        with_words = trajectory.timesteps.observation['instruction'].any(axis=(0, 2))
        assert trajectory.task.dtype == np.int32
        np.testing.assert_array_equal(with_words, trajectory.task == TASKS.index('minisuite/go_to_colour'))
        ids += trajectory.task.tolist()
    assert ids == [i % 4 for i in range(10)]
    single = Actor(agent, environments.make(EnvironmentConfig(TASKS[0]), 3, 0), 4, 0)
    assert single.unroll(0, params).task.tolist() == [0, 0, 0]


def test_an_actor_whose_environments_are_not_the_agents_is_refused():
    """As where a suite's spec was found out from one of its tasks, and another one's differs."""
    config = small_config(environment=EnvironmentConfig('delayed_bandit'))
    agent = make_agent(config.network, environments.spec(EnvironmentConfig('catch')))
    with pytest.raises(
        ConfigError, match="environments of 'delayed_bandit' differ: an actor's have .* the agent knows"
    ):
        nodes.make_actor(host_share(config), agent, 0)


def test_lockstep_resumes_bit_for_bit(tmp_path):
    config = small_config(
        **POPART_AND_REPLAY,
        optimizer=impala_jax.OptimizerConfig(schedule='constant'),
        evaluator=impala_jax.EvaluatorConfig(episodes=0),
    )
    impala_jax.run(config, tmp_path / 'whole', runtime='lockstep')
    for frames in (800, 1600):
        impala_jax.run(dataclasses.replace(config, total_frames=frames), tmp_path / 'parts', runtime='lockstep')
    whole, parts = (checkpoint.restore(tmp_path / name, {'learner': None}).state for name in ('whole', 'parts'))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert whole['learner']['popart']['mean'].shape == (4,)
    times = ('wall_time_s', 'frames_per_second', 'learner_wait_fraction')
    rows = [rows_of(tmp_path / name / 'metrics.jsonl')[-1] for name in ('whole', 'parts')]
    whole_row, parts_row = ({name: row[name] for name in row if name not in times} for row in rows)
    assert whole_row == parts_row


def test_the_evaluator_plays_each_task_anew_every_time():
    agent = make_agent(small_config().network, environments.spec(EnvironmentConfig('minisuite')))
    params = agent.init(jax.random.PRNGKey(0))
    evaluator = Evaluator(agent, EnvironmentConfig('minisuite'), episodes=5, num_envs=3, seed=0)
    try:
        first, second = evaluator.play(0, params), evaluator.play(1, params)
    finally:
        evaluator.close()
    for evaluation in (first, second):
        assert [len(scores.returns) for scores in evaluation.tasks.values()] == [5] * 4
        assert evaluation.returns == [value for scores in evaluation.tasks.values() for value in scores.returns]
    assert first.tasks['minisuite/delayed_bandit'] != second.tasks['minisuite/delayed_bandit']


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_too_few_environments_are_refused_before_any_work(runtime, tmp_path):
    config = small_config(actor=impala_jax.ActorConfig(num_actors=1, num_envs=2))
    with pytest.raises(ConfigError, match='minisuite has 4 tasks, but there are 2 .*actor.num_envs that works is 4'):
        impala_jax.run(config, tmp_path / 'run', runtime=runtime)
    assert not (tmp_path / 'run').exists()


def test_the_papers_settings():
    """Appendices D and G, and the released code's of DMLab-30."""
    atari, dmlab = (load_config_file(str(CONFIGS / name)) for name in ('atari57.py', 'dmlab30.py'))
    for config in (atari, dmlab):
        assert (config.network.torso, config.network.lstm_size) == ('deep', 256)
        assert (config.loss.discount, config.loss.baseline_cost, config.learner.batch_size) == (0.99, 0.5, 32)
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.decay, optimizer.momentum, optimizer.schedule) == (
            'rmsprop',
            0.99,
            0,
            'linear',
        )
        assert config.environment.frames_per_step == 4
        suites.assign(config.environment, config.actor.num_actors, config.actor.num_envs)
    assert (atari.network.core, dmlab.network.core) == ('feedforward', 'lstm')
    assert (atari.total_frames, atari.learner.unroll_length, atari.loss.reward_clip) == (11_400_000_000, 20, 'unit')
    assert (atari.loss.entropy_cost, atari.optimizer.learning_rate, atari.optimizer.epsilon) == (0.01, 6e-4, 0.01)
    assert atari.optimizer.max_grad_norm == 40
    assert (dmlab.total_frames, dmlab.learner.unroll_length, dmlab.loss.reward_clip) == (10**10, 100, 'asymmetric')
    assert dmlab.loss.entropy_cost == 0.0033391318945337044
    assert (dmlab.optimizer.learning_rate, dmlab.optimizer.epsilon) == (0.00031866995608948655, 0.1)
    assert dmlab.optimizer.max_grad_norm == np.inf
    # The slowest trajectory of real levels that was thought of, see the file.
    assert dmlab.timeout_s >= 2 * 5 * 45 + 5 * 8 + 110


@pytest.mark.slow
@pytest.mark.atari
def test_eight_games_at_once(monkeypatch, tmp_path):
    games = suites.tasks(EnvironmentConfig('atari57'))[::8]
    monkeypatch.setitem(suites.SUITES, 'atari57', lambda: games)
    config = load_config_file(str(CONFIGS / 'atari57.py'))
    config = dataclasses.replace(
        config,
        total_frames=20_000,
        learner=dataclasses.replace(config.learner, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=2, num_envs=4),
    )
    assert len(games) == 8
    assert impala_jax.run(config, tmp_path, runtime='threads').frames >= 20_000
    parameters = checkpoint.restore(tmp_path, {'learner': {'params': None}}).state['learner']['params']['params']
    assert parameters['policy']['bias'].shape == (18,)
