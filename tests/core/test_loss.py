"""How the loss takes rewards, by its numbers."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from impala_jax.build import make_loss
from impala_jax.config import (
    LossConfig,
    VTraceConfig,
)
from impala_jax.loss import clip_rewards
from impala_jax.networks import NetworkOutput
from impala_jax.types import TimeStep, Trajectory
from tests.helpers.batches import A, B, T, make_batch
from tests.helpers.loss_targets import learned

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
