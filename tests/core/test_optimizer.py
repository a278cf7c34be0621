"""The optimiser: TensorFlow's RMSProp, Adam, schedules, the norm of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from impala_jax.config import OptimizerConfig
from impala_jax.optimizer import Hyperparameters, make_optimizer, make_schedule


def optimizer_of(config, learning_rate):
    return make_optimizer(config, Hyperparameters(learning_rate, 0.0, config.epsilon))


class TestOptimizer:
    @pytest.mark.parametrize('momentum', [0.0, 0.9])
    def test_rmsprop_is_tensorflows(self, momentum):
        """ms = decay ms + (1 - decay) g^2, from 1; mom = momentum mom + lr g / sqrt(ms + eps); w = w - mom."""
        config = OptimizerConfig(epsilon=0.01, momentum=momentum, max_grad_norm=np.inf)
        optimizer = optimizer_of(config, 0.1)
        rng = np.random.RandomState(0)
        w = rng.randn(6)
        params = jnp.asarray(w, jnp.float32)
        state = optimizer.init(params)
        ms, mom = np.ones(6), np.zeros(6)
        update = jax.jit(optimizer.update)
        for _ in range(30):
            gradient = rng.randn(6) * 10.0 ** np.arange(-4, 2)
            ms = 0.99 * ms + 0.01 * gradient**2
            mom = momentum * mom + 0.1 * gradient / np.sqrt(ms + 0.01)
            w = w - mom
            updates, state = update(jnp.asarray(gradient, jnp.float32), state)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, w, rtol=1e-4, atol=1e-5)

    def test_the_first_step_is_small(self):
        """Because the accumulator starts at 1; from 0, as PyTorch has it, the step would be about 10 lr."""
        optimizer = optimizer_of(OptimizerConfig(), 1.0)
        gradient = jnp.ones(1)
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(updates, -1 / np.sqrt(1 + 0.01), rtol=1e-5)

    def test_adams_first_step_is_the_learning_rate(self):
        optimizer = optimizer_of(OptimizerConfig('adam', epsilon=1e-8), 0.5)
        gradient = jnp.array([3.0, -1e-3])
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(updates, [-0.5, 0.5], rtol=1e-3)

    def test_a_linear_schedule_ends_at_zero(self):
        schedule = make_schedule('linear', 0.5, 10)
        np.testing.assert_allclose(
            [schedule(i) for i in range(12)], [0.5 - 0.05 * min(i, 10) for i in range(12)], rtol=1e-5
        )
        constant = make_schedule('constant', 0.5, 10)
        assert {float(constant(i)) for i in (0, 5, 10, 100)} == {0.5}

    @pytest.mark.parametrize('max_grad_norm', [1.0, 5.0, 7.0, np.inf])
    def test_the_global_norm_is_clipped(self, max_grad_norm):
        config = OptimizerConfig(decay=0.0, epsilon=1e8, max_grad_norm=max_grad_norm)
        optimizer = optimizer_of(config, 1.0)
        gradient = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}  # of norm 5
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        factor = min(1.0, max_grad_norm / 5)
        # With an epsilon this large, RMSProp only divides by 1e4.
        np.testing.assert_allclose(updates['a'], [-3e-4 * factor], rtol=1e-4)
        np.testing.assert_allclose(updates['b'], [-4e-4 * factor], rtol=1e-4)
