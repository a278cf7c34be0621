"""Exact analysis of V-trace (Espeholt et al., 2018, section 4.1 and appendix A) on a small MDP.

This module computes what V-trace converges to, how fast, and the variance of its targets, in NumPy with float64 and
without sampling.

Throughout, mu is the behaviour policy and pi the target policy, both [S, A]. With the ratio r = pi(a|x) / mu(a|x),

    rho = min(rho_bar, r)    c = lambda min(c_bar, r)    delta V = rho (reward + gamma V(y) - V(x)).

The expected n-step target is an affine operator (equation 5, where n = infinity):

    R V = V + sum_{t<n} C^t E_mu[delta V],    C[x, y] = gamma E_mu[c p(y|x, a)]  [S, S].

Theorem 1 does not cover c_bar > rho_bar. For any truncation, rows of C sum to at most gamma, so R is well defined. The
matrix sum_{t<n} C^t is invertible, so V of pi_rho_bar is still the only fixed point. But R need not be a contraction:
its linear part may have negative entries, and eta is then only a lower bound of its norm. The norm may exceed 1, and so
may the spectral radius, in which case iterating R diverges although every expectation is exact. For example,
`MDP.chain()` with mu = (.95, .05) and pi = (.5, .5) in every state has at rho_bar = 1 the modulus .988 for c_bar = 1,
but the modulus 9.6 and the spectral radius 1.39 for c_bar = inf. All functions of this module accept such truncations;
`contraction_modulus` computes these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from impala_jax.studies.mdp import (
    MDP,
    Array,
    as_policies,
    require_distributions,
    stationary_distribution,
    transition_matrix,
    value,
)


class Contraction(NamedTuple):
    """Factors by which an application of the operator multiplies the distance to its fixed point."""

    modulus: float  # the sup-norm Lipschitz constant: the worst case of one application
    spectral_radius: float  # the asymptotic factor per application; iteration converges if it is below 1
    eta: float  # the constant of Theorem 1, equal to the modulus if c_bar <= rho_bar


class Moments(NamedTuple):
    """Moments of the sampled target v_s, by the state x_s."""

    mean: Array  # [S]
    variance: Array  # [S], inf if the second moment does not exist


def target_policy(mu: ArrayLike, pi: ArrayLike, rho_bar: float) -> Array:
    """Computes pi_rho_bar, the policy whose value V-trace converges to (equation 3): min(rho_bar mu, pi), normalised.

    It is pi for rho_bar = inf and tends to mu for rho_bar -> 0. Actions that mu never takes cannot be learned from its
    data, so they have probability 0 even for rho_bar = inf.

    Args:
      mu: Behaviour policy, [S, A].
      pi: Target policy, [S, A].
      rho_bar: Truncation level of the temporal differences; inf for no truncation.

    Returns:
      The policy, [S, A] float64.

    Raises:
      ValueError: The policies are invalid or have different shapes, `rho_bar` is not positive, or in some state mu
        takes none of pi's actions.
    """
    mu, pi = as_policies(np.shape(mu), mu=mu, pi=pi)
    rhos, _ = _truncated_ratios(mu, pi, rho_bar)
    return mu * rhos / np.sum(mu * rhos, axis=1, keepdims=True)


def operator(
    mdp: MDP,
    mu: ArrayLike,
    pi: ArrayLike,
    values: ArrayLike,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
    n: float | None = None,
) -> Array:
    """Computes R V, the expected n-step V-trace target (section 4.1; equation 5 for n = infinity).

    R V(x) = V(x) + E_mu[sum_{t<n} gamma^t c_0 ... c_{t-1} rho_t (r_t + gamma V(x_{t+1}) - V(x_t)) | x_0 = x]

    Args:
      mdp: The MDP.
      mu: Behaviour policy, [S, A].
      pi: Target policy, [S, A].
      values: Value estimates V, [S].
      rho_bar: Truncation level of the temporal differences; inf for no truncation.
      c_bar: Truncation level of the trace coefficients; inf for no truncation. It may exceed rho_bar (see the module's
        docstring).
      lambda_: Factor of the trace coefficients (remark 2), in [0, 1].
      n: Length of the trajectories, in steps; None or inf for the operator of Theorem 1.

    Returns:
      R V, [S] float64.

    Raises:
      ValueError: Shapes do not agree, a policy is invalid, a truncation level, `lambda_` or `n` is out of range, or in
        some state mu takes none of pi's actions.
    """
    values = _values(mdp, values)
    traces, differences, rewards = _affine(mdp, mu, pi, rho_bar, c_bar, lambda_, n)
    return values + traces @ (rewards - differences @ values)


def fixed_point(
    mdp: MDP,
    mu: ArrayLike,
    pi: ArrayLike,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
    n: float | None = None,
) -> Array:
    """Computes the fixed point of `operator`, the V with R V = V, [S] float64, by solving the linear system.

    By Theorem 1 it equals `value(mdp, target_policy(mu, pi, rho_bar))` for all c_bar, lambda_ and n. It exists and is
    unique for c_bar > rho_bar too, but iterating R need not converge to it. Arguments and errors are those of
    `operator`.
    """
    traces, differences, rewards = _affine(mdp, mu, pi, rho_bar, c_bar, lambda_, n)
    return np.linalg.solve(traces @ differences, traces @ rewards)


def contraction_modulus(
    mdp: MDP,
    mu: ArrayLike,
    pi: ArrayLike,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
    n: float | None = None,
) -> Contraction:
    """Computes how fast `operator` contracts, and the constant of Theorem 1.

    R is affine, so its Lipschitz constant in the sup-norm equals the norm of its linear part. Theorem 1 (appendix A.1)
    states that for c_bar <= rho_bar it is at most

        eta = gamma^-1 - (gamma^-1 - 1) E_mu[sum_{t>=0} gamma^t (c_0 ... c_{t-2}) rho_{t-1}]
            = 1 - (1 - gamma) E_mu[sum_{t>=0} gamma^t (c_0 ... c_{t-1}) rho_t]
           <= 1 - (1 - gamma) beta < 1,    beta = min_x E_mu[rho_0 | x_0 = x],

    with c_{-1} = rho_{-1} = 1. The expectation depends on x_0, and eta is its maximum over x_0. For n steps, the sum in
    the second form ends at t = n - 1. Eta falls as c_bar or lambda_ grows. The proof shows more: eta(x_0) is the sum
    of row x_0 of the linear part, whose entries are not negative for c_bar <= rho_bar, so eta equals the modulus. For
    c_bar > rho_bar, eta is only a lower bound of the modulus, and both modulus and spectral radius may exceed 1.

    Arguments and errors are those of `operator`.
    """
    traces, differences, _ = _affine(mdp, mu, pi, rho_bar, c_bar, lambda_, n)
    linear = np.eye(mdp.num_states) - traces @ differences
    # The rows of `differences` sum to (1 - gamma) E_mu[rho].
    return Contraction(
        modulus=float(np.abs(linear).sum(axis=1).max()),
        spectral_radius=_spectral_radius(linear),
        eta=float(np.max(1 - traces @ differences.sum(axis=1))),
    )


def bias(mdp: MDP, mu: ArrayLike, pi: ArrayLike, rho_bar: float = 1.0) -> Array:
    """Computes the asymptotic bias due to the truncation of rho: V of pi_rho_bar minus V of pi.

    It is 0 for rho_bar = inf if mu takes all of pi's actions. It does not always decrease with rho_bar: pi_rho_bar
    approaches pi, but the values of two policies can agree by chance. On a third of 300 random MDPs (5 states, 3
    actions, policies from a Dirichlet distribution), its maximum increased somewhere between rho_bar = .5 and inf.

    Args:
      mdp: The MDP.
      mu: Behaviour policy, [S, A].
      pi: Target policy, [S, A].
      rho_bar: Truncation level of the temporal differences; inf for no truncation.

    Returns:
      The bias, [S] float64.

    Raises:
      ValueError: `target_policy` would raise it, or the policies do not fit this MDP.
    """
    mu, pi = as_policies(mdp.rewards.shape, mu=mu, pi=pi)
    return value(mdp, target_policy(mu, pi, rho_bar)) - value(mdp, pi)


def target_moments(
    mdp: MDP,
    mu: ArrayLike,
    pi: ArrayLike,
    values: ArrayLike,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    lambda_: float = 1.0,
    n: float | None = None,
) -> Moments:
    """Computes mean and variance of the n-step target v_s over trajectories of mu, by state x_s.

    With e_s = v_s - V(x_s), remark 1 states e_s = delta_s V + gamma c_s e_{s+1}. Given (x_s, a_s, x_{s+1}), only
    e_{s+1} is random, so by the law of total variance both moments satisfy a backward recursion in time:

        E[e_s]   = E_mu[delta_s V + gamma c_s E[e_{s+1}]]
        Var[e_s] = Var_mu[delta_s V + gamma c_s E[e_{s+1}]] + E_mu[gamma^2 c_s^2 Var[e_{s+1}]].

    The mean equals `operator`. While E_mu[c] <= 1, E_mu[c^2] is bounded only by c_bar. If gamma^2 E_mu[c^2] exceeds 1,
    the variance grows exponentially with n, and is inf for n = infinity.

    Arguments and errors are those of `operator`.

    Returns:
      Moments, each [S] float64.
    """
    values = _values(mdp, values)
    mu, pi = as_policies(mdp.rewards.shape, mu=mu, pi=pi)
    rhos, cs = _truncated_ratios(mu, pi, rho_bar, c_bar, lambda_)
    deltas = rhos[:, :, None] * (mdp.rewards[:, :, None] + mdp.discount * values - values[:, None, None])  # [S, A, S]
    factors = mdp.discount * cs  # [S, A]

    def moments_of_a_step(means: Array) -> tuple[Array, Array]:
        steps = deltas + factors[:, :, None] * means
        mean = np.einsum('xa,xay,xay->x', mu, mdp.transitions, steps)
        return mean, np.einsum('xa,xay,xay->x', mu, mdp.transitions, (steps - mean[:, None, None]) ** 2)

    squares = transition_matrix(mdp, mu * factors**2)
    length = _length(n)
    if length is None:
        traces, differences, rewards = _affine(mdp, mu, pi, rho_bar, c_bar, lambda_, n)
        means = traces @ (rewards - differences @ values)
        return Moments(values + means, _geometric_sum(squares, moments_of_a_step(means)[1]))
    means = variances = np.zeros(mdp.num_states)
    for _ in range(length):
        means, variance_of_a_step = moments_of_a_step(means)
        variances = variance_of_a_step + squares @ variances
    return Moments(values + means, variances)


def trade_off(
    mdp: MDP,
    mu: ArrayLike,
    pi: ArrayLike,
    rho_bars: Sequence[float],
    c_bars: Sequence[float],
    lambda_: float = 1.0,
    n: float | None = None,
    values: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """Computes speed, bias and variance for every pair of truncation levels.

    Args:
      mdp: The MDP.
      mu: Behaviour policy, [S, A].
      pi: Target policy, [S, A].
      rho_bars: Truncation levels of the temporal differences.
      c_bars: Truncation levels of the trace coefficients; pairs with c_bar > rho_bar are included (see the module's
        docstring).
      lambda_: Factor of the trace coefficients, in [0, 1].
      n: Length of the trajectories, in steps; None or inf for infinite trajectories.
      values: Value estimates V used in the targets, [S]; None for the fixed point of each rho_bar, that is, the end of
        learning.
      weights: Weights of the states in averages, [S]; None for the stationary distribution of mu, which is the
        distribution of a learner's data.

    Returns:
      A tidy table with one row per pair, rho_bars outermost. Rows are dicts of floats with the keys

      * `rho_bar`, `c_bar`: truncation levels;
      * `modulus`, `spectral_radius`, `eta`: see `Contraction`;
      * `bias_max`: maximum of `|V of pi_rho_bar - V of pi|` over all states;
      * `bias_rms`: root mean square of the same difference;
      * `variance`: mean variance of the target of one trajectory;
      * `mse`: mean of `(target - V of pi)^2`. At the fixed point it is `bias_rms^2 + variance`. At other values, the
        mean of the targets differs from V of pi_rho_bar by an amount that depends on the contraction.

    Raises:
      ValueError: `operator` or `stationary_distribution` would raise it, or `weights` is not a distribution over the
        states.
    """
    state_weights = stationary_distribution(mdp, mu) if weights is None else _checked_weights(mdp, weights)
    true_values = value(mdp, pi)
    rows = []
    for rho_bar in rho_bars:
        biases = bias(mdp, mu, pi, rho_bar)
        for c_bar in c_bars:
            current = true_values + biases if values is None else values
            moments = target_moments(mdp, mu, pi, current, rho_bar, c_bar, lambda_, n)
            rows.append(
                {
                    'rho_bar': float(rho_bar),
                    'c_bar': float(c_bar),
                    **contraction_modulus(mdp, mu, pi, rho_bar, c_bar, lambda_, n)._asdict(),
                    **_errors(biases, moments, true_values, state_weights),
                }
            )
    return rows


def _checked_weights(mdp: MDP, weights: ArrayLike) -> Array:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (mdp.num_states,):
        raise ValueError(f'weights must be [S] = ({mdp.num_states},), got shape {weights.shape}')
    require_distributions('weights', weights)
    return weights


def _errors(biases: Array, moments: Moments, true_values: Array, weights: Array) -> dict[str, float]:
    """Computes bias, variance and mean squared error of targets, averaged over states with weights [S]."""
    visited = weights > 0  # In other states the variance may be inf, and 0 * inf is NaN.

    def average(numbers: Array) -> float:
        return float(weights[visited] @ numbers[visited])

    return {
        'bias_max': float(np.abs(biases).max()),
        'bias_rms': math.sqrt(average(biases**2)),
        'variance': average(moments.variance),
        'mse': average((moments.mean - true_values) ** 2 + moments.variance),
    }


def _affine(
    mdp: MDP, mu: ArrayLike, pi: ArrayLike, rho_bar: float, c_bar: float, lambda_: float, n: float | None
) -> tuple[Array, Array, Array]:
    """Returns traces [S, S], differences [S, S] and rewards [S] with R V = V + traces (rewards - differences V)."""
    mu, pi = as_policies(mdp.rewards.shape, mu=mu, pi=pi)
    rhos, cs = _truncated_ratios(mu, pi, rho_bar, c_bar, lambda_)
    length = _length(n)
    identity = np.eye(mdp.num_states)
    trace = mdp.discount * transition_matrix(mdp, mu * cs)
    last = 0 * identity if length is None else np.linalg.matrix_power(trace, length)
    traces = np.linalg.solve(identity - trace, identity - last)  # The sum of trace^t over t < n.
    differences = np.diag(np.sum(mu * rhos, axis=1)) - mdp.discount * transition_matrix(mdp, mu * rhos)
    return traces, differences, np.sum(mu * rhos * mdp.rewards, axis=1)


def _truncated_ratios(
    mu: Array, pi: Array, rho_bar: float, c_bar: float = 1.0, lambda_: float = 1.0
) -> tuple[Array, Array]:
    """Returns rho and c, [S, A]; they are 0 for actions that mu never takes."""
    if not rho_bar > 0:
        raise ValueError(f'rho_bar must be positive (inf for no truncation), got {rho_bar}')
    if not c_bar >= 0:
        raise ValueError(f'c_bar must be 0 or more (inf for no truncation), got {c_bar}')
    if not 0 <= lambda_ <= 1:
        raise ValueError(f'lambda_ must lie in [0, 1], got {lambda_}')
    ratios = np.divide(pi, mu, out=np.zeros_like(pi), where=mu > 0)
    lost = np.flatnonzero(~(ratios > 0).any(axis=1))
    if lost.size:
        raise ValueError(
            f'in state {lost[0]} mu takes none of the actions of pi; give one of them a positive probability in mu'
        )
    return np.minimum(rho_bar, ratios), lambda_ * np.minimum(c_bar, ratios)


def _length(n: float | None) -> int | None:
    """Validates n, and returns None for infinity."""
    if n is None or n == math.inf:
        return None
    if n != int(n) or n < 1:
        raise ValueError(f'n must be a positive integer, or None or inf for infinite trajectories, got {n}')
    return int(n)


def _values(mdp: MDP, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape != (mdp.num_states,):
        raise ValueError(f'values must be [S] = ({mdp.num_states},), got shape {array.shape}')
    return array


def _spectral_radius(matrix: Array) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _geometric_sum(matrix: Array, source: Array) -> Array:
    """Computes sum_t matrix^t source, [S], for nonnegative arguments; inf exactly where it diverges."""
    num_states = len(source)
    reaches = (matrix > 0) | np.eye(num_states, dtype=bool)
    for _ in range(num_states.bit_length()):
        reaches = reaches @ reaches
    diverging = np.zeros(num_states, bool)
    for x in range(num_states):
        component = np.flatnonzero(reaches[x] & reaches[:, x])
        diverging[x] = _spectral_radius(matrix[np.ix_(component, component)]) >= 1
    fed = reaches @ (source > 0)
    infinite = reaches @ (diverging & fed)
    finite = np.flatnonzero(fed & ~infinite)
    total = np.where(infinite, math.inf, 0.0)
    total[finite] = np.linalg.solve(np.eye(len(finite)) - matrix[np.ix_(finite, finite)], source[finite])
    return total
