"""The loss (section 4.2): policy gradient, baseline and entropy, SUMMED over time and batch."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from impala_jax import vtrace
from impala_jax.config import LossConfig, VTraceConfig
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, Array, Trajectory


def impala_loss(
    output: NetworkOutput, trajectory: Trajectory, config: LossConfig, vtrace_config: VTraceConfig
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch of trajectories.

    Args:
      output: logits [T + 1, B, A] and values [T + 1, B] of the learner's parameters at the trajectory's timesteps.
      trajectory: [T + 1, B].
      config: weights, discount and reward clipping.
      vtrace_config: truncation levels.

    Returns:
      The loss, a scalar, and scalars for the log: `policy_loss`, `baseline_loss` (both as weighted in the loss), and
      `entropy`, the mean over the transitions that count.

    Raises:
      AssertionError: shapes that do not agree.
    """
    timesteps, actions = trajectory.timesteps, trajectory.actions
    chex.assert_equal_shape_prefix([output.logits[:-1], trajectory.behaviour_logits, actions], 2)
    chex.assert_equal_shape([output.values, timesteps.reward])

    # The arrival at an episode's first step is not a transition of the task: the action before it was ignored.
    mask = timesteps.step_type[1:] != FIRST
    rewards = timesteps.reward[1:]
    if config.reward_clip == 'unit':
        rewards = jnp.clip(rewards, -1.0, 1.0)

    log_policy = jax.nn.log_softmax(output.logits[:-1])
    log_behaviour = jax.nn.log_softmax(trajectory.behaviour_logits)
    log_pi = jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]
    log_mu = jnp.take_along_axis(log_behaviour, actions[..., None], axis=-1)[..., 0]
    targets = vtrace.from_importance_weights(
        log_rhos=jnp.where(mask, jax.lax.stop_gradient(log_pi) - log_mu, -jnp.inf),
        discounts=config.discount * timesteps.discount[1:],
        rewards=rewards,
        values=jax.lax.stop_gradient(output.values[:-1]),
        bootstrap_value=jax.lax.stop_gradient(output.values[-1]),
        clip_rho_threshold=vtrace_config.rho_bar,
        clip_c_threshold=vtrace_config.c_bar,
        clip_pg_rho_threshold=vtrace_config.pg_rho_bar,
        lambda_=vtrace_config.lambda_,
        implementation=vtrace_config.implementation,
    )

    entropies = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
    policy_loss = -jnp.sum(mask * log_pi * targets.pg_advantages)
    baseline_loss = config.baseline_cost * 0.5 * jnp.sum(mask * jnp.square(targets.vs - output.values[:-1]))
    loss = policy_loss + baseline_loss - config.entropy_cost * jnp.sum(mask * entropies)
    return loss, {
        'policy_loss': policy_loss,
        'baseline_loss': baseline_loss,
        'entropy': jnp.sum(mask * entropies) / jnp.maximum(jnp.sum(mask), 1),
    }
