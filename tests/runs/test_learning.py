"""A bandit whose reward comes late: actor and learner together give the credit to the action that earned it."""

import dm_env
import jax
import numpy as np
import pytest
from dm_env import specs

from impala_jax.actor import Actor
from impala_jax.agent import dummy_timestep
from impala_jax.build import make_agent, make_learner
from impala_jax.config import Config, LearnerConfig, LossConfig, NetworkConfig, OptimizerConfig, VTraceConfig
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import FIRST, MID

A, LENGTH, GOOD = 3, 4, 1
NETWORK = NetworkConfig('mlp', mlp_sizes=())  # linear: the steps share only a bias


class DelayedBandit(dm_env.Environment):
    """Only the first action of an episode matters; what it earns comes `delay` steps later.

    It shows the number of the step and, after it, whether a reward is due: so the actions in between neither earn nor
    tell anything.
    """

    def __init__(self, delay):
        self._delay = delay
        self._step = 0
        self._due = False

    def reset(self):
        self._step, self._due = 0, False
        return dm_env.restart(self._observe())

    def step(self, action):
        if self._step == 0:
            self._due = action == GOOD
        self._step += 1
        reward = float(self._due and self._step == self._delay)
        if reward:
            self._due = False
        if self._step == LENGTH:
            return dm_env.termination(reward, self._observe())
        return dm_env.transition(reward, self._observe())

    def observation_spec(self):
        return specs.Array((LENGTH + 2,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(A)

    def _observe(self):
        return np.append(np.eye(LENGTH + 1)[self._step], self._due).astype(np.float32)


def policies(agent, params):
    """pi [LENGTH, A], at the episode's steps with nothing due."""
    step_type = np.array([FIRST] + [MID] * (LENGTH - 1), np.int32)
    observation = np.eye(LENGTH + 1, LENGTH + 2, dtype=np.float32)[:LENGTH]
    timesteps = dummy_timestep(agent.spec, LENGTH)._replace(step_type=step_type, observation=observation)
    output, _ = agent.unroll(params, jax.tree.map(lambda x: x[None], timesteps), ())
    return np.array(jax.nn.softmax(output.logits[0]))


# Two episodes and the resets between them in an unroll, or a cut in every episode. A reward at the end of the episode
# tells a reward that is one step late, which is then lost; any other would still reach the first action, discounted.
@pytest.mark.parametrize('delay, unroll_length', [(1, 9), (LENGTH, 9), (LENGTH, 3)])
@pytest.mark.parametrize('lag', [0, 2])
def test_only_the_rewarded_action_becomes_likelier(delay, unroll_length, lag):
    num_envs = 64
    environment = SerialVectorEnvironment(lambda seed: DelayedBandit(delay), num_envs, seed=0)
    agent = make_agent(NETWORK, environment.spec)
    config = Config(
        network=NETWORK,
        vtrace=VTraceConfig(),
        loss=LossConfig(discount=0.9, entropy_cost=0.05),
        learner=LearnerConfig(batch_size=num_envs, unroll_length=unroll_length, num_devices=2),
        optimizer=OptimizerConfig('adam', learning_rate=0.02, schedule='constant', epsilon=1e-8),
    )
    learner = make_learner(config, agent)
    actor = Actor(agent, environment, unroll_length, seed=0)
    state = learner.init(jax.random.PRNGKey(0))
    history = [jax.tree.map(np.array, state.params)]
    before = policies(agent, history[0])
    for version in range(80 if unroll_length == 9 else 160):
        behind = max(0, version - lag)
        state, _ = learner.update(state, actor.unroll(behind, history[behind]))
        history.append(jax.tree.map(np.array, state.params))
    after = policies(agent, history[-1])

    # The first step: the rewarded action's probability rose, and no other's.
    assert after[0, GOOD] > 0.85
    assert [a > b for a, b in zip(after[0], before[0], strict=True)] == [a == GOOD for a in range(A)]
    # At the steps after it nothing is to be learned; the bias they share moves them a little.
    assert after[1:].max() < 0.7
