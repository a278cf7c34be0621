"""Evaluations end, whatever the environment does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import impala_jax
from impala_jax import environments
from impala_jax.build import make_agent
from impala_jax.config import (
    EnvironmentConfig,
    EvaluatorConfig,
    NetworkConfig,
)
from impala_jax.environments import factories
from impala_jax.evaluation import evaluator as evaluation
from impala_jax.evaluation.evaluator import Evaluator
from impala_jax.types import LAST
from tests.helpers.configs import small_suite
from tests.helpers.counting import SMALL, A, Counting

NETWORK = NetworkConfig(torso='mlp', mlp_sizes=(8,))


def play(name, **kwargs):
    agent = make_agent(NETWORK, environments.spec(EnvironmentConfig('catch')))
    evaluator = Evaluator(agent, EnvironmentConfig(name), episodes=3, num_envs=2, seed=0, **kwargs)
    try:
        return evaluator.play(0, agent.init(jax.random.PRNGKey(0)))
    finally:
        evaluator.close()


def test_a_game_without_an_end_is_truncated_at_the_limit_and_counts_as_it_stands(caplog):
    evaluation = play('tests.helpers.hostile:endless', max_episode_steps=45)
    assert len(evaluation.returns) == evaluation.num_truncated == 3
    assert all(-5 <= value <= 5 and value == int(value) for value in evaluation.returns)  # One game in nine steps.
    assert caplog.messages == [
        '3 of 3 games of tests.helpers.hostile:endless were truncated after 45 steps (evaluator.max_episode_steps); '
        'their returns count'
    ]


@pytest.mark.parametrize('limit, num_truncated', [(9, 0), (8, 3)])
def test_the_limit_counts_steps(limit, num_truncated, caplog):
    """Catch ends after nine steps."""
    evaluation = play('catch', max_episode_steps=limit)
    assert evaluation.num_truncated == num_truncated
    assert set(map(abs, evaluation.returns)) == ({0.0} if num_truncated else {1.0})


def test_a_wait_for_an_environment_is_bounded():
    with pytest.raises(TimeoutError, match="waited 3 s for the worker process .* of 'tests.helpers.hostile:hangs'"):
        play('tests.helpers.hostile:hangs', timeout_s=3.0)


def test_scores_say_how_many_games_were_truncated(tmp_path):
    config = impala_jax.Config(
        total_frames=40,
        environment=EnvironmentConfig('catch'),
        network=NETWORK,
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=1, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=2, max_episode_steps=5),
    )
    result = impala_jax.run(config, tmp_path, runtime='lockstep')
    assert result.evaluation is not None and result.evaluation.num_truncated == 2
    for limit, num_truncated in ((None, 4), (100, 0)):
        scores = impala_jax.evaluate(tmp_path, episodes=4, num_envs=2, max_episode_steps=limit)
        assert scores['truncated_episodes'] == num_truncated


@pytest.mark.atari
def test_a_game_of_atari_is_truncated_at_the_limit():
    environment = environments.make(EnvironmentConfig('atari/pong'), 2, 0, evaluation=True, max_episode_steps=60)
    environment.reset()
    steps, ends = np.zeros(2, int), []
    for _ in range(130):
        timestep, info = environment.step(np.zeros(2, np.int32))
        steps += 1
        for i in np.flatnonzero(timestep.step_type == LAST):
            assert timestep.discount[i] == 1 and info.episode_ended[i]
            ends.append(int(steps[i]))
            steps[i] = -1  # The FIRST timestep that follows.
    environment.close()
    # The emulator counts the frames of the no-op start.
    assert len(ends) >= 4 and all(50 <= end <= 60 for end in ends)


def tell_actions(seed):
    """The return tells the actions: base A, a digit a step."""
    return Counting(lambda count, action: float(action * A ** (count % 6)), length=5)


def test_evaluation_samples_by_default(monkeypatch):
    """With a uniform policy games differ; the most likely action, if asked for, makes all games the same."""
    monkeypatch.setitem(factories.BUILT_IN, 'tell_actions', tell_actions)
    config = EnvironmentConfig('tell_actions')
    spec = environments.spec(config)
    agent = make_agent(SMALL, spec)
    params = jax.tree.map(jnp.zeros_like, agent.init(jax.random.PRNGKey(0)))
    returns = {}
    for name, kwargs in (('default', {}), ('greedy', {'greedy': True})):
        evaluator = Evaluator(agent, config, episodes=20, num_envs=4, seed=0, **kwargs)
        returns[name] = evaluator.play(0, params).returns
        evaluator.close()
        assert len(returns[name]) == 20
    assert len(set(returns['default'])) > 10
    assert set(returns['greedy']) == {0.0}
    assert not EvaluatorConfig().greedy


def test_the_standard_error_is_that_of_the_mean():
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


def test_the_evaluator_plays_each_task_anew_every_time():
    agent = make_agent(small_suite().network, environments.spec(EnvironmentConfig('minisuite')))
    params = agent.init(jax.random.PRNGKey(0))
    evaluator = Evaluator(agent, EnvironmentConfig('minisuite'), episodes=5, num_envs=3, seed=0)
    try:
        first, second = evaluator.play(0, params), evaluator.play(1, params)
    finally:
        evaluator.close()
    for played in (first, second):
        assert [len(scores.returns) for scores in played.tasks.values()] == [5] * 4
        assert played.returns == [value for scores in played.tasks.values() for value in scores.returns]
    assert first.tasks['minisuite/delayed_bandit'] != second.tasks['minisuite/delayed_bandit']
