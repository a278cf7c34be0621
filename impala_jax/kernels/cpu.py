"""Convolutions and V-trace of `kernels.cc`, which XLA's CPU backend calls in place of its own.

They are compiled when the project is installed; without a compiler they are missing, `REASON` says so, and all goes on
with XLA's. What they gain is in `docs/performance.md`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.types import Array

_LANES = 16


class Convolution(NamedTuple):
    """What of a convolution is not in its arguments' shapes."""

    stride: int
    padding: str  # 'SAME' or 'VALID'
    relu: bool  # Takes max(images, 0).
    pool: bool  # Max-pools the outputs, 3 x 3, stride 2, 'SAME'.


def serve(convolution: Convolution, images: Array, kernel: Array) -> bool:
    """Whether the kernels can compute this layer: [N, H, W, C] by [K, K, C, filters], with at least one output."""
    known = not REASON and images.dtype == kernel.dtype == jnp.float32 and kernel.shape[-1] % _LANES == 0
    return known and min(*images.shape, *kernel.shape, *_geometry(convolution, images, kernel)[2:]) > 0


def serve_image_gradient(images: Array) -> bool:
    """Whether `image_gradient` can, too; the images of a first layer need none."""
    return images.shape[-1] % _LANES == 0


def serve_vtrace(arrays: Sequence[Array], constants: Sequence[Any]) -> bool:
    """Whether `vtrace` can compute this: float32 on the CPU, with `constants` that are none of the program's inputs."""
    given = not any(isinstance(constant, jax.Array) for constant in constants)
    return not REASON and jax.default_backend() == 'cpu' and given and all(x.dtype == jnp.float32 for x in arrays)


def conv(convolution: Convolution, images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """[N, H, W, C], [K, K, C, filters], [filters] -> [N, H', W', filters], and which pixels won the pooling.

    The latter is uint8 and empty without pooling. All else is float32.
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
    """The gradients of kernel and bias, [K, K, C, filters] and [filters]."""
    shapes = (jax.ShapeDtypeStruct(kernel.shape, jnp.float32), jax.ShapeDtypeStruct(kernel.shape[-1:], jnp.float32))
    call = _call('impala_conv_kernel_gradient', shapes)
    return call(images, gradient, winners, **_attributes(convolution, images, kernel))


def image_gradient(convolution: Convolution, images: Array, kernel: Array, winners: Array, gradient: Array) -> Array:
    """The gradient of the images, [N, H, W, C], of which C is a multiple of 16."""
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
    """Targets and advantages, [T, B], of `impala_jax.vtrace.from_importance_weights`; all arrays are float32.

    `thresholds` are rho_bar, c_bar and that of the advantages.
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
    """Zeros before the first row and column; rows and columns of the outputs before pooling, not positive if none."""
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
    """The SHA-256 of the source it was compiled from; None if it is too old to say."""
    if not hasattr(library, 'impala_source'):
        return None
    library.impala_source.restype = ctypes.c_char_p
    return library.impala_source().decode()


def _load() -> str:
    """Makes the kernels known to XLA; the reason if they cannot be, else ''."""
    spec = importlib.util.find_spec('impala_jax.kernels._kernels')
    if spec is None or spec.origin is None:
        return 'not compiled: install a C++ compiler (g++ or clang++), and this project again'
    library = ctypes.CDLL(spec.origin)
    source = hashlib.sha256(Path(__file__).with_name('kernels.cc').read_bytes()).hexdigest()
    if _source(library) != source:
        return 'compiled from another kernels.cc: install this project again'
    library.impala_supported.restype = ctypes.c_bool
    if not library.impala_supported():
        return 'compiled for another processor: install this project again, on this machine'
    try:
        for name in ('impala_conv', 'impala_conv_kernel_gradient', 'impala_conv_image_gradient', 'impala_vtrace'):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
    except jax.errors.JaxRuntimeError as error:  # Of a jaxlib whose interface is another.
        return f'refused by jaxlib, install this project again: {error}'
    return ''


REASON = _load()
