"""The mistakes that other implementations of IMPALA made, one test each.

Data comes from the real Actor, and what is learned from it is read off the real loss: from its gradient with respect to
the network's outputs follow the targets v_s and the advantages (`learned`). No network is trained here.
"""

import functools
import json
import math
from typing import NamedTuple

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dm_env import specs

from impala_jax import build, environments
from impala_jax.actor import Actor, run_actor
from impala_jax.build import make_agent, make_loss, make_training
from impala_jax.config import (
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    VTraceConfig,
)
from impala_jax.environments import factories
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.evaluation.evaluator import Evaluator
from impala_jax.networks import NetworkOutput
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.types import FIRST, LAST, Closed, TimeStep, Trajectory

A = 3


class Counting(dm_env.Environment):
    """Every timestep of its life has a number, which it shows; it keeps a record of every transition.

    The reward is `reward(count, action)`. Episodes last `length` steps, and terminate or are truncated by turns.
    """

    def __init__(self, reward, length=4, ends=(dm_env.termination, dm_env.truncation)):
        self.transitions = []  # (number of the timestep before, action, reward)
        self.returns = []
        self._reward = reward
        self._length = length
        self._ends = ends
        self._count = -1
        self._steps = 0

    def reset(self):
        self._count += 1
        self._steps = 0
        self.returns.append(0.0)
        return dm_env.restart(self._observe())

    def step(self, action):
        reward = self._reward(self._count, action)
        self.transitions.append((self._count, action, reward))
        self.returns[-1] += reward
        self._count += 1
        self._steps += 1
        if self._steps < self._length:
            return dm_env.transition(reward, self._observe())
        return self._ends[len(self.returns) % len(self._ends)](reward, self._observe())

    def observation_spec(self):
        return specs.Array((1,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(A)

    def _observe(self):
        return np.array([self._count], np.float32)


def make_counting(num_envs=2, reward=lambda count, action: 0.01 * count + 0.1 * action, **kwargs):
    """A vector of Counting environments, and the environments themselves; lengths of episodes differ."""
    made = []

    def factory(seed):
        made.append(Counting(reward, **({'length': 4 + len(made)} | kwargs)))
        return made[-1]

    return SerialVectorEnvironment(factory, num_envs, seed=0), made


def make_actor(environment, unroll_length=11, network=NetworkConfig('mlp', mlp_sizes=(4,)), seed=0):  # noqa: B008
    agent = make_agent(network, environment.spec)
    return Actor(agent, environment, unroll_length, seed), agent.init(jax.random.PRNGKey(seed))


class Learned(NamedTuple):
    """What the loss teaches, NaN where a transition is left out."""

    targets: np.ndarray  # [T, B], v_s
    advantages: np.ndarray  # [T, B]


@functools.partial(jax.jit, static_argnums=(2, 3))
def loss_gradient(output, trajectory, config, vtrace):
    return jax.grad(lambda output: make_loss(config, vtrace)(output, trajectory.experience)[0])(output)


def learned(trajectory: Trajectory, values=None, logits=None, vtrace=VTraceConfig(), **loss) -> Learned:  # noqa: B008
    """Targets and advantages, from the gradient of the loss.

    Its gradient with respect to V(x_t) is V(x_t) - v_t, and to the logit of action t -(1 - pi(a_t)) advantage_t.
    """
    if values is None:
        values = np.zeros(trajectory.timesteps.reward.shape, np.float32)
    if logits is None:  # on policy
        logits = np.concatenate([trajectory.behaviour_logits, np.zeros_like(trajectory.behaviour_logits[:1])])
    # A little entropy cost tells what is left out: there nothing at all pulls at the logits.
    entropy_cost = 1e-4
    config = LossConfig(**({'baseline_cost': 1.0, 'entropy_cost': entropy_cost, 'reward_clip': 'none'} | loss))

    output = NetworkOutput(jnp.asarray(logits), jnp.asarray(values))
    gradient = loss_gradient(
        output, trajectory._replace(info=None, version=None, task=None, game_version=None), config, vtrace
    )
    gradient = jax.tree.map(np.array, gradient)
    # The values at T are only bootstrapped from, and the logits there are not used at all.
    np.testing.assert_array_equal(gradient.logits[-1], 0)
    np.testing.assert_array_equal(gradient.values[-1], 0)
    masked = (gradient.logits[:-1] == 0).all(axis=-1)
    np.testing.assert_array_equal(gradient.values[:-1][masked], 0)

    pi = np.array(jax.nn.softmax(logits[:-1]))
    log_pi = np.log(pi)
    entropy_gradient = pi * (np.sum(pi * log_pi, axis=-1, keepdims=True) - log_pi)  # of the entropy
    policy = gradient.logits[:-1] + entropy_cost * entropy_gradient
    chosen = trajectory.actions[..., None]
    at_action, pi_action = (np.take_along_axis(x, chosen, axis=-1)[..., 0] for x in (policy, pi))
    targets = values[:-1] - gradient.values[:-1] / config.baseline_cost
    return Learned(*(np.where(masked, np.nan, x) for x in (targets, -at_action / (1 - pi_action))))


def counted(values) -> np.ndarray:
    """What the loss learns from, in order, of one environment."""
    return values[~np.isnan(values)]


def by_number(trajectory, scale=0.1):
    """Values [T + 1, B] that tell the timesteps apart: a sawtooth of their number."""
    return scale * (7 * trajectory.timesteps.observation[..., 0] % 10 - 4.5)


def cut(trajectory, start, stop):
    """Transitions `start` to `stop`, as a trajectory of their own; without a recurrent core."""
    return trajectory._replace(
        timesteps=jax.tree.map(lambda x: x[start : stop + 1], trajectory.timesteps),
        behaviour_logits=trajectory.behaviour_logits[start:stop],
        info=jax.tree.map(lambda x: x[start:stop], trajectory.info),
        game_version=trajectory.game_version[start:stop],
    )


def assert_close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


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


def test_reward_is_not_one_step_late():
    """Without a future (discount 0), the advantage of an action is the reward that this action brought."""
    environment, made = make_counting()
    actor, params = make_actor(environment)
    trajectory = actor.unroll(0, params)
    advantages = learned(trajectory, discount=0.0).advantages
    for i in range(2):
        assert_close(counted(advantages[:, i]), [reward for _, _, reward in made[i].transitions])
        # An episode's first action, too, and at its own observation.
        number = {int(count): t for t, count in enumerate(trajectory.timesteps.observation[:, i, 0])}
        for count, action, reward in made[i].transitions:
            assert trajectory.actions[number[count], i] == action
            assert_close(advantages[number[count], i], reward)


def test_no_transition_lost_or_counted_twice():
    """Over several unrolls every reward is learned from once, and every episode's return is counted once."""
    environment, made = make_counting(reward=lambda count, action: float(count))
    actor, params = make_actor(environment, unroll_length=3)
    trajectories = [actor.unroll(0, params) for _ in range(7)]
    rewards = np.concatenate([learned(trajectory, discount=0.0).advantages for trajectory in trajectories])
    info = jax.tree.map(lambda *parts: np.concatenate(parts), *(trajectory.info for trajectory in trajectories))
    for i in range(2):
        assert len(made[i].transitions) > 15
        assert_close(counted(rewards[:, i]), [reward for _, _, reward in made[i].transitions])
        ended = made[i].returns[: len(made[i].transitions) // (4 + i)]
        assert_close(info.episode_return[info.episode_ended[:, i], i], ended)
    for before, after in zip(trajectories, trajectories[1:], strict=False):
        assert before.timesteps.reward.shape == (4, 2)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[-1], b[0]), before.timesteps, after.timesteps)


def test_reset_transition_is_masked():
    """The transition into FIRST teaches nothing, whatever it holds; and it alone is left out."""
    environment, _ = make_counting()
    actor, params = make_actor(environment)
    trajectory = actor.unroll(0, params)
    into_first = trajectory.timesteps.step_type[1:] == FIRST
    assert into_first.any()
    values = by_number(trajectory)
    before = learned(trajectory, values)
    for x in before:
        np.testing.assert_array_equal(np.isnan(x), into_first)

    # Another ignored action, other logits at LAST, and a reward and discount at FIRST.
    reward, discount, action = (
        np.array(x) for x in (trajectory.timesteps.reward, trajectory.timesteps.discount, trajectory.actions)
    )
    reward[1:][into_first], discount[1:][into_first] = 99, 0.5
    previous_action = trajectory.timesteps.previous_action.copy()
    previous_action[1:][into_first] = (action[into_first] + 1) % A
    logits = trajectory.behaviour_logits.copy()
    logits[into_first] = [3, -2, 5]
    timesteps = trajectory.timesteps._replace(reward=reward, discount=discount, previous_action=previous_action)
    after = learned(trajectory._replace(timesteps=timesteps, behaviour_logits=logits), values)
    for a, b in zip(before, after, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('end', [dm_env.termination, dm_env.truncation])
def test_truncation_bootstraps_from_its_own_observation(end):
    """Of V only V(LAST) is not 0, or only V(FIRST): truncation learns from the first, termination from neither."""
    environment, _ = make_counting(num_envs=1, length=4, ends=(end,), reward=lambda count, action: 0.0)
    actor, params = make_actor(environment, unroll_length=13)
    trajectory = actor.unroll(0, params)
    step_type = trajectory.timesteps.step_type
    assert (step_type[:6, 0] == [FIRST, 1, 1, 1, LAST, FIRST]).all()
    assert (trajectory.timesteps.discount[step_type == LAST] == (end is dm_env.truncation)).all()

    at_last = np.where(step_type == LAST, 2.0, 0.0).astype(np.float32)
    targets = learned(trajectory, at_last, discount=0.5).targets[:, 0]
    steps_to_last = np.array([4, 3, 2, 1, np.nan] * 2)
    expected = 2 * 0.5**steps_to_last if end is dm_env.truncation else 0 * steps_to_last
    assert_close(targets[:10], expected)
    assert_close(targets[10:], 0)  # the last episode has no end in this unroll

    at_first = np.where(step_type == FIRST, 2.0, 0.0).astype(np.float32)
    assert_close(counted(learned(trajectory, at_first, discount=0.5).targets), 0)


def test_unroll_cut_in_two_gives_the_same_targets():
    """At an episode's end, and with one-step targets anywhere, where one cuts makes no difference; nor with the true
    values, whose temporal differences are all 0."""
    environment, _ = make_counting(num_envs=1, reward=lambda count, action: 0.1 * count)
    actor, params = make_actor(environment, unroll_length=12)
    whole = actor.unroll(0, params)
    T = len(whole.actions)
    step_type = whole.timesteps.step_type[:, 0]

    def pieces(at, values, **kwargs):
        parts = [
            learned(cut(whole, start, stop), values[start : stop + 1], **kwargs) for start, stop in ((0, at), (at, T))
        ]
        return Learned(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def assert_same(at, values, **kwargs):
        for a, b in zip(pieces(at, values, **kwargs), learned(whole, values, **kwargs), strict=True):
            assert_close(a, b)

    values = by_number(whole)
    ends = np.flatnonzero((step_type == LAST) | (step_type == FIRST))
    ends = ends[(ends > 0) & (ends < T)]
    assert ends.tolist() == [4, 5, 9, 10]
    for at in (4, 5, 9):
        assert_same(at, values)
    for at in (5, 7):
        # The target of one step; the advantage bootstraps from v, and so still sees one step beyond the cut.
        one_step = {'vtrace': VTraceConfig(lambda_=0.0)}
        assert_close(pieces(at, values, **one_step).targets, learned(whole, values, **one_step).targets)

    # The true values, backwards: what is beyond the unroll counts as it is.
    true_values = by_number(whole)
    for t in reversed(range(T)):
        if step_type[t + 1] != FIRST:
            bootstrap = 0.99 * whole.timesteps.discount[t + 1] * true_values[t + 1]
            true_values[t] = whole.timesteps.reward[t + 1] + bootstrap
    assert_close(counted(learned(whole, true_values).advantages), 0)
    for at in (3, 4, 5, 7):
        assert_same(at, true_values)

    # And the actor cuts as we do: two unrolls hold what one of twice the length does.
    environment, _ = make_counting(num_envs=1, reward=lambda count, action: 0.1 * count)
    short, _ = make_actor(environment, unroll_length=T // 2)
    for start in (0, T // 2):
        part, expected = short.unroll(0, params), cut(whole, start, start + T // 2)
        jax.tree.map(np.testing.assert_array_equal, part.timesteps, expected.timesteps)
        jax.tree.map(assert_close, part.behaviour_logits, expected.behaviour_logits)


def off_policy(T=6, B=40, seed=0):
    """A trajectory without an episode's end, and logits [T + 1, B, A] of another policy, values [T + 1, B]."""
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.randn(*shape).astype(np.float32)  # noqa: E731
    timesteps = TimeStep(
        np.ones([T + 1, B], np.int32),
        normal(T + 1, B),
        np.ones([T + 1, B], np.float32),
        normal(T + 1, B, 1),
        rng.randint(A, size=(T + 1, B)).astype(np.int32),
    )
    trajectory = Trajectory(timesteps, normal(T, B, A), (), None, None, None, None)  # pyright: ignore[reportArgumentType]
    return trajectory, normal(T + 1, B, A), normal(T + 1, B)


def test_c_bar_is_a_knob():
    """Each of the four reaches the loss, as itself: the targets are those of equation 1, computed with it."""
    trajectory, logits, values = off_policy()
    chosen = trajectory.actions[..., None]
    log_pi, log_mu = (
        np.take_along_axis(np.array(jax.nn.log_softmax(x)), chosen, axis=-1)[..., 0]
        for x in (logits[:-1], trajectory.behaviour_logits)
    )
    ratios = np.exp(log_pi - log_mu)
    assert (ratios < 0.5).any() and (ratios > 3).any()
    seen = []
    for rho_bar, c_bar, pg_rho_bar, lambda_ in [
        (1, 1, 1, 1),
        (1, 0.3, 1, 1),
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (1, 1, 4, 1),
        (1, 1, 1, 0.5),
        (1, 2, 1, 1),
        (math.inf, math.inf, math.inf, 1),
    ]:
        targets = values.copy()
        for t in reversed(range(len(ratios))):
            delta = trajectory.timesteps.reward[t + 1] + 0.9 * values[t + 1] - values[t]
            c = lambda_ * np.minimum(c_bar, ratios[t])
            trace = 0.9 * c * (targets[t + 1] - values[t + 1])
            targets[t] = values[t] + np.minimum(rho_bar, ratios[t]) * delta + trace
        advantages = trajectory.timesteps.reward[1:] + 0.9 * targets[1:] - values[:-1]
        config = VTraceConfig(rho_bar, c_bar, pg_rho_bar, lambda_, outside_theory=True)
        actual = learned(trajectory, values, logits, config, discount=0.9)
        np.testing.assert_allclose(actual.targets, targets[:-1], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(actual.advantages, np.minimum(pg_rho_bar, ratios) * advantages, rtol=1e-3, atol=2e-3)
        seen.append(np.concatenate([actual.targets, actual.advantages]))
    for i, a in enumerate(seen):
        assert all(np.abs(a - b).max() > 0.05 for b in seen[:i])


@pytest.mark.parametrize('compute_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('core', ['feedforward', 'lstm'])
def test_on_policy_ratios_are_one(core, compute_dtype):
    """The learner's unroll, on eight devices, gives the logits that each action was sampled from; over several
    unrolls, and so with states that the actor carried on."""
    environment, _ = make_counting(num_envs=8)
    network = NetworkConfig('mlp', core=core, mlp_sizes=(16,), lstm_size=8, compute_dtype=compute_dtype)
    actor, params = make_actor(environment, unroll_length=7, network=network)
    # Neither uniform nor certain, so that another temperature would show.
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda x: 0.2 * rng.randn(*x.shape).astype(np.float32), params)
    agent = make_agent(network, environment.spec)
    config = Config(network=network, learner=LearnerConfig(batch_size=8, unroll_length=7))
    learner = build.make_learner(config, agent)
    unroll = jax.jit(agent.unroll)
    for _ in range(4):
        trajectory = actor.unroll(0, params)
        batch = learner.put(trajectory.experience)
        output, _ = unroll(params, batch.timesteps, batch.initial_state)
        chosen = trajectory.actions[..., None]
        log_pi, log_mu = (
            np.take_along_axis(np.array(jax.nn.log_softmax(x)), chosen, axis=-1)
            for x in (np.array(output.logits)[:-1], trajectory.behaviour_logits)
        )
        np.testing.assert_allclose(np.exp(log_pi - log_mu), 1, atol=1e-5)
        assert log_mu.std() > 0.05
    assert actor.unroll(5, params).version.tolist() == [5] * 8


SMALL = NetworkConfig('mlp', mlp_sizes=(8,))


def make_learner(num_envs=8, devices=None, unroll_length=5, loss=LossConfig(), learning_rate=1e-2):  # noqa: B008
    """A learner, and an actor whose trajectories fit it."""
    environment, _ = make_counting(num_envs)
    actor, params = make_actor(environment, unroll_length, SMALL)
    config = Config(
        total_frames=100 * num_envs * unroll_length,
        network=SMALL,
        loss=loss,
        learner=LearnerConfig(batch_size=num_envs, unroll_length=unroll_length),
        optimizer=OptimizerConfig(learning_rate=learning_rate, max_grad_norm=math.inf),
    )
    return build.make_learner(config, make_agent(SMALL, environment.spec), devices), actor, params


def test_entropy_has_the_right_sign():
    """Where only the entropy pulls (no reward, V = 0), a peaked policy becomes more uniform."""
    learner, actor, params = make_learner(loss=LossConfig(baseline_cost=0.0), learning_rate=0.1)
    params['params']['baseline'] = jax.tree.map(jnp.zeros_like, params['params']['baseline'])
    params['params']['policy']['bias'] = jnp.array([2.0, 0.0, 0.0])
    trajectory = actor.unroll(0, params)
    trajectory = trajectory._replace(timesteps=jax.tree.map(np.array, trajectory.timesteps))
    trajectory.timesteps.reward[:] = 0
    trajectory.timesteps.observation[:] = 0
    batch = learner.put(trajectory.experience)
    state = learner.init(jax.random.PRNGKey(0))
    state = learner.restore(state._replace(params=params))
    entropies = []
    for _ in range(30):
        state, logs = learner.update(state, batch)
        entropies.append(float(logs['entropy']))
        assert float(logs['policy_loss']) == 0
    assert (np.diff(entropies) > 0).all()
    assert entropies[0] < 0.8 < entropies[-1] <= math.log(A) + 1e-5


def test_update_does_not_depend_on_the_device_count():
    """The loss is one sum over the whole batch: twice the batch is twice the loss, and any mesh does the same."""
    updated = {}
    for num_devices in (1, 8):
        learner, actor, params = make_learner(devices=jax.devices()[:num_devices])
        trajectory = actor.unroll(0, params)
        state = learner.restore(learner.init(jax.random.PRNGKey(1))._replace(params=params))
        state, logs = learner.update(state, trajectory)
        updated[num_devices] = jax.tree.map(np.array, (state.params, logs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), updated[1], updated[8])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), updated[1][0], jax.tree.map(np.array, params))
    assert max(jax.tree.leaves(moved)) > 1e-3

    @jax.jit
    def total(trajectory):
        output, _ = make_agent(SMALL, actor.environment.spec).unroll(params, trajectory.timesteps, ())
        return make_loss(LossConfig(), VTraceConfig())(output, trajectory.experience)

    once, (logs, _, _) = total(trajectory)
    doubled = jax.tree.map(lambda x: np.concatenate([x, x], axis=1 if x.ndim > 1 else 0), trajectory)
    twice, (doubled_logs, _, _) = total(doubled)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    np.testing.assert_allclose(updated[8][1]['loss'], once, rtol=1e-5)
    for name in ('policy_loss', 'baseline_loss'):
        np.testing.assert_allclose(doubled_logs[name], 2 * logs[name], rtol=1e-4)
    np.testing.assert_allclose(doubled_logs['entropy'], logs['entropy'], rtol=1e-5)  # a mean, for people
    # Over time, too: the parts of an unroll that is cut at an episode's end add up.
    at = int(np.flatnonzero(trajectory.timesteps.step_type[:, 0] == LAST)[0])
    one = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x[:1], trajectory)
    parts = [total(cut(one, start, stop))[0] for start, stop in ((0, at), (at, 5))]
    np.testing.assert_allclose(sum(parts), total(one)[0], rtol=1e-4)


def test_reward_is_clipped_in_the_learner_only():
    """The loss sees [-1, 1]; the trajectory and the reported returns are raw."""
    raw = [10.0, -7.0, 0.3, 0.0]
    environment, made = make_counting(num_envs=1, reward=lambda count, action: raw[count % 5 % 4], length=4)
    actor, params = make_actor(environment, unroll_length=14)
    trajectory = actor.unroll(0, params)
    expected = [reward for _, _, reward in made[0].transitions]
    assert set(expected) == set(raw)
    into = trajectory.timesteps.step_type[1:] != FIRST
    assert_close(trajectory.timesteps.reward[1:][into], expected)
    assert_close(trajectory.info.episode_return[trajectory.info.episode_ended], [sum(raw)] * 3)
    assert_close(counted(learned(trajectory, discount=0.0, reward_clip='unit').advantages), np.clip(expected, -1, 1))
    assert_close(counted(learned(trajectory, discount=0.0, reward_clip='none').advantages), expected)
    assert LossConfig().reward_clip == 'unit'


@pytest.mark.atari
def test_returns_are_per_game():
    """In training an episode is a life, but a return is that of all lives of a game."""
    environment = environments.make(EnvironmentConfig('atari/breakout'), 2, seed=0)
    actor, params = make_actor(environment, 400, SMALL)
    trajectory = actor.unroll(0, params)
    environment.close()
    last = trajectory.timesteps.step_type[1:] == LAST
    returns = trajectory.info.episode_return
    for i in range(2):
        ends = np.flatnonzero(trajectory.info.episode_ended[:, i])
        assert len(ends) >= 1
        start = 0
        for end in ends:
            assert last[start : end + 1, i].sum() == 5
            assert returns[end, i] == trajectory.timesteps.reward[1 + start : 2 + end, i].sum()
            start = end + 1
    assert np.nanmax(returns) > 0


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture
def loop(tmp_path):
    """A loop with action repeat 3, and trajectories of 5 steps of 4 environments for it."""
    environment, _ = make_counting(num_envs=4, length=7)
    actor, params = make_actor(environment, 5, SMALL)
    config = Config(
        total_frames=1000,
        environment=EnvironmentConfig(action_repeat=3),
        network=SMALL,
        learner=LearnerConfig(batch_size=4, unroll_length=5, num_devices=1),
    )
    loop, metrics, _ = make_training(config, make_agent(SMALL, environment.spec), tmp_path, lambda *_: None)
    loop.unroll = lambda version: actor.unroll(version, params)
    loop.learn = lambda trajectories: loop.step(loop.put(trajectories))
    loop.log = lambda: metrics.log(loop)
    yield loop
    loop.close()


def test_frames_count_action_repeat(loop, tmp_path):
    """One unit everywhere: agent steps times action repeat."""
    for version in range(2):
        loop.learn(loop.unroll(version))
    loop.log()
    assert loop.frames == 2 * 5 * 4 * 3
    assert rows(tmp_path)[-1]['frames'] == 2 * 5 * 4 * 3
    assert rows(tmp_path)[-1]['learner_steps'] == 2
    config = Config(total_frames=10_000, environment=EnvironmentConfig('atari/pong'))
    assert config.frames_per_update == 32 * 20 * 4
    assert config.total_updates == math.ceil(10_000 / (32 * 20 * 4))


def test_policy_lag_is_logged(loop, tmp_path):
    """Minimum, mean and maximum over the trajectories since the last row, each with the version it was acted with."""
    for version in (0, 0, 0, 3):  # 0, 1, 2 and 0 updates before the one that learns from it
        batch = loop.unroll(version)
        assert (batch.version == version).all()
        loop.learn(batch)
    loop.log()
    row = rows(tmp_path)[-1]
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 0.75, 2)
    # Within a batch, too: a trajectory each.
    loop.learn(loop.unroll(4)._replace(version=np.array([4, 3, 2, 0], np.int32)))
    loop.log()
    row = rows(tmp_path)[-1]
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 1.75, 4)


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


def test_mean_return_absent_when_no_episode_ended(loop, tmp_path):
    """Neither NaN nor 0 nor the last one again; and the mean of what ended, where something did."""
    for version in range(5):  # 5 steps each; an episode's end every 8
        loop.learn(loop.unroll(version))
        loop.log()
    written = rows(tmp_path)
    assert [row['episodes'] for row in written] == [0, 4, 8, 8, 12]
    assert ['episode_return' in row for row in written] == [False, True, True, False, True]
    assert all(np.isfinite(row['episode_return']) for row in written if 'episode_return' in row)
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


@pytest.mark.atari
@pytest.mark.parametrize('repeat', [1, 4])
def test_no_double_frame_skip(repeat):
    """An agent step is as many frames of the emulator as are counted."""
    config = EnvironmentConfig('atari/pong', action_repeat=repeat)
    environment = environments.make(config, 2, seed=0)
    environment.reset()
    frames = []
    emulator_step = environment._emulator.step

    def step(actions):
        result = emulator_step(actions)
        frames.append(result[-1]['episode_frame_number'].copy())
        return result

    environment._emulator.step = step
    for _ in range(10):
        environment.step(np.zeros(2, np.int32))
    environment.close()
    np.testing.assert_array_equal(np.diff(frames, axis=0), repeat)
    assert config.frames_per_step == repeat
    assert EnvironmentConfig('atari/pong').frames_per_step == 4


@pytest.mark.atari
@pytest.mark.parametrize('preset, sticky, num_actions', [('paper', False, 6), ('machado', True, 18)])
def test_presets_do_not_mix(preset, sticky, num_actions):
    """`paper`: no-ops, the minimal actions, nothing sticky. `machado`: all actions, sticky ones, no no-ops."""
    environment = environments.make(EnvironmentConfig('atari/pong', preset=preset), 16, seed=0)
    assert environment.spec.num_actions == num_actions
    _, info = environment._emulator.reset(seed=np.arange(16))
    no_ops = info['episode_frame_number']
    assert no_ops.any() == (preset == 'paper')
    rng = np.random.RandomState(0)
    for _ in range(30):
        timestep, _ = environment.step(np.full(16, rng.randint(num_actions)))
    newest = timestep.observation[..., -1]
    environment.close()
    # Games of other seeds that begin alike and get the same actions stay alike, unless actions stick.
    groups = [newest[no_ops == number] for number in set(no_ops.tolist())]
    assert max(len(group) for group in groups) > 1
    assert any((group != group[:1]).any() for group in groups) == sticky


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
