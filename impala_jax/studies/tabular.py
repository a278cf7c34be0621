"""V-trace (Espeholt et al., 2018, section 4.1 and appendix A) on a small MDP, exactly: what it converges to, how fast,
and the variance of its targets. NumPy in float64; nothing is sampled.

Everywhere mu is the behaviour policy, pi the target policy, both [S, A], and with the ratio r = pi(a|x) / mu(a|x)

    rho = min(rho_bar, r)    c = lambda min(c_bar, r)    delta V = rho (reward + gamma V(y) - V(x)).

The expected n-step target is an affine operator (equation 5; n = infinity there):

    R V = V + sum_{t<n} C^t E_mu[delta V],    C[x, y] = gamma E_mu[c p(y|x, a)]  [S, S].

c_bar > rho_bar, which Theorem 1 leaves out: rows of C sum to at most gamma for any truncation, so R is well defined;
the matrix sum_{t<n} C^t is invertible, so the fixed point is still V of pi_rho_bar and no other. What is lost is the
contraction. The linear part of R may have negative entries; eta is then only a lower bound of its norm. The norm may
exceed 1, and so may the spectral radius, where iterating R diverges although every expectation is exact: `MDP.chain()`
with mu = (.95, .05) and pi = (.5, .5) in every state has at rho_bar = 1 the modulus .988 for c_bar = 1, but for c_bar =
inf the modulus 9.6 and the spectral radius 1.39. All functions here take such truncations; `contraction_modulus` gives
the numbers.
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
    """The factor that an application of the operator multiplies the distance to its fixed point by."""

    modulus: float  # the sup-norm Lipschitz constant: the factor of one application, at worst
    spectral_radius: float  # the factor of each application in the limit of many; below 1 where iteration converges
    eta: float  # Theorem 1's constant; equals the modulus where c_bar <= rho_bar


class Moments(NamedTuple):
    """Of the sampled target v_s, by the state x_s."""

    mean: Array  # [S]
    variance: Array  # [S], inf where the second moment does not exist


def target_policy(mu: ArrayLike, pi: ArrayLike, rho_bar: float) -> Array:
    """pi_rho_bar, the policy whose value V-trace converges to (equation 3): min(rho_bar mu, pi), normalised.

    It is pi for rho_bar = inf and tends to mu for rho_bar -> 0. What mu never does cannot be learnt from its data: such
    actions have no probability here, even where rho_bar = inf.

    Args:
      mu: [S, A], the behaviour policy.
      pi: [S, A], the target policy.
      rho_bar: truncation of the temporal differences; inf for none.

    Returns:
      [S, A] float64.

    Raises:
      ValueError: policies that are none or do not agree, a rho_bar that is not positive, or a state where mu takes none
        of pi's actions.
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
    """R V, the expected n-step V-trace target (section 4.1; equation 5 for n = infinity).

    R V(x) = V(x) + E_mu[sum_{t<n} gamma^t c_0 ... c_{t-1} rho_t (r_t + gamma V(x_{t+1}) - V(x_t)) | x_0 = x]

    Args:
      mdp: the MDP.
      mu: [S, A], the behaviour policy.
      pi: [S, A], the target policy.
      values: [S], V.
      rho_bar: truncation of the temporal differences; inf for none.
      c_bar: truncation of the trace; inf for none. May exceed rho_bar (see the module's text).
      lambda_: multiplies the trace coefficients (remark 2).
      n: length of the trajectories; None or inf for the operator of Theorem 1.

    Returns:
      [S] float64.

    Raises:
      ValueError: shapes that do not agree, policies that are none, a truncation, lambda_ or n out of its range, or a
        state where mu takes none of pi's actions.
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
    """The V with R V = V, [S] float64, solved from `operator` itself; arguments and errors are those of `operator`.

    By Theorem 1 it is `value(mdp, target_policy(mu, pi, rho_bar))`, whatever c_bar, lambda_ and n are. It exists and is
    unique for c_bar > rho_bar too, but iterating R need not lead there.
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
    """How fast `operator` contracts, exactly, beside the constant of Theorem 1; arguments and errors are its own.

    R is affine, so its Lipschitz constant in the sup-norm is the norm of its linear part, and not only bounded by it.
    Theorem 1 (appendix A.1) says that for c_bar <= rho_bar this is at most

        eta = gamma^-1 - (gamma^-1 - 1) E_mu[sum_{t>=0} gamma^t (c_0 ... c_{t-2}) rho_{t-1}]
            = 1 - (1 - gamma) E_mu[sum_{t>=0} gamma^t (c_0 ... c_{t-1}) rho_t]
           <= 1 - (1 - gamma) beta < 1,    beta = min_x E_mu[rho_0 | x_0 = x],

    with c_{-1} = rho_{-1} = 1 and, as the expectation depends on x_0, the largest over x_0; for n steps the second
    form's sum ends at t = n - 1. It falls with growing c_bar and lambda_. The proof shows more: eta(x_0) is the sum of
    row x_0 of the linear part, whose entries are not negative for c_bar <= rho_bar, so there eta IS the modulus. For
    c_bar > rho_bar it is only a lower bound of it; both the modulus and the spectral radius may exceed 1.
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
    """V of pi_rho_bar minus V of pi, [S] float64: what the truncation of rho costs in the limit.

    It is 0 for rho_bar = inf if mu takes all of pi's actions. On the way there it need not fall: pi_rho_bar approaches
    pi, but the values of two policies can agree by chance. On a third of 300 random MDPs (5 states, 3 actions, policies
    from a Dirichlet distribution) its maximum rose somewhere between rho_bar = .5 and inf.

    Raises:
      ValueError: as `target_policy`, and for policies that are none of this MDP.
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
    """Mean and variance of the n-step target v_s over trajectories of mu, by state x_s; arguments as for `operator`.

    With e_s = v_s - V(x_s), remark 1 reads e_s = delta_s V + gamma c_s e_{s+1}. Given (x_s, a_s, x_{s+1}) only e_{s+1}
    is random, so that the law of total variance makes both moments recursions backwards in time:

        E[e_s]   = E_mu[delta_s V + gamma c_s E[e_{s+1}]]
        Var[e_s] = Var_mu[delta_s V + gamma c_s E[e_{s+1}]] + E_mu[gamma^2 c_s^2 Var[e_{s+1}]].

    The mean is `operator`'s. While E_mu[c] <= 1, E_mu[c^2] is bounded by c_bar alone: where gamma^2 E_mu[c^2] exceeds 1
    the variance grows exponentially with n, and is inf for n = infinity.

    Returns:
      Moments, each [S] float64.

    Raises:
      ValueError: as `operator`.
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
    """Speed, bias and variance for every pair of truncations: a tidy table, one row a pair, rho_bars outermost.

    Args:
      mdp: the MDP.
      mu: [S, A], the behaviour policy.
      pi: [S, A], the target policy.
      rho_bars: truncations of the temporal differences.
      c_bars: truncations of the trace; pairs with c_bar > rho_bar are computed too (see the module's text).
      lambda_: multiplies the trace coefficients.
      n: length of the trajectories; None or inf for no end.
      values: [S], the V that the targets are computed with; None for each rho_bar's own fixed point, that is, for the
        end of learning.
      weights: [S], of the states in averages; None for the stationary distribution of mu, from which a learner's
        data come.

    Returns:
      Dicts of floats with the keys
        rho_bar, c_bar;
        modulus, spectral_radius, eta: see `Contraction`;
        bias_max: the largest |V of pi_rho_bar - V of pi| of all states;
        bias_rms: its root mean square;
        variance: the mean variance of the target of one trajectory;
        mse: the mean of (target - V of pi)^2. At the fixed point it is bias_rms^2 + variance; at other values the
          mean of the targets is not V of pi_rho_bar, and how far off depends on the contraction.

    Raises:
      ValueError: as `operator` and `stationary_distribution`, and for weights that are no distribution over the states.
    """
    weights = stationary_distribution(mdp, mu) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (mdp.num_states,):
        raise ValueError(f'weights must be [S] = ({mdp.num_states},), got shape {weights.shape}')
    require_distributions('weights', weights)
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
                    **_errors(biases, moments, true_values, weights),
                }
            )
    return rows


def _errors(biases: Array, moments: Moments, true_values: Array, weights: Array) -> dict[str, float]:
    """Bias, variance and mean squared error of targets, averaged over states [S] with weights [S]."""
    visited = weights > 0  # Elsewhere a variance may be inf, and 0 times that is no number.

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
    """Traces [S, S], differences [S, S] and rewards [S], such that R V = V + traces (rewards - differences V)."""
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
    """rho and c, [S, A]; 0 for what mu never does, which no trajectory contains."""
    if not rho_bar > 0:
        raise ValueError(f'rho_bar must be positive (inf for no truncation), got {rho_bar}')
    if not c_bar >= 0:
        raise ValueError(f'c_bar must be 0 or more (inf for no truncation), got {c_bar}')
    if not 0 <= lambda_ <= 1:
        raise ValueError(f'lambda_ must lie in [0, 1], got {lambda_}')
    ratios = np.divide(pi, mu, out=np.zeros_like(pi), where=mu > 0)
    lost = np.flatnonzero(~(ratios > 0).any(axis=1))
    if lost.size:
        raise ValueError(f'in state {lost[0]} mu takes none of the actions of pi; give mu some probability of one')
    return np.minimum(rho_bar, ratios), lambda_ * np.minimum(c_bar, ratios)


def _length(n: float | None) -> int | None:
    """n, with None for infinity."""
    if n is None or n == math.inf:
        return None
    if n != int(n) or n < 1:
        raise ValueError(f'n must be a whole number of at least 1, or None or inf for no end, got {n}')
    return int(n)


def _values(mdp: MDP, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape != (mdp.num_states,):
        raise ValueError(f'values must be [S] = ({mdp.num_states},), got shape {array.shape}')
    return array


def _spectral_radius(matrix: Array) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _geometric_sum(matrix: Array, source: Array) -> Array:
    """sum_t matrix^t source, [S], of what is nowhere negative: inf where it diverges, and only there."""
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
