"""V-trace against the paper's equation 1, written out term by term, and against RLax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import vtrace
from impala_jax.kernels import cpu
from impala_jax.vtrace import VTraceReturns

IMPLEMENTATIONS = ['scan', 'associative_scan', 'auto']  # `auto` is the kernel where it was compiled.


def reference(
    log_rhos,
    discounts,
    rewards,
    values,
    bootstrap_value,
    clip_rho_threshold=1.0,
    clip_c_threshold=1.0,
    clip_pg_rho_threshold=1.0,
    lambda_=1.0,
):
    """Equation 1 and section 4.2, O(T^2):

    v_s = V(x_s) + sum_{t=s}^{T-1} gamma^{t-s} (prod_{i=s}^{t-1} c_i) rho_t (r_t + gamma V(x_{t+1}) - V(x_t)),

    but for gamma, which is a product of one discount a step. None means no threshold.
    """
    rho_bar, c_bar, pg_rho_bar = (
        math.inf if threshold is None else threshold
        for threshold in (clip_rho_threshold, clip_c_threshold, clip_pg_rho_threshold)
    )
    ratios = np.exp(np.asarray(log_rhos, np.float64))
    rhos = np.minimum(rho_bar, ratios)
    cs = lambda_ * np.minimum(c_bar, ratios)
    T = len(ratios)
    V = np.concatenate([values, bootstrap_value[None]]).astype(np.float64)
    vs = V.copy()  # v_T = V(x_T)
    for s in range(T):
        for t in range(s, T):
            factor = np.ones(ratios.shape[1])
            for i in range(s, t):
                factor = factor * discounts[i] * cs[i]
            vs[s] += factor * rhos[t] * (rewards[t] + discounts[t] * V[t + 1] - V[t])
    pg_advantages = np.minimum(pg_rho_bar, ratios) * (rewards + discounts * vs[1:] - V[:-1])
    return VTraceReturns(vs[:-1], pg_advantages)


def random_inputs(seed=0, T=7, B=5, scale=1.0, on_policy=False):
    rng = np.random.RandomState(seed)
    discounts = 0.9 * (rng.rand(T, B) > 0.15)
    inputs = {
        'log_rhos': np.zeros((T, B)) if on_policy else scale * rng.randn(T, B),
        'discounts': discounts,
        'rewards': rng.randn(T, B),
        'values': rng.randn(T, B),
        'bootstrap_value': rng.randn(B),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def compute(inputs, **kwargs):
    return VTraceReturns(*map(np.asarray, vtrace.from_importance_weights(**inputs, **kwargs)))


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(actual.vs, expected.vs, rtol, atol)
    np.testing.assert_allclose(actual.pg_advantages, expected.pg_advantages, rtol, atol)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize(
    'knobs',
    [
        {},
        {'clip_rho_threshold': 3.0, 'clip_c_threshold': 0.5, 'clip_pg_rho_threshold': 2.0, 'lambda_': 0.7},
        {'clip_rho_threshold': 0.4, 'clip_c_threshold': 2.5, 'clip_pg_rho_threshold': 0.2, 'lambda_': 0.95},
        {'clip_rho_threshold': None, 'clip_c_threshold': None, 'clip_pg_rho_threshold': None},
        {'clip_rho_threshold': math.inf, 'clip_c_threshold': 1.0, 'clip_pg_rho_threshold': math.inf},
        {'lambda_': 0.0},
    ],
)
def test_targets_are_those_of_equation_1(implementation, knobs):
    inputs = random_inputs()
    actual = compute(inputs, implementation=implementation, **knobs)
    assert actual.vs.dtype == actual.pg_advantages.dtype == np.float32
    assert_close(actual, reference(**inputs, **knobs))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('T, B', [(1, 1), (1, 4), (2, 1), (33, 3), (5, 16), (4, 37)])
def test_any_length_and_batch_gives_equation_1(implementation, T, B):
    inputs = random_inputs(T=T, B=B)
    assert_close(compute(inputs, implementation=implementation), reference(**inputs))


@pytest.mark.skipif(bool(cpu.REASON), reason=f'kernels {cpu.REASON}')
def test_the_kernel_is_chosen_where_it_serves():
    def runs_kernel(dtype, **knobs):
        inputs = {name: jnp.asarray(x, dtype) for name, x in random_inputs().items()}
        program = jax.jit(lambda knobs: vtrace.from_importance_weights(**inputs, **knobs))
        return 'impala_vtrace' in program.lower(knobs).as_text()

    assert runs_kernel(jnp.float32)
    assert not runs_kernel(jnp.bfloat16)
    assert not runs_kernel(jnp.float32, lambda_=0.5)  # An input of the program.


def test_ratios_of_all_sizes_are_exact():
    """Of all sizes, and exactly 1 on policy: the last advantage is the clipped ratio here."""
    log_rhos = np.concatenate([np.linspace(-110, 95, 4001), [0, -np.inf, np.inf, -0.0, 88.72]])
    log_rhos = log_rhos.astype(np.float32)[None]
    ones, zeros = np.ones_like(log_rhos), np.zeros_like(log_rhos)
    for threshold in (None, 1.0):
        returns = vtrace.from_importance_weights(
            log_rhos=log_rhos,
            discounts=zeros,
            rewards=ones,
            values=zeros,
            bootstrap_value=zeros[0],
            clip_pg_rho_threshold=threshold,
        )
        with np.errstate(over='ignore'):
            expected = np.minimum(np.exp(log_rhos.astype(np.float64)), np.inf if threshold is None else threshold)
            expected = expected.astype(np.float32)
        np.testing.assert_allclose(
            returns.pg_advantages, expected, rtol=3e-7, atol=1.2e-38
        )  # XLA takes subnormal numbers for 0.
        np.testing.assert_array_equal(returns.pg_advantages[log_rhos == 0], 1)
        np.testing.assert_array_equal(returns.pg_advantages[np.isneginf(log_rhos)], 0)
    assert np.isnan(compute(random_inputs() | {'log_rhos': np.full((7, 5), np.nan, np.float32)}).vs).all()


def test_rlax_agrees_where_it_has_the_same_definition():
    """RLax fixes c_bar to 1, and for lambda < 1 its advantage bootstraps from a mixture, and not from v_{s+1}."""
    inputs = random_inputs(T=20, B=6)

    def compute_rlax(lambda_, rho_bar, pg_rho_bar):
        values_t = np.concatenate([inputs['values'][1:], inputs['bootstrap_value'][None]])
        fn = functools.partial(
            rlax.vtrace_td_error_and_advantage,
            lambda_=lambda_,
            clip_rho_threshold=rho_bar,
            clip_pg_rho_threshold=pg_rho_bar,
        )
        ratios = np.exp(inputs['log_rhos'])
        return jax.vmap(fn, in_axes=1, out_axes=1)(
            inputs['values'], values_t, inputs['rewards'], inputs['discounts'], ratios
        )

    for lambda_ in (1.0, 0.8):
        expected = compute_rlax(lambda_, 2.0, 3.0)
        actual = compute(inputs, clip_rho_threshold=2.0, clip_pg_rho_threshold=3.0, lambda_=lambda_)
        np.testing.assert_allclose(actual.vs, expected.errors + inputs['values'], rtol=1e-4, atol=1e-5)
        if lambda_ == 1.0:
            np.testing.assert_allclose(actual.pg_advantages, expected.pg_advantage, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rho_bar, pg_rho_bar', [(1.0, 1.0), (2.0, 0.5), (None, None)])
def test_the_implementation_of_rlax_agrees(rho_bar, pg_rho_bar):
    inputs = random_inputs(seed=1, T=20, B=6)
    inputs['log_rhos'][3:5, :2] = -np.inf
    knobs = dict(clip_rho_threshold=rho_bar, clip_pg_rho_threshold=pg_rho_bar)
    for actual, expected in zip(compute(inputs, **knobs, implementation='rlax'), compute(inputs, **knobs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    for other in ({'lambda_': 0.9}, {'clip_c_threshold': 0.9}, {'clip_c_threshold': None}):
        with pytest.raises(ValueError, match="'rlax' has c_bar 1 and lambda 1"):
            compute(inputs, **knobs, **other, implementation='rlax')


class TestKnobs:
    """Each threshold, and lambda, changes what it should and only that."""

    base = dict(clip_rho_threshold=1.0, clip_c_threshold=1.0, clip_pg_rho_threshold=1.0, lambda_=1.0)
    inputs = random_inputs(seed=3, T=6, B=50, scale=2.0)
    ratios = np.exp(inputs['log_rhos'])

    def change(self, **knobs):
        return compute(self.inputs, **self.base), compute(self.inputs, **(self.base | knobs))

    def test_rho_bar_scales_temporal_differences(self):
        """The last delta, and no other term of the last target."""
        before, after = self.change(clip_rho_threshold=4.0)
        deltas = after.vs[-1] - self.inputs['values'][-1], before.vs[-1] - self.inputs['values'][-1]
        factor = np.minimum(4.0, self.ratios[-1]) / np.minimum(1.0, self.ratios[-1])
        np.testing.assert_allclose(deltas[0], factor * deltas[1], rtol=1e-3, atol=1e-5)
        assert (np.abs(factor - 1) > 0.1).any()
        np.testing.assert_array_equal(before.pg_advantages[-1], after.pg_advantages[-1])

    @pytest.mark.parametrize('knobs', [{'clip_c_threshold': 0.2}, {'clip_c_threshold': 5.0}, {'lambda_': 0.5}])
    def test_c_bar_and_lambda_change_the_trace_only(self, knobs):
        """Only the trace: nothing at the last step, where there is none."""
        before, after = self.change(**knobs)
        np.testing.assert_array_equal(before.vs[-1], after.vs[-1])
        np.testing.assert_array_equal(before.pg_advantages[-1], after.pg_advantages[-1])
        assert (np.abs(before.vs[:-1] - after.vs[:-1]) > 1e-3).any(axis=1).all()

    def test_c_bar_is_not_lambda(self):
        """Lambda scales every ratio, c_bar cuts the large ones off: below it nothing changes."""
        before, after = self.change(clip_c_threshold=float(self.ratios.max()) + 1)
        assert np.abs(before.vs - after.vs).max() > 0.1
        wider = compute(self.inputs, **(self.base | {'clip_c_threshold': float(self.ratios.max()) + 2}))
        np.testing.assert_array_equal(after.vs, wider.vs)

    def test_pg_rho_bar_scales_advantages_only(self):
        before, after = self.change(clip_pg_rho_threshold=4.0)
        np.testing.assert_array_equal(before.vs, after.vs)
        factor = np.minimum(4.0, self.ratios) / np.minimum(1.0, self.ratios)
        np.testing.assert_allclose(after.pg_advantages, factor * before.pg_advantages, rtol=1e-4, atol=1e-5)
        assert (np.abs(factor - 1) > 0.1).any()

    @pytest.mark.parametrize('name', ['clip_rho_threshold', 'clip_c_threshold', 'clip_pg_rho_threshold'])
    def test_none_is_inf(self, name):
        base = dict.fromkeys(['clip_rho_threshold', 'clip_c_threshold', 'clip_pg_rho_threshold'], 1.0)
        none = compute(self.inputs, **(base | {name: None}))
        infinite = compute(self.inputs, **(base | {name: math.inf}))
        np.testing.assert_array_equal(none.vs, infinite.vs)
        np.testing.assert_array_equal(none.pg_advantages, infinite.pg_advantages)
        assert_close(none, reference(**self.inputs, **(base | {name: None})), rtol=1e-3)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('threshold', [1.0, None, math.inf])
def test_a_masked_transition_teaches_nothing(implementation, threshold):
    """log_rhos = -inf: the target is the value, the advantage 0, and the trace ends."""
    knobs = dict.fromkeys(['clip_rho_threshold', 'clip_c_threshold', 'clip_pg_rho_threshold'], threshold)
    masked = 3
    inputs = random_inputs(T=7)
    inputs['discounts'][:] = 0.9
    inputs['log_rhos'][masked] = -np.inf
    whole = compute(inputs, implementation=implementation, **knobs)
    np.testing.assert_array_equal(whole.vs[masked], inputs['values'][masked])
    np.testing.assert_array_equal(whole.pg_advantages[masked], 0)

    # Before it: as if the unroll ended there, with its value as the bootstrap. After it: as if it began there.
    before = {name: value[:masked] for name, value in inputs.items() if name != 'bootstrap_value'}
    after = {name: value[masked + 1 :] for name, value in inputs.items() if name != 'bootstrap_value'}
    before = compute(before | {'bootstrap_value': inputs['values'][masked]}, implementation=implementation, **knobs)
    after = compute(after | {'bootstrap_value': inputs['bootstrap_value']}, implementation=implementation, **knobs)
    for name in VTraceReturns._fields:
        parts = [getattr(before, name), getattr(whole, name)[masked][None], getattr(after, name)]
        np.testing.assert_allclose(getattr(whole, name), np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_on_policy_is_the_n_step_bellman_target():
    inputs = random_inputs(T=6, B=3, on_policy=True)
    expected = np.zeros((7, 3))
    expected[-1] = inputs['bootstrap_value']
    for s in range(6):  # sum_{t=s}^{T-1} gamma^{t-s} r_t + gamma^{T-s} V(x_T)
        for t in range(s, 6):
            expected[s] += np.prod(inputs['discounts'][s:t], axis=0) * inputs['rewards'][t]
        expected[s] += np.prod(inputs['discounts'][s:], axis=0) * inputs['bootstrap_value']
    advantages = inputs['rewards'] + inputs['discounts'] * expected[1:] - inputs['values']
    for knobs in ({}, {'clip_rho_threshold': 10.0, 'clip_c_threshold': 5.0, 'clip_pg_rho_threshold': 3.0}):
        assert_close(compute(inputs, **knobs), VTraceReturns(expected[:-1], advantages))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_no_gradient_flows_out(implementation):
    inputs = random_inputs()
    inputs['log_rhos'][2] = -np.inf

    def total(inputs):
        return sum(jnp.sum(x) for x in vtrace.from_importance_weights(**inputs, implementation=implementation))

    for name, gradient in jax.grad(total)(inputs).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


@pytest.mark.parametrize(
    'name, shape',
    [
        ('log_rhos', (4,)),
        ('log_rhos', (4, 3, 1)),
        ('discounts', (4, 1)),
        ('rewards', (5, 3)),
        ('values', (5, 3)),  # with the bootstrap
        ('bootstrap_value', (1,)),
        ('bootstrap_value', (1, 3)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(name, shape):
    inputs = random_inputs(T=4, B=3)
    with pytest.raises(AssertionError):
        vtrace.from_importance_weights(**(inputs | {name: np.zeros(shape, np.float32)}))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('T, B', [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_learn_from(implementation, T, B):
    with pytest.raises(ValueError, match=rf'at least one step and one trajectory, got \[T, B\] = \[{T}, {B}\]'):
        vtrace.from_importance_weights(**random_inputs(T=T, B=B), implementation=implementation)


thresholds = st.one_of(st.none(), st.just(math.inf), st.floats(0.1, 5.0))
knobs = st.fixed_dictionaries(
    {
        'clip_rho_threshold': thresholds,
        'clip_c_threshold': thresholds,
        'clip_pg_rho_threshold': thresholds,
        'lambda_': st.floats(0, 1),
    }
)
examples = settings(max_examples=20, deadline=None, database=None, derandomize=True)


@examples
@given(seed=st.integers(0, 2**31 - 1), T=st.sampled_from([1, 2, 5, 8]), knobs=knobs)
def test_any_knobs_give_equation_1(seed, T, knobs):
    """All implementations are equation 1, for any truncation levels."""
    inputs = random_inputs(seed, T=T, B=2, scale=0.7)
    expected = reference(**inputs, **knobs)
    for implementation in IMPLEMENTATIONS:
        assert_close(compute(inputs, implementation=implementation, **knobs), expected, rtol=1e-3, atol=1e-3)


@examples
@given(seed=st.integers(0, 2**31 - 1), knobs=knobs, shift=st.floats(-5, 5))
def test_consistent_values_stay(seed, knobs, shift):
    """Where the values already satisfy Bellman's equation along the data, they are the targets, for any ratios."""
    inputs = random_inputs(seed, T=5, B=2, scale=0.7)
    inputs['values'] += np.float32(shift)
    values = np.concatenate([inputs['values'], inputs['bootstrap_value'][None]])
    inputs['rewards'] = values[:-1] - inputs['discounts'] * values[1:]
    assert_close(compute(inputs, **knobs), VTraceReturns(values[:-1], np.zeros((5, 2))), atol=1e-3)
