"""Frames that are written once become the stacks that the actor saw, whatever begins and ends in between."""

import jax
import numpy as np
import pytest

from impala_jax import environments, frame_stacks
from impala_jax.actor import Actor
from impala_jax.agent import AgentStep
from impala_jax.build import make_agent
from impala_jax.config import EnvironmentConfig, NetworkConfig
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, FrameStacks, TimeStep

T, N, K = 12, 5, 4


class Stacks:
    """A `VectorEnvironment` whose stacks begin with zeros in about half of the episodes, and go on in the others."""

    def __init__(self, seed, frame=(3, 2), dark=0.3):
        self.num_envs = N
        self.spec = EnvironmentSpec({'a': ArraySpec((*frame, K), np.dtype(np.uint8), True), 'b': _FLOAT}, 2)
        self.seen = []
        self._rng, self._frame, self._dark = np.random.default_rng(seed), frame, dark
        self._stack = np.zeros([N, *frame, K], np.uint8)
        self._step_type = np.full(N, LAST)

    def reset(self):
        return self._next()

    def step(self, actions):
        return self._next(), ()

    def _next(self):
        ended = self._step_type == LAST
        # A dark frame is all zeros, and so may be the last three of a life.
        frame = self._rng.integers(1, 256, [N, *self._frame]) * (self._rng.random([N, 1, 1]) > self._dark)
        self._stack = np.concatenate([self._stack[..., 1:], frame[..., None].astype(np.uint8)], -1)
        self._stack[ended & (self._rng.random(N) < 0.5), ..., :-1] = 0
        self._step_type = np.where(ended, FIRST, np.where(self._rng.random(N) < 0.3, LAST, MID)).astype(np.int32)
        self.seen.append(self._stack.copy())
        zeros = np.zeros(N, np.float32)
        observation = {'a': self._stack, 'b': zeros}
        return TimeStep(self._step_type, zeros, zeros, observation, np.zeros(N, np.int32))


_FLOAT = ArraySpec((), np.dtype(np.float32))


def encoded(environment):
    """The next T + 1 timesteps."""
    timestep = environment.reset()
    timesteps = frame_stacks.empty_timesteps(T + 1, timestep, environment.spec)
    for t in range(T + 1):
        frame_stacks.write(timesteps.observation['a'], t, timestep.step_type, timestep.observation['a'])
        timestep = environment.step(None)[0]
    return timesteps


@pytest.mark.parametrize('dark', [0.0, 0.3, 0.8])
def test_stacks_come_back(dark):
    for seed in range(20):
        environment = Stacks(seed, dark=dark)
        stacks = encoded(environment).observation['a']
        assert stacks.frames.shape == (T + K, N, 3, 2)
        np.testing.assert_array_equal(jax.jit(frame_stacks.stacked)(stacks), np.stack(environment.seen[: T + 1]))


def acting(environment, unroll_length, seed=0):
    """Trajectories of random actions, and the observations of all timesteps that were acted at."""
    agent = make_agent(NetworkConfig('deep'), environment.spec)
    rng, seen = np.random.default_rng(seed), []

    class RandomPolicy:
        version = 0

        def step(self, key, num_steps, timestep, state):
            seen.append(jax.tree.map(np.copy, timestep.observation))
            logits = np.zeros([environment.num_envs, environment.spec.num_actions], np.float32)
            return AgentStep(rng.integers(environment.spec.num_actions, size=environment.num_envs), logits, state)

    actor = Actor(agent, environment, unroll_length, 0)
    return agent, (actor.act(RandomPolicy()) for _ in iter(int, 1)), seen


@pytest.mark.atari
@pytest.mark.parametrize('evaluation', [False, True])
def test_frames_of_a_game_come_back(evaluation):
    """Lives lost, and games that end, at every place of an unroll: Breakout's are short when nobody plays well."""
    environment = environments.make(EnvironmentConfig('atari/breakout'), 3, seed=1, evaluation=evaluation)
    agent, trajectories, seen = acting(environment, 9)
    decode = jax.jit(frame_stacks.stacked)
    kinds = set()
    for i in range(60):
        trajectory = next(trajectories)
        assert jax.tree.structure(trajectory) == agent.trajectory_structure()
        shapes = jax.tree.map(np.shape, (trajectory, agent.empty_trajectory(9, 3)))
        assert shapes[0].timesteps == shapes[1].timesteps
        stacks = np.asarray(decode(trajectory.timesteps.observation))
        np.testing.assert_array_equal(stacks[:-1], np.stack(seen[9 * i : 9 * i + 9]))
        empty = ~stacks[..., :-1].any(axis=(2, 3, 4))
        kinds |= set(zip(trajectory.timesteps.step_type.ravel().tolist(), empty.ravel().tolist(), strict=True))
    # Lives are episodes in training only: their first stacks go on.
    assert kinds == {(FIRST, True), (MID, False), (LAST, False)} | (set() if evaluation else {(FIRST, False)})
    assert isinstance(trajectory.timesteps.observation, FrameStacks)
    environment.close()


@pytest.mark.atari
def test_a_trajectory_is_a_quarter_as_large():
    environment = environments.make(EnvironmentConfig('atari/pong'), 2, seed=1)
    _, trajectories, _ = acting(environment, 20)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(next(trajectories)))
    environment.close()
    assert size < 2 * 84 * 84 * (20 + 4) * 1.01


def test_unpacked_the_network_gets_what_actors_have_shown_it():
    environment = Stacks(3, frame=(8, 8))
    timesteps = encoded(environment)
    acted = timesteps._replace(observation=timesteps.observation | {'a': np.stack(environment.seen[: T + 1])})
    agent = make_agent(NetworkConfig('deep'), environment.spec)
    params = agent.init(jax.random.PRNGKey(0))
    outputs = [agent.unroll(params, frame_stacks.unpacked(x), ())[0] for x in (timesteps, acted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *outputs)
    assert np.ptp(outputs[0].values) > 0
