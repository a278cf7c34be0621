"""The convolutions and V-trace of `kernels.cc`, which XLA's CPU backend calls in place of its own.

They are compiled when the project is installed, once per variant of `variants.py`. Where they are unavailable,
`REASON` explains why, and XLA's own implementations are used. `docs/performance.md` has the speed-ups.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.kernels.variants import VARIABLE, VARIANTS, selected
from impala_jax.types import Array

_LANES = 16


class Convolution(NamedTuple):
    """Static parameters of a convolution that array shapes do not determine."""

    stride: int
    padding: str  # 'SAME' or 'VALID'
    relu: bool  # whether to apply a ReLU to the images
    pool: bool  # whether to max-pool the outputs: 3 x 3, stride 2, 'SAME'


def is_supported(convolution: Convolution, images: Array, kernel: Array) -> bool:
    """Whether the kernels support a layer with images [N, H, W, C] and kernel [K, K, C, filters].

    The arrays must be float32, the number of filters a multiple of 16, and the output not empty.
    """
    known = not REASON and images.dtype == kernel.dtype == jnp.float32 and kernel.shape[-1] % _LANES == 0
    return known and min(*images.shape, *kernel.shape, *_geometry(convolution, images, kernel)[2:]) > 0


def is_image_gradient_supported(images: Array) -> bool:
    """Whether `image_gradient` supports these images; it is not needed for the first layer of a network."""
    return images.shape[-1] % _LANES == 0


def is_vtrace_supported(arrays: Sequence[Array], constants: Sequence[Any]) -> bool:
    """Whether `vtrace` supports these arguments: float32 arrays on the CPU, and `constants` that are not traced."""
    given = not any(isinstance(constant, jax.Array) for constant in constants)
    return not REASON and jax.default_backend() == 'cpu' and given and all(x.dtype == jnp.float32 for x in arrays)


def conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """Computes a convolution with its ReLU, max-pooling and bias.

    Args:
      convolution: Static parameters.
      images: Images, [N, H, W, C] float32.
      kernel: Filters, [K, K, C, filters] float32.
      bias: Bias, [filters] float32.

    Returns:
      The outputs, [N, H', W', filters] float32, and the indices of the pooling's maxima, uint8 of the same shape, or
      empty without pooling.
    """
    attributes = _attributes(convolution, images, kernel)
    shape = (images.shape[0], int(attributes['rows']), int(attributes['columns']), kernel.shape[-1])
    if convolution.pool:
        shape = (shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3])
    winners = jax.ShapeDtypeStruct(shape if convolution.pool else (0,), jnp.uint8)
    call = _call('impala_conv', (jax.ShapeDtypeStruct(shape, jnp.float32), winners))
    return call(images, kernel, bias, **attributes)


def kernel_gradient(
    convolution: Convolution, images: Array, kernel: Array, winners: Array, gradient: Array
) -> tuple[Array, Array]:
    """Computes the gradients of kernel and bias, [K, K, C, filters] and [filters].

    Args:
      convolution: Static parameters.
      images: Images, [N, H, W, C] float32.
      kernel: Filters, [K, K, C, filters] float32.
      winners: Second output of `conv`.
      gradient: Gradient of the outputs, [N, H', W', filters] float32.
    """
    shapes = (jax.ShapeDtypeStruct(kernel.shape, jnp.float32), jax.ShapeDtypeStruct(kernel.shape[-1:], jnp.float32))
    call = _call('impala_conv_kernel_gradient', shapes)
    return call(images, gradient, winners, **_attributes(convolution, images, kernel))


def image_gradient(convolution: Convolution, images: Array, kernel: Array, winners: Array, gradient: Array) -> Array:
    """Computes the gradient of the images, [N, H, W, C], where C is a multiple of 16.

    The arguments are those of `kernel_gradient`.
    """
    call = _call('impala_conv_image_gradient', jax.ShapeDtypeStruct(images.shape, jnp.float32))
    return call(images, kernel, gradient, winners, **_attributes(convolution, images, kernel))


def vtrace(
    log_rhos: Array,
    discounts: Array,
    rewards: Array,
    values: Array,
    bootstrap_value: Array,
    thresholds: tuple[float | None, float | None, float | None],
    lambda_: float,
) -> tuple[Array, Array]:
    """Computes the targets and advantages of `impala_jax.vtrace.from_importance_weights`.

    Args:
      log_rhos: Log importance weights, [T, B] float32.
      discounts: Discounts, [T, B] float32.
      rewards: Rewards, [T, B] float32.
      values: Value estimates, [T, B] float32.
      bootstrap_value: Value estimate after the last step, [B] float32.
      thresholds: Truncation levels rho_bar, c_bar and that of the policy gradient; None for no truncation.
      lambda_: Factor of the trace coefficients.

    Returns:
      Targets and advantages, each [T, B] float32.
    """
    attributes = {
        name: np.float32(np.inf if threshold is None else threshold)
        for name, threshold in zip(('rho_bar', 'c_bar', 'pg_rho_bar'), thresholds, strict=True)
    }
    attributes['lambda'] = np.float32(lambda_)
    result = jax.ShapeDtypeStruct(log_rhos.shape, jnp.float32)
    return _call('impala_vtrace', (result, result))(log_rhos, discounts, rewards, values, bootstrap_value, **attributes)


def _call(name: str, result):
    return jax.ffi.ffi_call(name, result, vmap_method='sequential')


def _geometry(convolution: Convolution, images: Array, kernel: Array) -> tuple[int, int, int, int]:
    """Returns padding at the top and left, and rows and columns of the outputs before pooling, <= 0 if empty."""
    sizes, strides = kernel.shape[:2], (convolution.stride, convolution.stride)
    (top, bottom), (left, right) = jax.lax.padtype_to_pads(images.shape[1:3], sizes, strides, convolution.padding)
    rows = (images.shape[1] + top + bottom - sizes[0]) // convolution.stride + 1
    columns = (images.shape[2] + left + right - sizes[1]) // convolution.stride + 1
    return int(top), int(left), int(rows), int(columns)


def _attributes(convolution: Convolution, images: Array, kernel: Array) -> dict[str, Any]:
    top, left, rows, columns = _geometry(convolution, images, kernel)
    lengths = {'stride': convolution.stride, 'top': top, 'left': left, 'rows': rows, 'columns': columns}
    return {
        **{name: np.int64(length) for name, length in lengths.items()},
        'relu': np.bool_(convolution.relu),
        'pool': np.bool_(convolution.pool),
    }


def _source(library: ctypes.CDLL) -> str | None:
    """Returns the SHA-256 of the source that the library was compiled from; None for versions without it."""
    if not hasattr(library, 'impala_source'):
        return None
    library.impala_source.restype = ctypes.c_char_p
    return library.impala_source().decode()


def _features() -> set[str]:
    """Returns the names of the instruction sets that all processors of this machine have."""
    lines = re.findall(r'^flags\s*:(.*)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    return set.intersection(*(set(line.split()) for line in lines)) if lines else set()


def _library(variants: Iterable[str], features: set[str]) -> ctypes.CDLL | str:
    """Returns the first of these variants that is usable with these instruction sets, or why there is none."""
    source = hashlib.sha256(Path(__file__).with_name('kernels.cc').read_bytes()).hexdigest()
    reason = ''
    for variant in variants:
        spec = importlib.util.find_spec(f'impala_jax.kernels._kernels_{variant}')
        if missing := [name for name in VARIANTS[variant] if name not in features]:
            # Not even loaded: its first instruction might be one of those.
            reason = f'not available for this processor, which lacks {missing[0]}'
        elif spec is None or spec.origin is None:
            reason = 'not compiled: install a C++ compiler (g++ or clang++), and reinstall this project'
        elif _source(library := ctypes.CDLL(spec.origin)) != source:
            reason = 'compiled from a different kernels.cc: reinstall this project'
        else:
            return library
    return reason


def _load() -> str:
    """Registers the kernels with XLA; returns the reason if that is impossible, otherwise an empty string.

    Raises:
      ConfigError: If the environment variable that selects a variant has an unknown value.
    """
    if not (names := selected()):
        return f'turned off by {VARIABLE}'
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ('Linux', 'x86_64'):
        return f'not available for {system} on {machine}, only for Linux on x86_64'
    library = _library(names, _features())
    if isinstance(library, str):
        return library
    try:
        for name in ('impala_conv', 'impala_conv_kernel_gradient', 'impala_conv_image_gradient', 'impala_vtrace'):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
    except jax.errors.JaxRuntimeError as error:  # The interface of this jaxlib version is different.
        return f'rejected by jaxlib, reinstall this project: {error}'
    return ''


REASON = _load()
