"""The actor: what it records, with whose parameters, and what it refuses."""

import dm_env
import jax
import numpy as np
import pytest
from dm_env import specs

from impala_jax.actor import Actor, run_actor
from impala_jax.build import make_agent
from impala_jax.config import ConfigError, NetworkConfig
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.types import Closed
from tests.helpers.counting import SMALL, make_actor, make_counting
from tests.helpers.shows import shown


@pytest.mark.parametrize('unroll_length', [1, 3, 4, 5, 11])
def test_who_began_a_game(unroll_length, monkeypatch):
    """The version is that of its first action, however many trajectories later it ends."""
    environment, made = make_counting(num_envs=3)
    monkeypatch.setattr(environment, 'get_state', lambda: b'')
    monkeypatch.setattr(environment, 'set_state', lambda state: None)
    actor, params = make_actor(environment, unroll_length)
    versions = 100 + 7 * np.arange(40)
    trajectories = []
    for version in versions:
        if len(trajectories) == 5:  # Between two unrolls.
            state = actor.get_state()
            actor.reset(1)
            actor.set_state(state)
        trajectories.append(actor.unroll(int(version), params))
    ended = np.concatenate([trajectory.info.episode_ended for trajectory in trajectories])
    game_version = np.concatenate([trajectory.game_version for trajectory in trajectories])
    assert game_version.dtype == np.int32
    for i in range(len(made)):
        period = 4 + i + 1  # Between two games is a step whose action is ignored.
        starts = np.arange(ended[:, i].sum()) * period
        np.testing.assert_array_equal(np.flatnonzero(ended[:, i]), starts + period - 2)
        np.testing.assert_array_equal(game_version[ended[:, i], i], versions[starts // unroll_length])


def test_actors_fetch_parameters_before_each_unroll():
    environment, _ = make_counting()
    actor, params = make_actor(environment, 3, SMALL)
    store = LocalParameterStore(10.0)
    store.publish(0, params)
    other = jax.tree.map(lambda x: x + 1, params)
    trajectories = []

    class Queue:
        def put(self, trajectory):
            trajectories.append(trajectory)
            store.publish(len(trajectories), params if len(trajectories) % 2 == 0 else other)
            if len(trajectories) == 4:
                raise Closed

    run_actor(actor, Queue(), lambda: actor.policy(*store.latest()))
    assert [trajectory.version.tolist() for trajectory in trajectories] == [[i] * 2 for i in range(4)]
    # They are acted with, and not only counted.
    agent = make_agent(SMALL, environment.spec)
    for i, trajectory in enumerate(trajectories):
        output, _ = agent.unroll(other if i % 2 else params, trajectory.timesteps, ())
        np.testing.assert_allclose(output.logits[:-1], trajectory.behaviour_logits, rtol=1e-4, atol=1e-4)


def unroll_of(config, spec, *values):
    """One step of an actor whose environment shows the values, the last of them twice."""
    steps = [dm_env.transition(1.0, value) for value in (*values[1:], values[-1])]
    environment = shown(spec, dm_env.restart(values[0]), *steps, max_failures=3)
    agent = make_agent(config, environment.spec)
    return Actor(agent, environment, 1, seed=0).unroll(0, agent.init(jax.random.PRNGKey(0)))


@pytest.mark.parametrize(
    'value, scale, said', [(10, None, True), (32, None, False), (10, 10.0, False), (0, None, False)]
)
def test_bytes_far_below_their_bound_are_reported(caplog, value, scale, said):
    name = f'{value} by {scale}'  # Each name is reported once in a process.
    for _ in range(2):
        spec, shown = {name: specs.Array((3,), np.uint8)}, {name: np.full(3, value, np.uint8)}
        unroll_of(NetworkConfig(uint8_scale=scale), spec, shown)
    reports = [record.getMessage() for record in caplog.records if 'is divided by 255' in record.getMessage()]
    assert len(reports) == said and all('--network.uint8-scale' in report for report in reports)


@pytest.mark.parametrize('words', [[[1, 5000]], [[1, 2], [1, 5000]], [[1, 2], [1, -1]]])
def test_an_actor_refuses_words_that_have_no_embedding(words):
    shown = [{'instruction': np.array(ids, np.int32)} for ids in words]
    with pytest.raises(ConfigError, match=r"observation\['instruction'\] has word id (5000|-1)"):
        unroll_of(NetworkConfig(), {'instruction': specs.Array((2,), np.int32)}, *shown)


def test_a_value_outside_a_category_is_a_failure_of_the_environment(caplog):
    unroll_of(NetworkConfig(), specs.DiscreteArray(5), np.int32(3), np.int32(7))
    assert 'is rebuilt: observation has the value 7, but its spec says 0 to 4' in caplog.text
