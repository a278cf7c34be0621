"""How the loss takes rewards, by its numbers."""

import dataclasses
import math

import numpy as np
import pytest

from impala_jax.build import make_loss
from impala_jax.config import LossConfig, VTraceConfig
from impala_jax.loss import clip_rewards
from impala_jax.networks import NetworkOutput
from tests.core.test_learner import A, B, T, make_batch

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
