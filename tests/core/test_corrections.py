"""The four corrections of table 2 against plain references, and the metrics of off-policyness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.build import make_loss
from impala_jax.config import ConfigError, LossConfig, VTraceConfig
from impala_jax.loss import LOG_RHO_EDGES
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, LAST, MID, StepInfo, TimeStep, Trajectory

T, B, A = 6, 5, 3
GAMMA = 0.9
CORRECTIONS = ('vtrace', 'one_step_is', 'epsilon_correction', 'none')
LOSS = LossConfig(discount=GAMMA, baseline_cost=0.5, entropy_cost=0.0, reward_clip='none')


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
def test_gradients(correction, lambda_):
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
def test_off_policyness(on_policy):
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
