"""The loss (section 4.2): policy gradient, baseline and entropy, SUMMED over time and batch."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import vtrace
from impala_jax.config import VTraceConfig
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, Array, Experience, TimeStep

LOG_RHO_EDGES = np.array([-4, -2, -1, -0.5, -0.2, -0.1, -0.05, -0.01, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 4], np.float32)
"""Bins of the log's `log_rho_histogram`; the outer ones are open. What is on-policy falls into the middle one."""

_EPSILON = 1e-6  # of `epsilon_correction`


class LossDetails(NamedTuple):
    """What the loss was made of; no gradient flows out."""

    logs: dict[str, Array]  # scalars, and `log_rho_histogram`
    value_targets: Array | None = None  # [T, B]; PopArt needs both.
    mask: Array | None = None  # bool [T, B], the transitions that count


class Loss(Protocol):
    """A loss that `Learner` can minimise."""

    def __call__(
        self,
        output: NetworkOutput,
        experience: Experience,
        *,
        entropy_cost: Array | float | None = None,
        value_scale: Array | None = None,
    ) -> tuple[Array, LossDetails]:
        """The loss of a batch, a scalar, and what it was made of.

        Args:
          output: logits [T + 1, B, A] and values [T + 1, B] of the learner's parameters at the batch's timesteps.
          experience: [T + 1, B].
          entropy_cost: A scalar in place of the loss's own; given only where it is scheduled or tuned.
          value_scale: [B], what advantages and the values' errors are divided by; given only with PopArt.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ImpalaLoss:
    """The loss of the paper, over whatever transitions count.

    Args:
      discount: gamma; it multiplies the environment's own discount.
      baseline_cost: Weight of the values' squared errors, which are halved.
      entropy_cost: Weight of the entropy.
      reward_clip: A mode of `clip_rewards`.
      vtrace: The off-policy correction and its truncation levels.
    """

    discount: float = 0.99
    baseline_cost: float = 0.5
    entropy_cost: float = 0.01
    reward_clip: Literal['unit', 'asymmetric', 'asymmetric_paper', 'none'] = 'unit'
    vtrace: VTraceConfig = VTraceConfig()

    def __call__(
        self,
        output: NetworkOutput,
        experience: Experience,
        *,
        entropy_cost: Array | float | None = None,
        value_scale: Array | None = None,
    ) -> tuple[Array, LossDetails]:
        """As `Loss`.

        Returns:
          The loss, a scalar, and LossDetails, whose `logs` are `policy_loss`, `baseline_loss` (both as weighted in the
          loss), and `entropy`, the mean over the transitions that count; beside them those of `off_policyness`.

        Raises:
          AssertionError: shapes that do not agree.
        """
        timesteps, actions = experience.timesteps, experience.actions
        chex.assert_equal_shape_prefix([output.logits[:-1], experience.behaviour_logits, actions], 2)
        chex.assert_equal_shape([output.values, timesteps.reward])

        # The arrival at an episode's first step is not a transition of the task: the action before it was ignored.
        mask = timesteps.step_type[1:] != FIRST

        log_policy = jax.nn.log_softmax(output.logits[:-1])
        log_behaviour = jax.nn.log_softmax(experience.behaviour_logits)
        log_pi = jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]
        log_mu = jnp.take_along_axis(log_behaviour, actions[..., None], axis=-1)[..., 0]
        log_rhos = jnp.where(mask, jax.lax.stop_gradient(log_pi) - log_mu, -jnp.inf)
        targets = self._targets(log_rhos, timesteps, jax.lax.stop_gradient(output.values))

        entropies = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
        if self.vtrace.correction == 'epsilon_correction':
            log_pi = jnp.log(jnp.exp(log_pi) + _EPSILON)
        pg_advantages, errors = targets.pg_advantages, targets.vs - output.values[:-1]
        if value_scale is not None:
            pg_advantages, errors = pg_advantages / value_scale[None], errors / value_scale[None]
        entropy_cost = self.entropy_cost if entropy_cost is None else entropy_cost
        policy_loss = -jnp.sum(mask * log_pi * pg_advantages)
        baseline_loss = self.baseline_cost * 0.5 * jnp.sum(mask * jnp.square(errors))
        loss = policy_loss + baseline_loss - entropy_cost * jnp.sum(mask * entropies)
        logs = {
            'policy_loss': policy_loss,
            'baseline_loss': baseline_loss,
            'entropy': _mean(entropies, mask),
            **off_policyness(log_rhos, log_policy, log_behaviour, mask, self.vtrace),
        }
        return loss, LossDetails(logs, targets.vs, mask)

    def _targets(self, log_rhos: Array, timesteps: TimeStep, values: Array) -> vtrace.VTraceReturns:
        """Value targets and advantages [T, B], from log pi/mu [T, B], timesteps and values [T + 1, B]."""
        return vtrace.corrected_returns(
            self.vtrace.correction,
            log_rhos=log_rhos,
            discounts=self.discount * timesteps.discount[1:],
            rewards=clip_rewards(timesteps.reward[1:], self.reward_clip),
            values=values[:-1],
            bootstrap_value=values[-1],
            clip_rho_threshold=self.vtrace.rho_bar,
            clip_c_threshold=self.vtrace.c_bar,
            clip_pg_rho_threshold=self.vtrace.pg_rho_bar,
            lambda_=self.vtrace.lambda_,
            implementation=self.vtrace.implementation,
        )


def clip_rewards(rewards: Array, mode: Literal['unit', 'asymmetric', 'asymmetric_paper', 'none']) -> Array:
    """Rewards as the loss takes them; the modes are those of `LossConfig.reward_clip`."""
    if mode == 'unit':
        return jnp.clip(rewards, -1.0, 1.0)
    if mode == 'asymmetric':
        return 5.0 * jnp.tanh(rewards / 5.0) * jnp.where(rewards < 0, 0.3, 1.0)
    if mode == 'asymmetric_paper':
        squeezed = jnp.tanh(rewards)
        return 0.3 * jnp.minimum(squeezed, 0.0) + 5.0 * jnp.maximum(squeezed, 0.0)
    return rewards


def off_policyness(
    log_rhos: Array, log_policy: Array, log_behaviour: Array, mask: Array, config: VTraceConfig
) -> dict[str, Array]:
    """How far the behaviour policy mu is from the learner's pi, over the transitions that count.

    Args:
      log_rhos: [T, B], not truncated.
      log_policy: [T, B, A], log pi.
      log_behaviour: [T, B, A], log mu.
      mask: bool [T, B], the transitions that count.
      config: rho_bar and c_bar.

    Returns:
      `rho_truncated_fraction` and `c_truncated_fraction`, the shares of ratios above rho_bar and c_bar;
      `kl_behaviour_target`, the mean of KL(mu||pi); `effective_sample_size`, (sum rho)^2 / (N sum rho^2), 1 on policy;
      `log_rho_histogram`, int32, counts between `LOG_RHO_EDGES`.
    """
    rhos = jnp.exp(log_rhos)
    kl = jnp.sum(jnp.exp(log_behaviour) * (log_behaviour - log_policy), axis=-1)
    # 1e-30: a batch without any transition that counts gives 0, and no division by it.
    effective = jnp.square(jnp.sum(rhos)) / jnp.maximum(jnp.sum(mask) * jnp.sum(jnp.square(rhos)), 1e-30)
    edges = LOG_RHO_EDGES[None, None, 1:-1]
    inner = jnp.sum(mask[..., None] & (log_rhos[..., None] >= edges), axis=(0, 1))
    at_least = jnp.concatenate([jnp.sum(mask)[None], inner, jnp.zeros(1, inner.dtype)])
    return jax.lax.stop_gradient(
        {
            'rho_truncated_fraction': _mean(rhos > config.rho_bar, mask),
            'c_truncated_fraction': _mean(rhos > config.c_bar, mask),
            'kl_behaviour_target': _mean(kl, mask),
            'effective_sample_size': effective,
            'log_rho_histogram': at_least[:-1] - at_least[1:],
        }
    )


def _mean(x: Array, mask: Array) -> Array:
    return jnp.sum(mask * x) / jnp.maximum(jnp.sum(mask), 1)
