"""V-trace (Espeholt et al., 2018, section 4.1), and the corrections to which the paper compares it (section 5.2.2).

The recurrence `a_t = delta_t + gamma_t c_t a_{t+1}`, with `a_t = v_t - V(x_t)`, is linear. It can run backwards step by
step (`lax.scan`), or as a parallel prefix sum (`lax.associative_scan`) in O(log T) steps. On the CPU, V-trace is a
single kernel if the kernels were compiled.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from impala_jax.kernels import cpu
from impala_jax.types import Array

Implementation = Literal['auto', 'scan', 'associative_scan', 'rlax']
Thresholds = tuple[float | None, float | None, float | None]  # rho_bar, c_bar, and rho_bar of the advantages.

CORRECTIONS = ('vtrace', 'one_step_is', 'epsilon_correction', 'none')
"""Names of the corrections, in the order of their indices."""


class VTraceReturns(NamedTuple):
    """Targets of V-trace, without gradients."""

    vs: Array  # [T, B] float32, targets of the baseline.
    pg_advantages: Array  # [T, B] float32, advantages of the policy gradient, multiplied by the clipped ratios.


def from_importance_weights(
    *,
    log_rhos: Array,
    discounts: Array,
    rewards: Array,
    values: Array,
    bootstrap_value: Array,
    clip_rho_threshold: float | None = 1.0,
    clip_c_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    lambda_: float = 1.0,
    implementation: Implementation = 'auto',
) -> VTraceReturns:
    """Computes V-trace targets and advantages (Espeholt et al., 2018, equation 1 and section 4.2).

    Row t holds the reward and discount received after action t. `log_rhos = -inf` masks a transition that is not part
    of the task, such as the one into the first timestep of an episode: its target is its value, its advantage is 0, and
    the trace ends there. The thresholds are independent; Theorem 1 assumes clip_c_threshold <= clip_rho_threshold.

    Args:
      log_rhos: Log importance ratios log pi(a_t|x_t) - log mu(a_t|x_t), not clipped, [T, B] float32.
      discounts: Discounts, gamma times the discount of the environment, which is 0 at a termination, [T, B] float32.
      rewards: Rewards, [T, B] float32.
      values: Values V(x_t) under the learner's parameters, [T, B] float32.
      bootstrap_value: Value V(x_T), [B] float32.
      clip_rho_threshold: Truncation level rho_bar in the temporal differences; None for no clipping.
      clip_c_threshold: Truncation level c_bar in the trace; None for no clipping.
      clip_pg_rho_threshold: Truncation level of the ratios in the advantages; None for no clipping.
      lambda_: Factor of the trace coefficients (remark 2).
      implementation: 'scan'; 'associative_scan'; 'rlax', the reference implementation of that library, imported on use;
        or 'auto', which is the kernel on a CPU if it was compiled, else the faster scan (benchmarks/vtrace.py).

    Returns:
      VTraceReturns of arrays [T, B] float32.

    Raises:
      AssertionError: If shapes do not agree.
      ValueError: If there are no steps or no trajectories, or 'rlax' does not support c_bar or lambda.
    """
    chex.assert_rank([log_rhos, discounts, rewards, values, bootstrap_value], [2, 2, 2, 2, 1])
    chex.assert_equal_shape([log_rhos, discounts, rewards, values])
    chex.assert_shape(bootstrap_value, values.shape[1:])
    if 0 in values.shape:
        raise ValueError(f'V-trace needs at least one step and one trajectory, got [T, B] = {list(values.shape)}')

    arrays = jax.lax.stop_gradient((log_rhos, discounts, rewards, values, bootstrap_value))
    thresholds = (clip_rho_threshold, clip_c_threshold, clip_pg_rho_threshold)
    if implementation == 'auto' and cpu.is_vtrace_supported(arrays, (*thresholds, lambda_)):
        return VTraceReturns(*cpu.vtrace(*arrays, thresholds, lambda_))
    if implementation == 'rlax':
        return _rlax_returns(*arrays, thresholds, lambda_)
    return _returns(*arrays, thresholds, lambda_, implementation)


def _returns(
    log_rhos: Array,
    discounts: Array,
    rewards: Array,
    values: Array,
    bootstrap_value: Array,
    thresholds: Thresholds,
    lambda_: float,
    implementation: Implementation,
) -> VTraceReturns:
    """Equation 1 and section 4.2; arrays [T, B], the bootstrap value [B]."""
    rho_bar, c_bar, pg_rho_bar = thresholds
    ratios = jnp.exp(log_rhos)
    rhos = _clip(ratios, rho_bar)
    cs = lambda_ * _clip(ratios, c_bar)
    pg_rhos = _clip(ratios, pg_rho_bar)

    values_t_plus_1 = jnp.concatenate([values[1:], bootstrap_value[None]])
    deltas = rhos * (rewards + discounts * values_t_plus_1 - values)
    vs = values + discounted_sum(deltas, discounts * cs, implementation)
    # The advantage uses v_{t+1}, not V(x_{t+1}): appendix E.3.
    vs_t_plus_1 = jnp.concatenate([vs[1:], bootstrap_value[None]])
    pg_advantages = pg_rhos * (rewards + discounts * vs_t_plus_1 - values)
    return VTraceReturns(vs, pg_advantages)


def _rlax_returns(
    log_rhos: Array,
    discounts: Array,
    rewards: Array,
    values: Array,
    bootstrap_value: Array,
    thresholds: Thresholds,
    lambda_: float,
) -> VTraceReturns:
    """V-trace by rlax, whose c_bar is 1; arrays [T, B], the bootstrap value [B].

    Its advantages agree for lambda = 1 only; for smaller values they also bootstrap from (1 - lambda) V(x_{t+1}).
    """
    rho_bar, c_bar, pg_rho_bar = thresholds
    if (c_bar, lambda_) != (1.0, 1.0):
        raise ValueError(f"implementation 'rlax' has c_bar 1 and lambda 1, got {c_bar} and {lambda_}; use 'auto'")
    import rlax

    infinity = float('inf')
    returns = jax.vmap(
        lambda *arrays: rlax.vtrace_td_error_and_advantage(
            *arrays,
            clip_rho_threshold=infinity if rho_bar is None else rho_bar,
            clip_pg_rho_threshold=infinity if pg_rho_bar is None else pg_rho_bar,
        ),
        in_axes=1,
        out_axes=1,
    )(values, jnp.concatenate([values[1:], bootstrap_value[None]]), rewards, discounts, jnp.exp(log_rhos))
    return VTraceReturns(values + returns.errors, returns.pg_advantage)


def is_correction(correction: str | Array, name: str) -> bool | Array:
    """Whether a correction is the one of this name; a bool for a name, [] bool for an index in `CORRECTIONS`."""
    return correction == (name if isinstance(correction, str) else CORRECTIONS.index(name))


def corrected_returns(correction: str | Array, *, log_rhos: Array, **kwargs: Any) -> VTraceReturns:
    """Computes targets and advantages under one of the corrections of the paper's table 2.

    `vtrace` is `from_importance_weights`. The others use n-step returns as if the data were on-policy; transitions with
    `log_rhos = -inf` are still masked. `one_step_is` multiplies the advantages by pi/mu, without truncation.
    `epsilon_correction` differs from `none` only in the log pi of the policy gradient, which the loss computes.

    Args:
      correction: Name of the correction, or its index in `CORRECTIONS`, [] int32, which may be traced.
      log_rhos: Log importance ratios, [T, B] float32.
      **kwargs: Other arguments of `from_importance_weights`; the thresholds affect `vtrace` only.
    """
    if correction == 'vtrace':
        return from_importance_weights(log_rhos=log_rhos, **kwargs)
    is_vtrace = is_correction(correction, 'vtrace')
    used = jnp.where(is_vtrace | jnp.isneginf(log_rhos), log_rhos, 0.0)
    for name in ('clip_rho_threshold', 'clip_c_threshold', 'clip_pg_rho_threshold'):
        # No truncation: ratios are then 1.
        kwargs[name] = None if is_vtrace is False else jnp.where(is_vtrace, kwargs[name], jnp.inf)
    returns = from_importance_weights(log_rhos=used, **kwargs)
    ratios = jnp.where(is_correction(correction, 'one_step_is'), jax.lax.stop_gradient(jnp.exp(log_rhos)), 1.0)
    return returns._replace(pg_advantages=ratios * returns.pg_advantages)


def discounted_sum(deltas: Array, factors: Array, implementation: str = 'auto') -> Array:
    """Solves a_t = deltas_t + factors_t a_{t+1} with a_T = 0, for arrays [T, B]."""
    if implementation == 'auto':
        implementation = 'scan' if jax.default_backend() == 'cpu' else 'associative_scan'
    if implementation == 'scan':

        def step(carry, inputs):
            delta, factor = inputs
            carry = delta + factor * carry
            return carry, carry

        _, sums = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, factors), reverse=True)
        return sums

    def combine(later, earlier):
        later_delta, later_factor = later
        delta, factor = earlier
        return delta + factor * later_delta, factor * later_factor

    sums, _ = jax.lax.associative_scan(combine, (deltas, factors), reverse=True)
    return sums


def _clip(ratios: Array, threshold: float | None) -> Array:
    return ratios if threshold is None else jnp.minimum(threshold, ratios)
