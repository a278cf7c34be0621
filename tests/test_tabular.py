"""Theorem 1 on a small MDP: what V-trace converges to, and that c_bar and lambda change only how fast.

The expectation over trajectories is exact: all of them are enumerated with their probabilities, and go through
`vtrace.from_importance_weights` as one batch.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import vtrace

S, A, T = 5, 3, 3  # states, actions, length of a trajectory
DISCOUNT = 0.9

_rng = np.random.RandomState(0)
TRANSITIONS = _rng.dirichlet(np.ones(S), size=(S, A))  # [S, A, S], p(y|x, a)
REWARDS = _rng.randn(S, A)  # [S, A]
MU = _rng.dirichlet(np.ones(A), size=S)  # [S, A], the behaviour policy
PI = _rng.dirichlet(np.ones(A), size=S)  # [S, A], the target policy
RATIOS = PI / MU


def value_of(policy):
    """V of a policy [S, A]: solves V = r + gamma P V."""
    transitions = np.einsum('xa,xay->xy', policy, TRANSITIONS)
    return np.linalg.solve(np.eye(S) - DISCOUNT * transitions, np.sum(policy * REWARDS, axis=1))


def pi_rho_bar(rho_bar):
    """The policy whose value V-trace converges to (equation 2)."""
    policy = np.minimum(rho_bar * MU, PI)
    return policy / policy.sum(axis=1, keepdims=True)


def expected_operator(values, rho_bar, c_bar, lambda_):
    """R V (section 4.1) for trajectories of length T, from the equations.

    R V(x) = V(x) + E_mu[sum_{t<T} gamma^t c_0 ... c_{t-1} rho_t (r_t + gamma V(x_{t+1}) - V(x_t)) | x_0 = x]
    """
    rhos = np.minimum(rho_bar, RATIOS)
    cs = lambda_ * np.minimum(c_bar, RATIOS)
    deltas = np.sum(MU * rhos * (REWARDS + DISCOUNT * TRANSITIONS @ values - values[:, None]), axis=1)  # [S]
    trace = DISCOUNT * np.einsum('xa,xa,xay->xy', MU, cs, TRANSITIONS)  # [S, S]
    return values + sum(np.linalg.matrix_power(trace, t) @ deltas for t in range(T))


def enumerate_trajectories():
    """All trajectories of length T, N a start state: states [T + 1, S * N], actions [T, S * N], probabilities [S, N]
    under mu, and which state each begins in is s // N."""
    states, actions, probabilities = [], [], []
    for start in range(S):
        for path in itertools.product(range(A), range(S), repeat=T):
            path_actions, path_states = path[::2], (start, *path[1::2])
            states.append(path_states)
            actions.append(path_actions)
            probabilities.append(
                math.prod(
                    MU[x, a] * TRANSITIONS[x, a, y]
                    for x, a, y in zip(path_states, path_actions, path_states[1:], strict=False)
                )
            )
    return np.array(states).T, np.array(actions).T, np.array(probabilities, np.float32).reshape(S, -1)


STATES, ACTIONS, PROBABILITIES = enumerate_trajectories()


def batch_operator(values, rho_bar, c_bar, lambda_):
    """R V, [S], through `vtrace.from_importance_weights` on all trajectories; the expectation is exact."""
    visited = values[STATES]
    targets = vtrace.from_importance_weights(
        log_rhos=jnp.asarray(np.log(RATIOS)[STATES[:-1], ACTIONS], jnp.float32),
        discounts=jnp.full(ACTIONS.shape, DISCOUNT),
        rewards=jnp.asarray(REWARDS[STATES[:-1], ACTIONS], jnp.float32),
        values=visited[:-1],
        bootstrap_value=visited[-1],
        clip_rho_threshold=rho_bar,
        clip_c_threshold=c_bar,
        lambda_=lambda_,
    )
    return jnp.sum(PROBABILITIES * targets.vs[0].reshape(S, -1), axis=1)


@jax.jit
def iterate(rho_bar, c_bar, lambda_):
    """V after each of 400 applications of the operator, from V = 0; [400, S]."""

    def step(values, _):
        values = batch_operator(values, rho_bar, c_bar, lambda_)
        return values, values

    return jax.lax.scan(step, jnp.zeros(S), length=400)[1]


# (rho_bar, c_bar, lambda); the ratios reach from 0.1 to 12, so each threshold cuts some off.
KNOBS = [
    (1.0, 1.0, 1.0),
    (1.0, 0.3, 1.0),
    (1.0, 1.0, 0.6),
    (1.0, 1.0, 0.0),
    (2.0, 1.0, 1.0),
    (2.0, 2.0, 0.9),
    (0.5, 0.5, 1.0),
    (math.inf, 1.0, 1.0),
]


def test_the_enumeration_is_complete():
    np.testing.assert_allclose(PROBABILITIES.sum(axis=1), 1, rtol=1e-5)
    assert (STATES[0].reshape(S, -1) == np.arange(S)[:, None]).all()
    assert RATIOS.min() < 0.5
    assert RATIOS.max() > 2


@pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS)
def test_operator(rho_bar, c_bar, lambda_):
    """One application, at an arbitrary V, is the operator of the equations, whose fixed point is V of pi_rho_bar."""
    values = np.random.RandomState(1).randn(S)
    expected = expected_operator(values, rho_bar, c_bar, lambda_)
    actual = batch_operator(jnp.asarray(values, jnp.float32), rho_bar, c_bar, lambda_)
    np.testing.assert_allclose(actual, expected, atol=1e-5)

    fixed_point = value_of(pi_rho_bar(rho_bar))
    np.testing.assert_allclose(expected_operator(fixed_point, rho_bar, c_bar, lambda_), fixed_point, atol=1e-12)


@pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS)
def test_fixed_point(rho_bar, c_bar, lambda_):
    values = iterate(rho_bar, c_bar, lambda_)[-1]
    np.testing.assert_allclose(values, value_of(pi_rho_bar(rho_bar)), atol=1e-4)


def test_rho_bar_changes_what_is_converged_to():
    """From V of the target policy (no truncation) towards V of the behaviour policy."""
    points = {rho_bar: value_of(pi_rho_bar(rho_bar)) for rho_bar in (0.01, 0.5, 1.0, 2.0, math.inf)}
    np.testing.assert_allclose(points[math.inf], value_of(PI))
    np.testing.assert_allclose(points[0.01], value_of(MU))
    for a, b in itertools.combinations(points.values(), 2):
        assert np.abs(a - b).max() > 0.02


@pytest.mark.parametrize('knob', ['c_bar', 'lambda'])
def test_only_the_speed(knob):
    """The smaller c_bar or lambda, the more applications, but towards the same V."""
    levels = (1.0, 0.5, 0.25, 0.0)
    fixed_point = value_of(pi_rho_bar(1.0))
    needed = []
    for level in levels:
        values = iterate(1.0, level, 1.0) if knob == 'c_bar' else iterate(1.0, 1.0, level)
        errors = np.abs(np.asarray(values) - fixed_point).max(axis=1)
        assert errors[-1] < 1e-4
        needed.append(int(np.argmax(errors < 1e-2)))
    assert needed == sorted(needed)
    assert needed[-1] > 1.5 * needed[0]
