"""Theorem 1 on small MDPs: what V-trace converges to, how fast, and how noisy its targets are.

`impala_jax.tabular` is checked against the enumeration of all trajectories with their probabilities, and the compiled
`vtrace.from_importance_weights` against `tabular`: on that enumeration, and on sampled trajectories.
"""

import itertools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import impala_jax
from impala_jax import vtrace
from impala_jax.studies import tabular

S, A, T = 5, 3, 3  # states, actions, length of a trajectory
MDP = tabular.MDP.random(S, A, seed=1)
MU, PI = np.random.default_rng(101).dirichlet(np.ones(A), size=(2, S))  # [S, A] each
RATIOS = PI / MU

CHAIN = tabular.MDP.chain()
CHAIN_MU, CHAIN_PI = np.tile([0.9, 0.1], (19, 1)), np.tile([0.5, 0.5], (19, 1))

# (rho_bar, c_bar, lambda); the ratios reach from 0.15 to 24, so each threshold cuts some off.
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
OUTSIDE = [(1.0, 2.0, 1.0), (0.5, 5.0, 0.9), (1.0, math.inf, 1.0)]  # c_bar > rho_bar


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
                    MU[x, a] * MDP.transitions[x, a, y]
                    for x, a, y in zip(path_states, path_actions, path_states[1:], strict=False)
                )
            )
    return np.array(states).T, np.array(actions).T, np.array(probabilities).reshape(S, -1)


STATES, ACTIONS, PROBABILITIES = enumerate_trajectories()


def compiled_targets(values, states, actions, rho_bar, c_bar, lambda_):
    """v_s at the start of trajectories with states [T + 1, B] and actions [T, B]; [B]."""
    visited = values[states]
    return vtrace.from_importance_weights(
        log_rhos=jnp.asarray(np.log(RATIOS)[states[:-1], actions], jnp.float32),
        discounts=jnp.full(actions.shape, MDP.discount),
        rewards=jnp.asarray(MDP.rewards[states[:-1], actions], jnp.float32),
        values=visited[:-1],
        bootstrap_value=visited[-1],
        clip_rho_threshold=rho_bar,
        clip_c_threshold=c_bar,
        lambda_=lambda_,
    ).vs[0]


def batch_operator(values, rho_bar, c_bar, lambda_):
    """R V, [S], through `vtrace.from_importance_weights` on all trajectories; the expectation is exact."""
    targets = compiled_targets(values, STATES, ACTIONS, rho_bar, c_bar, lambda_)
    return jnp.sum(jnp.asarray(PROBABILITIES, jnp.float32) * targets.reshape(S, -1), axis=1)


@jax.jit
def iterate(rho_bar, c_bar, lambda_):
    """V after each of 400 applications of the operator, from V = 0; [400, S]."""

    def step(values, _):
        values = batch_operator(values, rho_bar, c_bar, lambda_)
        return values, values

    return jax.lax.scan(step, jnp.zeros(S), length=400)[1]


def random_values(seed=1):
    return np.random.default_rng(seed).standard_normal(S)


def test_the_enumeration_is_complete():
    np.testing.assert_allclose(PROBABILITIES.sum(axis=1), 1)
    assert (STATES[0].reshape(S, -1) == np.arange(S)[:, None]).all()
    assert RATIOS.min() < 0.25
    assert RATIOS.max() > 5


class TestCompiled:
    """`vtrace.from_importance_weights` is the operator of `tabular`."""

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
    def test_its_operator_is_the_expectation_over_trajectories(self, rho_bar, c_bar, lambda_):
        """One application, at an arbitrary V; the expectation is that of all trajectories."""
        values = random_values()
        expected = tabular.operator(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n=T)
        actual = batch_operator(jnp.asarray(values, jnp.float32), rho_bar, c_bar, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS)
    def test_its_fixed_point_is_the_value_of_the_target_policy(self, rho_bar, c_bar, lambda_):
        expected = tabular.value(MDP, tabular.target_policy(MU, PI, rho_bar))
        np.testing.assert_allclose(iterate(rho_bar, c_bar, lambda_)[-1], expected, atol=1e-4)

    @pytest.mark.parametrize('knob', ['c_bar', 'lambda'])
    def test_c_bar_and_lambda_change_only_the_speed(self, knob):
        """The smaller c_bar or lambda, the more applications, but towards the same V."""
        levels = (1.0, 0.5, 0.25, 0.0)
        fixed_point = tabular.value(MDP, tabular.target_policy(MU, PI, 1.0))
        needed = []
        for level in levels:
            values = iterate(1.0, level, 1.0) if knob == 'c_bar' else iterate(1.0, 1.0, level)
            errors = np.abs(np.asarray(values) - fixed_point).max(axis=1)
            assert errors[-1] < 1e-4
            needed.append(int(np.argmax(errors < 1e-2)))
        assert needed == sorted(needed)
        assert needed[-1] > 1.5 * needed[0]

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', [(1.0, 1.0, 1.0), (2.0, 1.0, 0.9), (1.0, 2.0, 1.0)])
    def test_moments_of_sampled_trajectories(self, rho_bar, c_bar, lambda_):
        """Mean and variance of the targets of 20,000 trajectories a state, within 4 standard errors."""
        length, num = 10, 20_000
        rng = np.random.default_rng(0)

        def sample(probabilities):  # [B, K] -> [B]
            return (rng.random((len(probabilities), 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)

        states, actions = [np.repeat(np.arange(S), num)], []
        for _ in range(length):
            actions.append(sample(MU[states[-1]]))
            states.append(sample(MDP.transitions[states[-1], actions[-1]]))
        values = random_values()
        targets = compiled_targets(
            jnp.asarray(values, jnp.float32), np.stack(states), np.stack(actions), rho_bar, c_bar, lambda_
        )
        targets = np.asarray(targets, np.float64).reshape(S, num)

        mean, variance = tabular.target_moments(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n=length)
        squares = (targets - mean[:, None]) ** 2
        assert (np.abs(targets.mean(axis=1) - mean) < 4 * np.sqrt(variance / num)).all()
        assert (np.abs(squares.mean(axis=1) - variance) < 4 * squares.std(axis=1) / math.sqrt(num)).all()
        assert (squares.std(axis=1) / math.sqrt(num) < 0.2 * variance).all()  # It does say something.


@pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
def test_moments_are_those_of_all_trajectories(rho_bar, c_bar, lambda_):
    """Against equation 1, written out, of every trajectory."""
    values = random_values()
    taken = RATIOS[STATES[:-1], ACTIONS]
    rhos, cs = np.minimum(rho_bar, taken), lambda_ * np.minimum(c_bar, taken)
    targets = values[STATES[0]]
    for t in range(T):
        delta = rhos[t] * (
            MDP.rewards[STATES[t], ACTIONS[t]] + MDP.discount * values[STATES[t + 1]] - values[STATES[t]]
        )
        targets = targets + MDP.discount**t * np.prod(cs[:t], axis=0) * delta
    targets = targets.reshape(S, -1)
    mean = np.sum(PROBABILITIES * targets, axis=1)
    variance = np.sum(PROBABILITIES * (targets - mean[:, None]) ** 2, axis=1)

    moments = tabular.target_moments(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n=T)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-10)
    np.testing.assert_allclose(tabular.operator(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n=T), mean, rtol=1e-10)


class TestTheorem1:
    @pytest.mark.parametrize('n', [1, 4, None])
    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
    def test_its_fixed_point_is_the_value_of_the_target_policy(self, rho_bar, c_bar, lambda_, n):
        """V of pi_rho_bar and no other, for c_bar > rho_bar too."""
        knobs = (rho_bar, c_bar, lambda_, n)
        expected = tabular.value(MDP, tabular.target_policy(MU, PI, rho_bar))
        np.testing.assert_allclose(tabular.operator(MDP, MU, PI, expected, *knobs), expected, atol=1e-10)
        np.testing.assert_allclose(tabular.fixed_point(MDP, MU, PI, *knobs), expected, atol=1e-9)

    @pytest.mark.parametrize('n', [1, 4, None])
    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
    def test_modulus_is_the_lipschitz_constant(self, rho_bar, c_bar, lambda_, n):
        """No pair of V is brought together less, and some pair no more."""
        knobs = (rho_bar, c_bar, lambda_, n)
        contraction = tabular.contraction_modulus(MDP, MU, PI, *knobs)

        def factor(difference):
            values = 3 * random_values()
            change = np.subtract(*(tabular.operator(MDP, MU, PI, v, *knobs) for v in (values + difference, values)))
            return np.abs(change).max() / np.abs(difference).max()

        for seed in range(50):
            assert factor(random_values(seed)) <= contraction.modulus + 1e-9
        # A norm is attained at a corner of the unit cube.
        corners = [factor(np.array(corner)) for corner in itertools.product((-1.0, 1.0), repeat=S)]
        np.testing.assert_allclose(max(corners), contraction.modulus, atol=1e-9)

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
    def test_eta_is_that_of_the_theorem(self, rho_bar, c_bar, lambda_):
        """The formula of Theorem 1, term by term; the modulus itself for c_bar <= rho_bar."""
        rhos, cs = np.minimum(rho_bar, RATIOS), lambda_ * np.minimum(c_bar, RATIOS)
        gamma = MDP.discount
        trace = np.einsum('xa,xa,xay->xy', MU, cs, MDP.transitions)
        expected_rho = np.sum(MU * rhos, axis=1)
        total = np.ones(S)  # t = 0: rho_{-1} = 1
        for t in range(1, 500):
            total = total + gamma**t * np.linalg.matrix_power(trace, t - 1) @ expected_rho
        eta = np.max(1 / gamma - (1 / gamma - 1) * total)

        contraction = tabular.contraction_modulus(MDP, MU, PI, rho_bar, c_bar, lambda_)
        np.testing.assert_allclose(contraction.eta, eta, atol=1e-9)
        assert eta <= 1 - (1 - gamma) * expected_rho.min() + 1e-9
        assert contraction.spectral_radius <= contraction.modulus + 1e-9
        if c_bar <= rho_bar:
            np.testing.assert_allclose(contraction.modulus, eta, atol=1e-9)
        else:
            assert contraction.modulus > eta + 1e-3

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', KNOBS + OUTSIDE)
    def test_spectral_radius_is_the_rate(self, rho_bar, c_bar, lambda_):
        """What the error shrinks by in each of many applications."""
        fixed_point = tabular.value(MDP, tabular.target_policy(MU, PI, rho_bar))
        values, errors = random_values(), []
        for _ in range(60):
            values = tabular.operator(MDP, MU, PI, values, rho_bar, c_bar, lambda_)
            errors.append(np.abs(values - fixed_point).max())
        rate = (errors[-1] / errors[19]) ** (1 / 40)
        contraction = tabular.contraction_modulus(MDP, MU, PI, rho_bar, c_bar, lambda_)
        np.testing.assert_allclose(rate, contraction.spectral_radius, rtol=0.01)

    @pytest.mark.parametrize('n', [1, 3, None])
    def test_on_policy_it_contracts_by_the_discount(self, n):
        """The n-step Bellman operator, which contracts by gamma^n."""
        contraction = tabular.contraction_modulus(MDP, PI, PI, n=n)
        expected = 0 if n is None else MDP.discount**n
        np.testing.assert_allclose(contraction, [expected] * 3, atol=1e-9)
        transitions = np.einsum('xa,xay->xy', PI, MDP.transitions)
        values, expected = random_values(), random_values()
        for _ in range(n or 500):
            expected = np.sum(PI * MDP.rewards, axis=1) + MDP.discount * transitions @ expected
        np.testing.assert_allclose(tabular.operator(MDP, PI, PI, values, n=n), expected, atol=1e-9)

    def test_outside_it_iteration_can_diverge(self):
        """c_bar > rho_bar: the example of the module's text. The fixed point is there, but not approached."""
        mu, pi = np.tile([0.95, 0.05], (19, 1)), np.tile([0.5, 0.5], (19, 1))
        within = tabular.contraction_modulus(CHAIN, mu, pi, 1.0, 1.0)
        outside = tabular.contraction_modulus(CHAIN, mu, pi, 1.0, math.inf)
        np.testing.assert_allclose(within.modulus, 0.988, atol=5e-4)
        np.testing.assert_allclose([outside.modulus, outside.spectral_radius], [9.64, 1.39], atol=5e-3)

        fixed_point = tabular.value(CHAIN, tabular.target_policy(mu, pi, 1.0))
        errors = {}
        for c_bar in (1.0, math.inf):
            values = np.zeros(19)
            for _ in range(100):
                values = tabular.operator(CHAIN, mu, pi, values, 1.0, c_bar)
            errors[c_bar] = np.abs(values - fixed_point).max()
        assert errors[1.0] < 0.5 * np.abs(fixed_point).max()
        assert errors[math.inf] > 1e6


def test_rho_bar_changes_what_is_converged_to():
    """From V of the target policy (no truncation) towards V of the behaviour policy."""
    points = {
        rho_bar: tabular.value(MDP, tabular.target_policy(MU, PI, rho_bar)) for rho_bar in (0.005, 0.5, 1, 2, math.inf)
    }
    np.testing.assert_allclose(points[math.inf], tabular.value(MDP, PI))
    np.testing.assert_allclose(points[0.005], tabular.value(MDP, MU))
    for a, b in itertools.combinations(points.values(), 2):
        assert np.abs(a - b).max() > 0.02
    np.testing.assert_allclose(tabular.bias(MDP, MU, PI, 0.5), points[0.5] - points[math.inf])


class TestTheTradeOff:
    mdps = pytest.mark.parametrize('mdp, mu, pi', [(MDP, MU, PI), (CHAIN, CHAIN_MU, CHAIN_PI)], ids=['random', 'chain'])

    @mdps
    @pytest.mark.parametrize('n', [20, None])
    def test_a_larger_rho_bar_has_less_bias_and_more_variance(self, mdp, mu, pi, n):
        """Less bias, more variance."""
        rows = tabular.trade_off(mdp, mu, pi, (0.5, 1, 2, 4, math.inf), (0.25,), n=n)
        for low, high in itertools.pairwise(rows):
            assert high['bias_max'] < low['bias_max'] - 0.01
            assert high['bias_rms'] < low['bias_rms'] - 0.01
            assert high['variance'] > 1.05 * low['variance']
        assert rows[-1]['bias_max'] < 1e-9

    def test_bias_need_not_fall(self):
        mdp = tabular.MDP.random(S, A, seed=0)
        mu, pi = np.random.default_rng(100).dirichlet(np.ones(A), size=(2, S))
        rows = tabular.trade_off(mdp, mu, pi, (2, 4, math.inf), (1.0,))
        assert rows[1]['bias_max'] > 1.1 * rows[0]['bias_max']
        assert rows[2]['bias_max'] < 1e-9

    @mdps
    @pytest.mark.parametrize('n', [20, None])
    def test_a_larger_c_bar_is_faster_with_more_variance(self, mdp, mu, pi, n):
        """Faster, more variance, and the same bias."""
        rows = tabular.trade_off(mdp, mu, pi, (2.0,), (0.125, 0.25, 0.5, 1, 2), n=n)
        for low, high in itertools.pairwise(rows):
            assert high['modulus'] < low['modulus'] - 1e-3
            assert high['spectral_radius'] < low['spectral_radius'] - 1e-3
            assert high['variance'] > 1.01 * low['variance']
            assert high['bias_max'] == low['bias_max']

    def test_its_table_has_each_pair_of_knobs(self):
        rho_bars, c_bars, n, lambda_ = (0.5, math.inf), (0.5, 1.0, 2.0), 6, 0.9
        weights = np.arange(S) / np.arange(S).sum()
        values = random_values()
        rows = tabular.trade_off(MDP, MU, PI, rho_bars, c_bars, lambda_, n, values, weights)
        assert [(row['rho_bar'], row['c_bar']) for row in rows] == list(itertools.product(rho_bars, c_bars))
        for row in rows:
            knobs = (row['rho_bar'], row['c_bar'], lambda_, n)
            biases = tabular.bias(MDP, MU, PI, row['rho_bar'])
            mean, variance = tabular.target_moments(MDP, MU, PI, values, *knobs)
            expected = {
                'rho_bar': row['rho_bar'],
                'c_bar': row['c_bar'],
                **tabular.contraction_modulus(MDP, MU, PI, *knobs)._asdict(),
                'bias_max': max(abs(biases)),
                'bias_rms': np.sqrt(np.sum(weights * biases**2)),
                'variance': np.sum(weights * variance),
                'mse': np.sum(weights * (variance + (mean - tabular.value(MDP, PI)) ** 2)),
            }
            assert list(row) == list(expected)
            assert row == pytest.approx(expected)

    def test_defaults_are_the_end_of_learning_and_the_states_of_mu(self):
        [row] = tabular.trade_off(MDP, MU, PI, [1.0], [1.0])
        weights = np.linalg.matrix_power(np.einsum('xa,xay->xy', MU, MDP.transitions), 1000)[0]
        fixed_point = tabular.value(MDP, tabular.target_policy(MU, PI, 1.0))
        assert row['variance'] == pytest.approx(weights @ tabular.target_moments(MDP, MU, PI, fixed_point).variance)
        assert row['mse'] == pytest.approx(row['bias_rms'] ** 2 + row['variance'])


class TestWithoutEnd:
    """n = infinity is the limit of n."""

    @pytest.mark.parametrize('rho_bar, c_bar, lambda_', [*KNOBS, (1.0, 1.5, 1.0)])
    def test_it_is_the_limit_of_long_trajectories(self, rho_bar, c_bar, lambda_):
        values = random_values()
        infinite = tabular.target_moments(MDP, MU, PI, values, rho_bar, c_bar, lambda_)
        finite = tabular.target_moments(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n=600)
        np.testing.assert_allclose(infinite, finite, rtol=1e-9)
        for n in (None, math.inf):
            np.testing.assert_allclose(tabular.operator(MDP, MU, PI, values, rho_bar, c_bar, lambda_, n), infinite.mean)

    def test_the_variance_can_be_infinite(self):
        """Without truncation of c the variance grows without bound, although the mean converges."""
        values = random_values()
        means, variances = zip(
            *(tabular.target_moments(MDP, MU, PI, values, 1.0, math.inf, n=n) for n in (50, 100, None)), strict=True
        )
        np.testing.assert_allclose(means[1], means[2], atol=1e-3)
        assert (variances[1] > 1e3 * variances[0]).all()
        assert np.isposinf(variances[2]).all()

    def test_infinite_variance_only_where_it_is(self):
        """0 and 1 are absorbing, with a reward at 0 only; 2 leads to either, and 3 to 1. All have E_mu[c^2] > 1."""
        transitions = np.zeros((4, 2, 4))
        transitions[0, :, 0] = transitions[1, :, 1] = transitions[2, 0, 0] = transitions[2, 1, 1] = 1
        transitions[3, :, 1] = 1
        mdp = tabular.MDP(transitions, [[1, -1], [0, 0], [0, 0], [1, -1]], 0.9)
        mu, pi = np.tile([0.5, 0.5], (4, 1)), np.tile([0.95, 0.05], (4, 1))
        variance = tabular.target_moments(mdp, mu, pi, np.zeros(4), 1.0, math.inf).variance
        np.testing.assert_allclose(variance, [math.inf, 0, math.inf, np.var([1, -0.1])])


def test_chain_is_the_random_walk_of_sutton_and_barto():
    """Without discount V = -0.9, -0.8, ... 0.9 for the uniform policy; by symmetry the return to the middle adds 0."""
    mdp = tabular.MDP.chain(discount=1 - 1e-7)
    uniform = np.full((19, 2), 0.5)
    np.testing.assert_allclose(tabular.value(mdp, uniform), np.arange(-9, 10) / 10, atol=1e-4)
    # As often as the walk from the middle visits it before it ends: falls linearly towards either end.
    visits = 10 - np.abs(np.arange(-9, 10))
    np.testing.assert_allclose(tabular.stationary_distribution(mdp, uniform), visits / visits.sum())


def test_an_action_that_mu_never_takes():
    """Its data cannot tell of it: neither the policy converged to nor the targets contain it, whatever rho_bar is."""
    mu = MU.copy()
    mu[:, 0] = 0
    mu /= mu.sum(axis=1, keepdims=True)
    policy = tabular.target_policy(mu, PI, math.inf)
    np.testing.assert_allclose(policy, np.where(mu > 0, PI, 0) / PI[:, 1:].sum(axis=1, keepdims=True))
    np.testing.assert_allclose(tabular.fixed_point(MDP, mu, PI, math.inf), tabular.value(MDP, policy))
    assert np.abs(tabular.bias(MDP, mu, PI, math.inf)).max() > 0.1


def test_mdps_are_constants():
    assert tabular.MDP.random(3, 2, seed=4).transitions.shape == (3, 2, 3)
    np.testing.assert_array_equal(MDP.transitions, tabular.MDP.random(S, A, seed=1).transitions)
    assert not np.allclose(MDP.rewards, tabular.MDP.random(S, A, seed=0).rewards)
    with pytest.raises(ValueError, match='read-only'):
        MDP.rewards[0, 0] = 1


TWO_ENDS = tabular.MDP(np.tile(np.eye(2)[:, None], (1, 2, 1)), np.zeros((2, 2)))  # Either state leads to itself.
HALVES = np.full((2, 2), 0.5)
ONE_HOTS = np.tile(np.eye(2)[:, None], (1, 2, 1))[0], np.tile(np.eye(2)[:, None], (1, 2, 1))[1]


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: tabular.MDP(np.ones((2, 2)), np.ones((2, 2))), r'transitions must be \[S, A, S\].*\(2, 2\)'),
        (lambda: tabular.MDP(np.ones((2, 1, 3)) / 3, np.ones((2, 1))), r'transitions must be .*\(2, 1, 3\)'),
        (lambda: tabular.MDP(np.ones((2, 1, 2)), np.ones((2, 1))), r'transitions\[0, 0\] must be prob.* of sum 2'),
        (lambda: tabular.MDP([[[2, -1]], [[0, 1]]], np.ones((2, 1))), r'transitions\[0, 0\] must be .*\[2.0, -1.0\]'),
        (
            lambda: tabular.MDP(np.ones((2, 1, 2)) / 2, np.ones((2, 2))),
            r'rewards must be \[S, A\] = \(2, 1\).*\(2, 2\)',
        ),
        (lambda: tabular.MDP(np.ones((2, 1, 2)) / 2, [[0], [np.nan]]), 'rewards must be finite'),
        (lambda: tabular.MDP(np.ones((2, 1, 2)) / 2, [[0], [0]], 1.0), r'discount must lie in \[0, 1\), got 1.0'),
        (lambda: tabular.value(MDP, HALVES), r'policy must be \[S, A\] = \(5, 3\), got shape \(2, 2\)'),
        (lambda: tabular.target_policy([0.5, 0.5], [0.5, 0.5], 1), r'mu must be a policy \[S, A\], got shape \(2,\)'),
        (lambda: tabular.target_policy(MU, HALVES, 1), r'pi must be \[S, A\] = \(5, 3\), got shape \(2, 2\)'),
        (lambda: tabular.target_policy(MU, RATIOS, 1), r'pi\[0\] must be probabilities that sum to 1'),
        (lambda: tabular.target_policy(MU, PI, 0), 'rho_bar must be positive .*, got 0'),
        (lambda: tabular.target_policy(*ONE_HOTS, 1), 'in state 0 mu takes none of the actions of pi'),
        (lambda: tabular.operator(MDP, MU, PI, np.zeros(4)), r'values must be \[S\] = \(5,\), got shape \(4,\)'),
        (lambda: tabular.operator(MDP, MU, PI, np.zeros(5), c_bar=-1), 'c_bar must be 0 or more .*, got -1'),
        (lambda: tabular.operator(MDP, MU, PI, np.zeros(5), math.nan), 'rho_bar must be positive .*, got nan'),
        (lambda: tabular.fixed_point(MDP, MU, PI, lambda_=1.1), r'lambda_ must lie in \[0, 1\], got 1.1'),
        (lambda: tabular.contraction_modulus(MDP, MU, PI, n=0), 'n must be a positive integer, .*, got 0'),
        (lambda: tabular.target_moments(MDP, MU, PI, np.zeros(5), n=1.5), 'n must be a positive integer, .*, got 1.5'),
        (lambda: tabular.stationary_distribution(TWO_ENDS, HALVES), 'more than one stationary distribution'),
        (lambda: tabular.trade_off(MDP, MU, PI, [1], [1], weights=[1, 0]), r'weights must be \[S\] = \(5,\), .*\(2,\)'),
        (lambda: tabular.trade_off(MDP, MU, PI, [1], [1], weights=np.ones(5)), 'weights must be prob.* of sum 5'),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_it_needs_no_jax():
    assert impala_jax.tabular is tabular
    code = 'import sys, impala_jax; impala_jax.tabular.MDP.chain(); print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'False'
