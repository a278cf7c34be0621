"""The layers whose gradients are our own, against XLA's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import finish, start

from impala_jax import layers


def gradients(layer, cotangent_seed, *args):
    """Output and gradients, for a random gradient of the output."""
    output, backward = jax.vjp(layer, *args)
    return output, backward(jax.random.normal(jax.random.PRNGKey(cotangent_seed), output.shape, output.dtype))


def assert_same(ours, plain, tolerance=1e-5):
    """Within `tolerance` of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
        assert np.abs(b).max() > 0


@pytest.mark.parametrize(
    ('height', 'width', 'channels', 'size', 'stride', 'filters'),
    [
        (84, 84, 4, 8, 4, 16),  # The shallow torso on Atari.
        (20, 20, 16, 4, 2, 32),
        (72, 96, 3, 8, 4, 16),  # On DMLab.
        (17, 23, 16, 4, 2, 32),  # Its second: a row and a column are left over.
        (9, 9, 8, 3, 1, 8),
        (13, 14, 3, 6, 2, 5),
        (11, 15, 2, 3, 3, 4),
        (15, 15, 2, 5, 2, 4),  # 5 is no multiple of 2.
    ],
)
def test_conv(height, width, channels, size, stride, filters):
    images, kernel = (
        jax.random.normal(jax.random.PRNGKey(i), shape)
        for i, shape in enumerate(((5, height, width, channels), (size, size, channels, filters)))
    )

    def plain(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def ours(images, kernel):
        return layers.conv(images, kernel, stride, 'VALID')

    expected = gradients(plain, 2, images, kernel)
    assert_same(gradients(ours, 2, images, kernel), expected)
    np.testing.assert_array_equal(ours(images, kernel), expected[0])


def test_conv_in_bfloat16():
    images, kernel = jnp.ones([2, 20, 20, 16], jnp.bfloat16) / 3, jnp.ones([4, 4, 16, 32], jnp.bfloat16) / 7
    ours = gradients(lambda *args: layers.conv(*args, 2, 'VALID'), 2, images, kernel)
    to_float = [x.astype(jnp.float32) for x in (images, kernel)]
    plain = gradients(lambda *args: layers.conv(*args, 2, 'VALID'), 2, *to_float)
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.bfloat16.dtype}
    assert_same([x.astype(jnp.float32) for x in jax.tree.leaves(ours[0])], [plain[0]], 0.02)


@pytest.mark.parametrize('pool', [False, True])
@pytest.mark.parametrize(('size', 'stride', 'padding'), [(3, 1, 'SAME'), (4, 2, 'VALID')])
def test_layer(size, stride, padding, pool):
    """Parameters, outputs and gradients are those of flax's layer; with pooling, of flax's layer and then pooling."""
    images = jnp.round(jax.random.normal(jax.random.PRNGKey(0), (3, 20, 22, 4)))  # Neighbours are often equal.
    ours = layers.Conv(8, size, stride, padding, pool)
    flax = nn.Conv(8, (size, size), (stride, stride), padding)
    params = ours.init(jax.random.PRNGKey(1), images)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.PRNGKey(1), images))
    params['params']['bias'] = jax.random.normal(jax.random.PRNGKey(2), (8,))

    def plain(params, images):
        y = flax.apply(params, images)
        return nn.max_pool(y, (3, 3), (2, 2), 'SAME') if pool else y

    expected = gradients(plain, 3, params, images)
    assert_same(gradients(ours.apply, 3, params, images), expected)
    np.testing.assert_array_equal(ours.apply(params, images), expected[0])


def test_filters_without_their_mean():
    images = jax.random.uniform(jax.random.PRNGKey(0), (3, 20, 20, 4))
    layer = layers.Conv(8, 4, 2, 'VALID', centre=True)
    params = layer.init(jax.random.PRNGKey(1), images)
    np.testing.assert_allclose(layer.apply(params, images), layer.apply(params, images + 0.5), atol=1e-5)


FAULTS = """
import resource, sys
from impala_jax import allocator
if 'keep' in sys.argv:
    assert allocator.keep_memory()
import jax, jax.numpy as jnp
double = jax.jit(lambda x: x + x)
x = jnp.ones([20_000_000])  # 80 MB: more than an arena of a thread can hold.
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_is_kept(tmp_path):
    """Pages of 4 KiB that each of 30 calls with an output of 80 MB faults in: after a few calls none."""
    lowest = {}
    for argument in ('keep', 'default'):
        status, output, errors = finish(start(tmp_path, '-c', FAULTS, argument, environment={'JAX_PLATFORMS': 'cpu'}))
        assert status == 0, errors
        lowest[argument] = min(map(int, output.split()))
    assert lowest['keep'] < 100 and lowest['default'] > 19_000, lowest
