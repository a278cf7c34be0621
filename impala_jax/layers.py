"""Convolutions whose gradients XLA's CPU backend computes fast; elsewhere XLA's own.

Forward they are XLA's everywhere, so that actors and learner, on whatever device, share parameters and numbers. The
gradients are the same up to the order of sums (`tests/test_layers.py`); what they gain is in `docs/performance.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from impala_jax.types import Array

_NHWC = ('NHWC', 'HWIO', 'NHWC')


class Conv(nn.Module):
    """A convolution with bias and, if wanted, max-pooling (3 x 3, stride 2) between the two.

    Parameters are named and made as those of `flax.linen.Conv`. Pooling before the bias yields the same numbers, and
    the bias's gradient is a sum over a quarter of the pixels.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: str = 'SAME'
    pool: bool = False
    centre: bool = False  # Takes each filter's mean out.
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H', W', features]."""
        kernel = self.param(
            'kernel', self.kernel_init, (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        )
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        kernel = centred(kernel) if self.centre else kernel
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        if self.pool:
            y = nn.max_pool(y, (3, 3), (2, 2), padding='SAME')
        return add_bias(y, bias.astype(self.dtype))


def centred(kernel: Array) -> Array:
    """[H, W, C, filters] -> the same, with each filter's mean taken out."""
    return kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)


def conv(images: Array, kernel: Array, stride: int, padding: str) -> Array:
    """A convolution of [N, H, W, C] by [K, K, C, filters], with padding 'VALID' or 'SAME'."""
    if padding == 'VALID' and stride > 1 and kernel.shape[0] % stride == 0:
        return _strided_conv(images, kernel, stride)
    return _plain_conv(images, kernel, stride, padding)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """[..., features] + [features]."""
    return x + jnp.expand_dims(bias, range(x.ndim - 1))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    def plain(rows):
        return rows.sum(0)

    def by_product(rows):
        # XLA would compute the gradient anew inside of its sum, pixel by pixel.
        return jnp.ones(rows.shape[0], rows.dtype) @ rows

    rows = gradient.reshape(-1, gradient.shape[-1])
    return gradient, lax.platform_dependent(rows, cpu=by_product, default=plain)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _plain_conv(images: Array, kernel: Array, stride: int, padding: str = 'VALID') -> Array:
    return lax.conv_general_dilated(images, kernel, (stride, stride), padding, dimension_numbers=_NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _strided_conv(images: Array, kernel: Array, stride: int) -> Array:
    return _plain_conv(images, kernel, stride)


def _strided_conv_forward(images: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _plain_conv(images, kernel, stride), (images, kernel)


def _strided_conv_backward(stride: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def by_blocks(images, kernel, gradient):
        return _conv_gradients_by_blocks(images, kernel, gradient, stride)

    def plain(images, kernel, gradient):
        return jax.vjp(functools.partial(_plain_conv, stride=stride), images, kernel)[1](gradient)

    return lax.platform_dependent(*residuals, gradient, cpu=by_blocks, default=plain)


_strided_conv.defvjp(_strided_conv_forward, _strided_conv_backward)


def _conv_gradients_by_blocks(images: Array, kernel: Array, gradient: Array, stride: int) -> tuple[Array, Array]:
    """Gradients of images and kernel as one matrix product each.

    In blocks of `stride` x `stride` pixels the convolution has k x k filters, k = K / stride, and no strides: block
    (i, j) contributes to the k x k outputs (i - a, j - b). With the gradients of those side by side, a matrix of
    [blocks, k k filters], the kernel's gradient is [pixels of a block, blocks] times it, and the images' the other way
    round.
    """
    n, rows, columns, filters = gradient.shape
    channels, k = images.shape[3], kernel.shape[0] // stride
    height, width = rows + k - 1, columns + k - 1  # In blocks; the pixels that are left over have no effect.
    around = [(0, 0), (k - 1, k - 1), (k - 1, k - 1), (0, 0)]
    padded = jnp.pad(gradient, around)
    shifted = [
        padded[:, k - 1 - a : k - 1 - a + height, k - 1 - b : k - 1 - b + width] for a in range(k) for b in range(k)
    ]
    outputs = jnp.concatenate(shifted, axis=-1).reshape(n * height * width, k * k * filters)

    used = images[:, : height * stride, : width * stride]
    blocks = used.reshape(n, height, stride, width, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    by_kernel = blocks.reshape(n * height * width, stride * stride * channels).T @ outputs
    by_kernel = by_kernel.reshape(stride, stride, channels, k, k, filters).transpose(3, 0, 4, 1, 2, 5)

    weights = kernel.reshape(k, stride, k, stride, channels, filters).transpose(0, 2, 5, 1, 3, 4)
    by_images = outputs @ weights.reshape(k * k * filters, stride * stride * channels)
    by_images = by_images.reshape(blocks.shape).transpose(0, 1, 3, 2, 4, 5).reshape(used.shape)
    left_over = [(0, whole - part) for whole, part in zip(images.shape, used.shape, strict=True)]
    return jnp.pad(by_images, left_over), by_kernel.reshape(kernel.shape)
