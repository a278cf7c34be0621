"""Convolutions fused with a preceding ReLU, max-pooling and a bias.

On CPUs they use the kernels of `kernels.cc`; this module is the only place where they are chosen. On other devices,
and for layers that the kernels do not support, they use XLA's own convolution. The parameters are those of
`flax.linen.Conv`, and the results are equal up to the order of summation (`tests/kernels/test_layers.py`).
`docs/performance.md` has the speed-ups.
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
    """A convolution with bias, optionally with a ReLU before it and max-pooling (3 x 3, stride 2) after it."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: str = 'SAME'
    relu: bool = False
    pool: bool = False
    centre: bool = False  # whether to subtract each filter's mean
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images [N, H, W, C] to features [N, H', W', features]."""
        kernel = self.param(
            'kernel', self.kernel_init, (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        )
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        kernel = centred(kernel) if self.centre else kernel
        convolution = Convolution(self.stride, self.padding, self.relu, self.pool)
        return conv(convolution, x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))


def centred(kernel: Array) -> Array:
    """Subtracts each filter's mean from a kernel [H, W, C, filters]."""
    return kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)


def conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    """Computes a convolution with the CPU kernels if they support it, and with XLA otherwise.

    Args:
      convolution: Static parameters.
      images: Images, [N, H, W, C].
      kernel: Filters, [K, K, C, filters].
      bias: Bias, [filters].

    Returns:
      The outputs, [N, H', W', filters].
    """
    if cpu.is_supported(convolution, images, kernel):
        return _fast_conv(convolution, images, kernel, bias)
    return _plain_conv(convolution, images, kernel, bias)


def _plain_conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    images = nn.relu(images) if convolution.relu else images
    y = lax.conv_general_dilated(
        images, kernel, (convolution.stride,) * 2, convolution.padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    if convolution.pool:
        y = nn.max_pool(y, (3, 3), (2, 2), padding='SAME')
    # Adding the bias after pooling gives the same result, and its gradient sums over a quarter of the pixels.
    return y + bias[None, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast_conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> Array:
    """Uses the kernels on CPUs whatever the default backend is: actors may run on the CPU of a GPU or TPU host."""
    fast = functools.partial(cpu.conv, convolution)
    plain = functools.partial(_plain_conv, convolution)
    return lax.platform_dependent(images, kernel, bias, cpu=lambda *args: fast(*args)[0], default=plain)


def _fast_conv_forward(convolution: Convolution, images: Array, kernel: Array, bias: Array):
    if jax.default_backend() != 'cpu':  # Gradients are computed on the default backend.
        return jax.vjp(functools.partial(_plain_conv, convolution), images, kernel, bias)
    y, winners = cpu.conv(convolution, images, kernel, bias)
    return y, (images, kernel, bias, winners)


def _fast_conv_backward(convolution: Convolution, residuals, gradient: Array) -> tuple[Array, Array, Array]:
    if jax.default_backend() != 'cpu':
        return residuals(gradient)
    images, kernel, bias, winners = residuals
    by_kernel, by_bias = cpu.kernel_gradient(convolution, images, kernel, winners, gradient)
    if cpu.is_image_gradient_supported(images):
        by_images = cpu.image_gradient(convolution, images, kernel, winners, gradient)
    else:
        by_images = jax.vjp(lambda x: _plain_conv(convolution, x, kernel, bias), images)[1](gradient)[0]
    return by_images, by_kernel, by_bias


_fast_conv.defvjp(_fast_conv_forward, _fast_conv_backward)
