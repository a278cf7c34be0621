"""Convolutions by our kernels and by XLA: the same numbers, the same gradients."""

import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.kernels import cpu, layers
from impala_jax.kernels.cpu import Convolution

needs_kernels = pytest.mark.skipif(bool(cpu.REASON), reason=f'kernels {cpu.REASON}')


def test_kernels_are_there_if_they_could_be_compiled():
    compiler = shutil.which('g++') or shutil.which('clang++')
    assert not cpu.REASON or not compiler or 'not available for' in cpu.REASON, cpu.REASON


def gradients(layer, *args):
    """Output and gradients, for a random gradient of the output."""
    output, backward = jax.vjp(layer, *args)
    return output, backward(normal(3, *output.shape).astype(output.dtype))


def normal(seed, *shape):
    """NumPy's numbers: XLA would take longer to compile JAX's for one shape than all else in a test here."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_same(ours, plain, tolerance=1e-5):
    """Within `tolerance` of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
        assert np.abs(b).max() > 0


def arguments(images, height, width, channels, size, filters):
    """Images, kernel and bias, of small integers, so that neighbours are often equal, and many are 0."""
    shapes = (images, height, width, channels), (size, size, channels, filters), (filters,)
    return tuple(normal(seed, *shape).round() for seed, shape in enumerate(shapes))


def both(convolution):
    """The layer as it is chosen, and XLA's, both compiled."""
    return (
        jax.jit(lambda *args: layers.conv(convolution, *args)),
        jax.jit(lambda *args: layers._plain_conv(convolution, *args)),
    )


def runs_kernels(function, *args):
    return 'impala_conv' in jax.jit(function).lower(*args).as_text()


@needs_kernels
@pytest.mark.parametrize(
    ('height', 'width', 'channels', 'size', 'stride', 'filters', 'padding', 'relu', 'pool'),
    [
        (84, 84, 4, 8, 4, 16, 'VALID', False, False),  # The shallow torso on Atari.
        (20, 20, 16, 4, 2, 32, 'VALID', True, False),
        (72, 96, 3, 8, 4, 16, 'VALID', False, True),  # On DMLab.
        (17, 23, 16, 4, 2, 32, 'VALID', True, False),  # Its second: a row and a column are left over.
        (9, 9, 64, 3, 1, 64, 'VALID', True, True),  # The last of Mnih et al.'s.
        (84, 84, 4, 3, 1, 16, 'SAME', False, True),  # The deep torso on Atari.
        (42, 42, 16, 3, 1, 32, 'SAME', False, True),
        (21, 21, 32, 3, 1, 32, 'SAME', True, False),
        (9, 12, 32, 3, 1, 32, 'SAME', False, True),  # The end of it on DMLab.
        (13, 14, 16, 5, 2, 48, 'SAME', True, True),  # 5 is no multiple of 2.
        (15, 15, 16, 5, 3, 16, 'SAME', True, False),
        (8, 9, 16, 2, 3, 16, 'VALID', False, True),  # Pixels that no filter sees.
        (2, 1, 16, 3, 1, 16, 'SAME', True, False),
        (11, 40, 5, 7, 1, 16, 'SAME', True, True),  # Rows of 35 inputs.
    ],
)
def test_kernels_are_xlas_convolution(height, width, channels, size, stride, filters, padding, relu, pool):
    args = arguments(3, height, width, channels, size, filters)
    ours, plain = both(Convolution(stride, padding, relu, pool))
    assert runs_kernels(ours, *args) and not runs_kernels(plain, *args)
    assert_same(gradients(ours, *args), gradients(plain, *args))


def random_layer(seed):
    """A convolution with odd shapes, and its arguments and the gradient of its outputs, all small integers."""
    rng = np.random.default_rng(seed)

    def integers(*shape):
        return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)

    height, width = rng.choice([1, 1, 2, 2, 3, 4, 5, 7, 13, 30], 2)
    size_y, size_x = rng.integers(1, 8, 2)
    channels, filters = rng.choice([3, 16, 16, 32]), rng.choice([16, 32, 48])
    convolution = Convolution(
        int(rng.integers(1, 6)), str(rng.choice(['SAME', 'VALID'])), *map(bool, rng.integers(2, size=2))
    )
    args = (
        integers(rng.integers(1, 4), height, width, channels),
        integers(size_y, size_x, channels, filters),
        integers(filters),
    )
    output = jax.eval_shape(lambda *args: layers._plain_conv(convolution, *args), *args)
    return convolution, args, integers(*output.shape)


@needs_kernels
@pytest.mark.parametrize(
    'seeds', [range(25), pytest.param(range(25, 525), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_kernels_on_random_shapes(seeds):
    """Sums of small integers are exact in any order, so the numbers and all gradients are equal to the bit."""
    narrow = without_outputs = 0
    for seed in seeds:
        convolution, args, cotangent = random_layer(seed)
        ours, plain = both(convolution)
        assert runs_kernels(ours, *args) == bool(cotangent.size), seed
        narrow += args[0].shape[2] < convolution.stride and cpu.is_image_gradient_supported(args[0])
        without_outputs += not cotangent.size
        results = [
            (output, backward(cotangent)) for output, backward in (jax.vjp(layer, *args) for layer in (ours, plain))
        ]
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=f'seed {seed}: {convolution}'), *results)
    assert narrow > 1 and without_outputs > 1


@needs_kernels
@pytest.mark.parametrize('pool', [False, True])
def test_an_image_is_the_same_in_any_batch(pool):
    """To the bit, so that what acts is what is learned from; and gradients are the same each time."""
    images, kernel, bias = (0.1 * x for x in arguments(37, 21, 23, 16, 3, 32))  # Whose sums are rounded.
    ours, _ = both(Convolution(1, 'SAME', True, pool))
    outputs = ours(images, kernel, bias)
    for part in (slice(0, 1), slice(3, 16), slice(30, 37)):
        np.testing.assert_array_equal(ours(images[part], kernel, bias), outputs[part])
    first = gradients(ours, images, kernel, bias)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, gradients(ours, images, kernel, bias), first)


@needs_kernels
def test_what_is_not_finite_is_not_hidden():
    """Neither by the ReLU nor by pooling."""
    images, kernel, bias = arguments(2, 9, 9, 16, 3, 16)
    ours, plain = both(Convolution(1, 'SAME', True, True))
    for value in (jnp.nan, jnp.inf):
        bad = images.at[1, 4, 4, 0].set(value)
        np.testing.assert_array_equal(jnp.isnan(ours(bad, kernel, bias)), jnp.isnan(plain(bad, kernel, bias)))
        assert not jnp.isfinite(ours(bad, kernel, bias)).all()


@needs_kernels
def test_members_of_a_population_side_by_side():
    """A vmap over parameters."""
    images, kernel, bias = arguments(2, 9, 9, 16, 3, 16)
    ours, plain = (jax.vmap(function, in_axes=(None, 0, None)) for function in both(Convolution(1, 'SAME', True, True)))
    kernels_ = jnp.stack([kernel, 2 * kernel])
    assert_same(gradients(ours, images, kernels_, bias), gradients(plain, images, kernels_, bias))


@needs_kernels
def test_with_an_accelerator_only_forward_passes_run_kernels(monkeypatch):
    """Gradients are XLA's there; actors on the CPU still act by the kernels."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    args = arguments(2, 9, 9, 16, 3, 16)
    ours, plain = both(Convolution(1, 'SAME', True, True))
    assert runs_kernels(ours, *args)
    assert not runs_kernels(lambda *args: jax.vjp(ours, *args)[1](jnp.ones([2, 5, 5, 16])), *args)
    assert_same(gradients(ours, *args), gradients(plain, *args))


@pytest.mark.parametrize(('dtype', 'filters'), [(jnp.bfloat16, 16), (jnp.float32, 8)])
def test_what_kernels_do_not_serve_is_xlas(dtype, filters):
    args = [x.astype(dtype) for x in arguments(2, 20, 20, 4, 4, filters)]
    ours, plain = both(Convolution(2, 'VALID', False, True))
    assert not runs_kernels(ours, *args)
    jax.tree.map(np.testing.assert_array_equal, gradients(ours, *args), gradients(plain, *args))


@pytest.mark.parametrize(
    ('size', 'stride', 'padding', 'pool', 'features'),
    [(3, 1, 'SAME', False, 8), (3, 1, 'SAME', True, 16), (4, 2, 'VALID', False, 16), (4, 2, 'VALID', True, 8)],
)
def test_the_layer_is_that_of_flax(size, stride, padding, pool, features):
    """Parameters, outputs and gradients are those of flax's layers."""
    images, _, bias = arguments(3, 20, 22, 4, size, features)
    ours = layers.Conv(features, size, stride, padding, relu=True, pool=pool)
    flax = nn.Conv(features, (size, size), (stride, stride), padding)
    params = ours.init(jax.random.PRNGKey(1), images)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.PRNGKey(1), images))
    params['params']['bias'] = bias

    def plain(params, images):
        y = flax.apply(params, nn.relu(images))
        return nn.max_pool(y, (3, 3), (2, 2), 'SAME') if pool else y

    assert_same(gradients(ours.apply, params, images), gradients(plain, params, images))


def test_filters_can_be_without_their_mean():
    images = normal(0, 3, 20, 20, 4)
    layer = layers.Conv(8, 4, 2, 'VALID', centre=True)
    params = layer.init(jax.random.PRNGKey(1), images)
    np.testing.assert_allclose(layer.apply(params, images), layer.apply(params, images + 0.5), atol=1e-5)
