"""What the loss learns from: targets and advantages, read off its gradient."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.build import make_loss
from impala_jax.config import (
    LossConfig,
    VTraceConfig,
)
from impala_jax.networks import NetworkOutput
from impala_jax.types import Trajectory


class Learned(NamedTuple):
    """What the loss teaches, NaN where a transition is left out."""

    targets: np.ndarray  # [T, B], v_s
    advantages: np.ndarray  # [T, B]


@functools.partial(jax.jit, static_argnums=(2, 3))
def loss_gradient(output, trajectory, config, vtrace):
    """Gradient of the loss with respect to the output."""
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


def assert_close(actual, expected, atol=1e-5):
    """Asserts that arrays agree as float32 does."""
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)
