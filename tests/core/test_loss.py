"""The loss: its rewards, the corrections of table 2 against plain references, and how far off policy data is."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.build import make_loss
from impala_jax.config import (
    ConfigError,
    LossConfig,
    VTraceConfig,
)
from impala_jax.loss import LOG_RHO_EDGES, clip_rewards
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, LAST, MID, StepInfo, TimeStep, Trajectory
from tests.helpers.batches import make_batch
from tests.helpers.loss_targets import learned

T, B, A = 6, 5, 3
GAMMA = 0.9
CORRECTIONS = ('vtrace', 'one_step_is', 'epsilon_correction', 'none')
LOSS = LossConfig(discount=GAMMA, baseline_cost=0.5, entropy_cost=0.0, reward_clip='none')
REWARDS = [-10.0, -1.0, -0.5, 0.0, 0.5, 1.0, 10.0]
CLIPPED = {
    'unit': [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0],
    # 0.3 * 5 tanh(-2), 1.5 tanh(-0.2), 1.5 tanh(-0.1), then 5 tanh(r / 5)
    'asymmetric': [-1.446041, -0.296063, -0.149502, 0.0, 0.498340, 0.986877, 4.820138],
    # 0.3 tanh(-10), 0.3 tanh(-1), 0.3 tanh(-0.5), then 5 tanh(r)
    'asymmetric_paper': [-0.3, -0.228478, -0.138635, 0.0, 2.310586, 3.807971, 5.0],
    'none': REWARDS,
}


@pytest.mark.parametrize('mode', CLIPPED)
def test_rewards_are_clipped(mode):
    np.testing.assert_allclose(clip_rewards(np.array(REWARDS, np.float32), mode), CLIPPED[mode], rtol=1e-5, atol=1e-6)


def test_the_asymmetric_modes_by_their_formulas():
    """Straight from appendix D of the paper, and from its released code."""
    for r in REWARDS:
        squeezed = math.tanh(r / 5)
        released = 5 * (0.3 * squeezed if r < 0 else squeezed)
        paper = 0.3 * min(math.tanh(r), 0) + 5 * max(math.tanh(r), 0)
        for mode, expected in (('asymmetric', released), ('asymmetric_paper', paper)):
            np.testing.assert_allclose(clip_rewards(np.float32(r), mode), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('mode', CLIPPED)
def test_the_loss_learns_from_clipped_rewards(mode):
    """The same as from rewards that were clipped before and are left alone."""
    batch, rng = make_batch(), np.random.RandomState(1)
    batch = batch._replace(timesteps=batch.timesteps._replace(reward=4 * batch.timesteps.reward))
    T, B, A = batch.behaviour_logits.shape
    output = NetworkOutput(rng.randn(T + 1, B, A).astype(np.float32), rng.randn(T + 1, B).astype(np.float32))
    clipped = np.asarray(clip_rewards(batch.timesteps.reward, mode))
    before = batch._replace(timesteps=batch.timesteps._replace(reward=clipped))
    config = LossConfig(reward_clip=mode)
    loss, _ = make_loss(config, VTraceConfig())(output, batch.experience)
    expected, _ = make_loss(dataclasses.replace(config, reward_clip='none'), VTraceConfig())(output, before.experience)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    raw, _ = make_loss(dataclasses.replace(config, reward_clip='none'), VTraceConfig())(output, batch.experience)
    assert (abs(raw - loss) > 1e-2) == (mode != 'none')


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


def make_data(on_policy=False):
    """Some episodes end inside; the logits reach far enough apart for ratios from 0.01 to 50."""
    rng = np.random.RandomState(0)
    step_type = np.full([T + 1, B], MID, np.int32)
    step_type[2, 0], step_type[3, 0], step_type[4, 1], step_type[5, 1] = LAST, FIRST, LAST, FIRST
    discount = np.ones([T + 1, B], np.float32)
    discount[2, 0] = 0.0  # The other one is a truncation.
    logits = 2 * rng.randn(T + 1, B, A).astype(np.float32)
    timesteps = TimeStep(
        step_type=step_type,
        reward=rng.randn(T + 1, B).astype(np.float32),
        discount=discount,
        observation=np.zeros([T + 1, B, 1], np.float32),
        previous_action=rng.randint(A, size=[T + 1, B]).astype(np.int32),
    )
    behaviour = logits[:-1] if on_policy else 2 * rng.randn(T, B, A).astype(np.float32)
    info = StepInfo(np.zeros([T, B], np.float32), np.zeros([T, B], bool), np.zeros([T, B], np.int32))
    trajectory = Trajectory(timesteps, behaviour, (), info, np.zeros([B], np.int32), np.zeros([B], np.int32), None)
    return NetworkOutput(logits, rng.randn(T + 1, B).astype(np.float32)), trajectory


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float64)
    return e / e.sum(-1, keepdims=True)


def reference(output, trajectory, correction, config=VTraceConfig()):  # noqa: B008 - frozen
    """(gradient by the logits [T, B, A], gradient by the values [T, B]), from the definitions, in loops."""
    pi, mu = softmax(output.logits), softmax(trajectory.behaviour_logits)
    times, values = trajectory.timesteps, output.values.astype(np.float64)
    logits_gradient, values_gradient = np.zeros([T, B, A]), np.zeros([T, B])
    for b in range(B):
        v = float(values[T, b])  # The target at t + 1; the bootstrap first.
        for t in reversed(range(T)):
            if times.step_type[t + 1, b] == FIRST:
                v = float(values[t, b])
                continue
            a = trajectory.actions[t, b]
            ratio = pi[t, b, a] / mu[t, b, a]
            reward, gamma = float(times.reward[t + 1, b]), GAMMA * float(times.discount[t + 1, b])
            rho, c, pg = {
                'vtrace': (min(config.rho_bar, ratio), min(config.c_bar, ratio), min(config.pg_rho_bar, ratio)),
                'one_step_is': (1, 1, ratio),
                'epsilon_correction': (1, 1, 1),
                'none': (1, 1, 1),
            }[correction]
            advantage = pg * (reward + gamma * v - values[t, b])
            delta = rho * (reward + gamma * values[t + 1, b] - values[t, b])
            v = values[t, b] + delta + gamma * config.lambda_ * c * (v - values[t + 1, b])
            # d log(pi + eps) / d logits = pi / (pi + eps) (onehot - pi)
            damping = pi[t, b, a] / (pi[t, b, a] + 1e-6) if correction == 'epsilon_correction' else 1.0
            logits_gradient[t, b] = -advantage * damping * (np.eye(A)[a] - pi[t, b])
            values_gradient[t, b] = -LOSS.baseline_cost * (v - values[t, b])
    return logits_gradient, values_gradient


def gradients(output, trajectory, config):
    def loss(output):
        return make_loss(LOSS, config)(output, trajectory.experience)[0]

    gradient = jax.grad(loss)(output)
    assert not np.asarray(gradient.logits[-1]).any() and not np.asarray(gradient.values[-1]).any()
    return gradient.logits[:-1], gradient.values[:-1]


@pytest.mark.parametrize('lambda_', [1.0, 0.8])
@pytest.mark.parametrize('correction', CORRECTIONS)
def test_gradients_of_corrections_are_those_of_their_definitions(correction, lambda_):
    output, trajectory = make_data()
    config = VTraceConfig(correction=correction, lambda_=lambda_)
    for actual, expected in zip(
        gradients(output, trajectory, config), reference(output, trajectory, correction, config), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5)


def test_epsilon_keeps_the_gradient_of_an_impossible_action_small():
    """Where pi(a) is far below 1e-6, the gradient of log(pi + 1e-6) is pi/1e-6 of that of log pi."""
    output, trajectory = make_data()
    logits = output.logits.copy()
    action = trajectory.actions[0, 2]
    logits[0, 2] = 0.0
    logits[0, 2, action] = -25.0  # pi = 7e-12
    output = output._replace(logits=logits)
    plain, epsilon = (
        np.abs(gradients(output, trajectory, VTraceConfig(correction=correction))[0][0, 2]).max()
        for correction in ('none', 'epsilon_correction')
    )
    assert plain > 1e-2
    np.testing.assert_allclose(epsilon / plain, np.exp(-25) / 2 / 1e-6, rtol=1e-2)


@pytest.mark.parametrize('correction', ['vtrace', 'one_step_is', 'none'])
def test_on_policy_they_are_the_same(correction):
    output, trajectory = make_data(on_policy=True)
    for actual, expected in zip(
        gradients(output, trajectory, VTraceConfig(correction=correction)),
        reference(output, trajectory, 'none'),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize('correction', CORRECTIONS[1:])
@pytest.mark.parametrize('knob', ['rho_bar', 'c_bar', 'pg_rho_bar'])
def test_a_knob_without_effect_is_refused(correction, knob):
    with pytest.raises(ConfigError, match=f'vtrace.{knob} 0.5 has no effect'):
        VTraceConfig(correction=correction, **({'outside_theory': True, knob: 0.5}))


@pytest.mark.parametrize('on_policy', [True, False])
def test_metrics_say_how_far_off_policy_data_is(on_policy):
    output, trajectory = make_data(on_policy)
    _, (logs, _, _) = make_loss(LOSS, VTraceConfig(rho_bar=2.0, c_bar=0.5))(output, trajectory.experience)
    pi, mu = softmax(output.logits)[:-1], softmax(trajectory.behaviour_logits)
    counted = trajectory.timesteps.step_type[1:] != FIRST
    taken = trajectory.actions[..., None]
    rho = (np.take_along_axis(pi, taken, -1) / np.take_along_axis(mu, taken, -1))[..., 0][counted]
    kl = np.sum(mu * np.log(mu / pi), -1)[counted]
    expected = {
        'rho_truncated_fraction': np.mean(rho > 2.0),
        'c_truncated_fraction': np.mean(rho > 0.5),
        'kl_behaviour_target': np.mean(kl),
        'effective_sample_size': rho.sum() ** 2 / (rho.size * np.sum(rho**2)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    clipped = np.clip(np.log(rho), LOG_RHO_EDGES[0], LOG_RHO_EDGES[-1])
    np.testing.assert_array_equal(logs['log_rho_histogram'], np.histogram(clipped, LOG_RHO_EDGES)[0])
    assert jnp.sum(logs['log_rho_histogram']) == T * B - 2
    if on_policy:
        assert logs['effective_sample_size'] == pytest.approx(1)
        assert logs['log_rho_histogram'][7] == T * B - 2
