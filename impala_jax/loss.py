"""The loss (Espeholt et al., 2018, section 4.2): policy gradient, baseline and entropy, SUMMED over time and batch."""

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
"""Edges of the metric `log_rho_histogram`. The outer bins are unbounded; on-policy ratios are in the middle bin."""

_EPSILON = 1e-6  # Constant of `epsilon_correction`.


class VTraceInputs(NamedTuple):
    """Settings of `VTraceConfig` as inputs of a compiled program, scalars."""

    rho_bar: Array  # float32
    c_bar: Array  # float32
    pg_rho_bar: Array  # float32
    lambda_: Array  # float32
    correction: Array  # int32, index in `vtrace.CORRECTIONS`.

    @property
    def implementation(self) -> Literal['auto']:
        """The fastest implementation, whose result is the same."""
        return 'auto'


class LossDetails(NamedTuple):
    """Auxiliary outputs of the loss, without gradients."""

    logs: dict[str, Array]  # Scalars, and `log_rho_histogram`.
    value_targets: Array | None = None  # [T, B] float32; PopArt needs it and `mask`.
    mask: Array | None = None  # [T, B] bool, transitions that are not masked.


class Loss(Protocol):
    """Signature of a loss that `Learner` minimises."""

    def __call__(
        self,
        output: NetworkOutput,
        experience: Experience,
        *,
        entropy_cost: Array | float | None = None,
        value_scale: Array | None = None,
    ) -> tuple[Array, LossDetails]:
        """Computes the loss of a batch.

        Args:
          output: Output of the network under the learner's parameters: logits [T + 1, B, A] and values [T + 1, B].
          experience: Experience, [T + 1, B].
          entropy_cost: Scalar that replaces the loss's own weight of the entropy; None without schedule and tuning.
          value_scale: Divisor of advantages and value errors, [B]; None without PopArt.

        Returns:
          The loss, a scalar, and its LossDetails.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ImpalaLoss:
    """The loss of the paper, summed over the transitions that are not masked.

    Args:
      discount: Discount factor gamma, multiplied by the discount of the environment.
      baseline_cost: Weight of half the squared errors of the values.
      entropy_cost: Weight of the entropy.
      reward_clip: Mode of `clip_rewards`.
      vtrace: Off-policy correction and its truncation levels.
    """

    discount: Array | float = 0.99
    baseline_cost: float = 0.5
    entropy_cost: float = 0.01
    reward_clip: Literal['unit', 'asymmetric', 'asymmetric_paper', 'none'] = 'unit'
    vtrace: VTraceConfig | VTraceInputs = VTraceConfig()

    def __call__(
        self,
        output: NetworkOutput,
        experience: Experience,
        *,
        entropy_cost: Array | float | None = None,
        value_scale: Array | None = None,
    ) -> tuple[Array, LossDetails]:
        """Computes the loss of a batch; see `Loss.__call__` for the arguments.

        Returns:
          The loss, a scalar, and its LossDetails. The `logs` are `policy_loss` and `baseline_loss`, as weighted in the
          loss, `entropy`, the mean over unmasked transitions, and the entries of `off_policyness`.

        Raises:
          AssertionError: If shapes do not agree.
        """
        timesteps, actions = experience.timesteps, experience.actions
        chex.assert_equal_shape_prefix([output.logits[:-1], experience.behaviour_logits, actions], 2)
        chex.assert_equal_shape([output.values, timesteps.reward])

        # The arrival at the first step of an episode is not a transition of the task: the action before it is ignored.
        mask = timesteps.step_type[1:] != FIRST

        log_policy = jax.nn.log_softmax(output.logits[:-1])
        log_behaviour = jax.nn.log_softmax(experience.behaviour_logits)
        log_pi = jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]
        log_mu = jnp.take_along_axis(log_behaviour, actions[..., None], axis=-1)[..., 0]
        log_rhos = jnp.where(mask, jax.lax.stop_gradient(log_pi) - log_mu, -jnp.inf)
        targets = self._targets(log_rhos, timesteps, jax.lax.stop_gradient(output.values))

        entropies = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
        is_epsilon = vtrace.is_correction(self.vtrace.correction, 'epsilon_correction')
        if is_epsilon is not False:
            log_pi = jnp.where(is_epsilon, jnp.log(jnp.exp(log_pi) + _EPSILON), log_pi)
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
    """Clips or squeezes rewards, of any shape; `LossConfig.reward_clip` describes the modes."""
    if mode == 'unit':
        return jnp.clip(rewards, -1.0, 1.0)
    if mode == 'asymmetric':
        return 5.0 * jnp.tanh(rewards / 5.0) * jnp.where(rewards < 0, 0.3, 1.0)
    if mode == 'asymmetric_paper':
        squeezed = jnp.tanh(rewards)
        return 0.3 * jnp.minimum(squeezed, 0.0) + 5.0 * jnp.maximum(squeezed, 0.0)
    return rewards


def off_policyness(
    log_rhos: Array, log_policy: Array, log_behaviour: Array, mask: Array, config: VTraceConfig | VTraceInputs
) -> dict[str, Array]:
    """Measures how far the behaviour policy mu is from the learner's policy pi, over unmasked transitions.

    Args:
      log_rhos: Log importance ratios log pi/mu, not truncated, [T, B].
      log_policy: Log probabilities log pi, [T, B, A].
      log_behaviour: Log probabilities log mu, [T, B, A].
      mask: Transitions that are not masked, [T, B] bool.
      config: Truncation levels rho_bar and c_bar.

    Returns:
      A dict without gradients: `rho_truncated_fraction` and `c_truncated_fraction`, the fractions of ratios above
      rho_bar and c_bar; `kl_behaviour_target`, the mean of KL(mu||pi); `effective_sample_size`,
      (sum rho)^2 / (N sum rho^2), which is 1 on-policy; `log_rho_histogram`, int32 counts between `LOG_RHO_EDGES`.
    """
    rhos = jnp.exp(log_rhos)
    kl = jnp.sum(jnp.exp(log_behaviour) * (log_behaviour - log_policy), axis=-1)
    # 1e-30 gives 0 for a batch without unmasked transitions, instead of a division by 0.
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
