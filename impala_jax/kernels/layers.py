"""Convolutions with what stands around them: a ReLU before, max-pooling and a bias after.

On CPUs that is one of `kernels.cc`'s, chosen here and nowhere else; on other devices, and where the kernels do not
serve, XLA's own. Parameters are those of `flax.linen.Conv`, numbers the same up to the order of sums
(`tests/kernels/test_layers.py`), and what is gained is in `docs/performance.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from impala_jax.kernels import cpu
from impala_jax.kernels.cpu import Convolution
from impala_jax.types import Array


class Conv(nn.Module):
    """A convolution with bias; if wanted, of what a ReLU leaves, and with max-pooling (3 x 3, stride 2) at the end."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: str = 'SAME'
    relu: bool = False
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
        convolution = Convolution(self.stride, self.padding, self.relu, self.pool)
        return conv(convolution, x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))


def centred(kernel: Array) -> Array:
    """[H, W, C, filters] -> the same, with each filter's mean taken out."""
    return kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)


def conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    """[N, H, W, C], [K, K, C, filters], [filters] -> [N, H', W', filters]."""
    if cpu.serve(convolution, images, kernel):
        return _fast_conv(convolution, images, kernel, bias)
    return _plain_conv(convolution, images, kernel, bias)


def _plain_conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    images = nn.relu(images) if convolution.relu else images
    y = lax.conv_general_dilated(
        images, kernel, (convolution.stride,) * 2, convolution.padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    if convolution.pool:
        y = nn.max_pool(y, (3, 3), (2, 2), padding='SAME')
    return (
        y + bias[None, None, None]
    )  # After pooling it is the same, and its gradient a sum over a quarter of the pixels.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast_conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    """The kernels on a CPU, whichever backend is the default: actors may use one beside a learner's accelerator."""
    fast = functools.partial(cpu.conv, convolution)
    plain = functools.partial(_plain_conv, convolution)
    return lax.platform_dependent(images, kernel, bias, cpu=lambda *args: fast(*args)[0], default=plain)


def _fast_conv_forward(convolution: Convolution, images: Array, kernel: Array, bias: Array):
    if jax.default_backend() != 'cpu':  # Where gradients are computed.
        return jax.vjp(functools.partial(_plain_conv, convolution), images, kernel, bias)
    y, winners = cpu.conv(convolution, images, kernel, bias)
    return y, (images, kernel, bias, winners)


def _fast_conv_backward(convolution: Convolution, residuals, gradient: Array) -> tuple[Array, Array, Array]:
    if jax.default_backend() != 'cpu':
        return residuals(gradient)
    images, kernel, bias, winners = residuals
    by_kernel, by_bias = cpu.kernel_gradient(convolution, images, kernel, winners, gradient)
    if cpu.serve_image_gradient(images):
        by_images = cpu.image_gradient(convolution, images, kernel, winners, gradient)
    else:
        by_images = jax.vjp(lambda x: _plain_conv(convolution, x, kernel, bias), images)[1](gradient)[0]
    return by_images, by_kernel, by_bias


_fast_conv.defvjp(_fast_conv_forward, _fast_conv_backward)
