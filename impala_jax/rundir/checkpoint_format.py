"""Format of a checkpoint: the directory `<step>/` with `arrays/` (Orbax) and the manifest `checkpoint.json`.

The manifest holds the configuration, the caller's metadata, and a SHA-256 hash per file. It is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from impala_jax.config import ConfigError
from impala_jax.rundir import orbax_arrays
from impala_jax.rundir.format import FORMAT, problem

_ARRAYS = 'arrays'
_MANIFEST = 'checkpoint.json'


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line with path, cause and remedy."""


class CheckpointMismatch(CheckpointError, ConfigError):
    """An intact checkpoint with another configuration, structure or format."""


class Damaged(Exception):
    """A checkpoint whose files differ from what was written; the message is the cause."""


def write(folder: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """Makes `folder` and writes a checkpoint there; returns when it is on the disk.

    Args:
      folder: Folder that does not exist yet.
      arrays: Arrays, keyed by their paths in the state.
      header: Further entries of the manifest, JSON-serialisable.
    """
    folder.mkdir()
    # Orbax refuses arrays without elements; the manifest determines them by shape and dtype.
    orbax_arrays.save(folder / _ARRAYS, {name: array for name, array in arrays.items() if array.size})
    manifest = {
        'format': FORMAT,
        **header,
        'leaves': {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()},
        'files': {
            str(path.relative_to(folder)): [path.stat().st_size, _sync_and_hash(path)]
            for path in sorted(folder.rglob('*'))
            if path.is_file()
        },
    }
    (folder / _MANIFEST).write_text(json.dumps({'sha256': _digest(manifest), **manifest}))
    _sync_and_hash(folder / _MANIFEST)
    for part in [path for path in folder.rglob('*') if path.is_dir()] + [folder]:
        sync_folder(part)


def verify(path: Path) -> dict[str, Any]:
    """Compares every file with the manifest, and returns the manifest.

    Raises:
      Damaged: If a file is missing or differs.
      CheckpointMismatch: If the checkpoint has a newer format.
    """
    manifest = read_manifest(path)
    for name, (size, sha256) in manifest['files'].items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise Damaged(f'{name}: {error.strerror}') from error
        if len(content) != size:
            raise Damaged(f'{name} has {len(content)} bytes instead of {size}')
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Damaged(f'{name} has another checksum')
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest and compares it with its own checksum only.

    Raises:
      Damaged: If the manifest is missing or differs.
      CheckpointMismatch: If the checkpoint has a newer format.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        digest = manifest.pop('sha256')
    except OSError as error:
        raise Damaged(f'{_MANIFEST}: {error.strerror}') from error
    except (ValueError, AttributeError, KeyError) as error:
        raise Damaged(f'{_MANIFEST} is not a manifest') from error
    if digest != _digest(manifest):
        raise Damaged(f'{_MANIFEST} has another checksum')
    unreadable = problem(manifest['format'])  # Not `Damaged`, so it is neither skipped nor removed.
    if unreadable:
        raise CheckpointMismatch(f'checkpoint {path} {unreadable}, or another --workdir')
    return manifest


def load(path: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads the arrays of a checkpoint, keyed by their paths in the state.

    Raises:
      Damaged: If an array cannot be read, or its shape or dtype differs from the manifest.
    """
    leaves = {name: (_dtype(dtype), tuple(shape)) for name, (dtype, shape) in manifest['leaves'].items()}
    stored = [name for name, (_, shape) in leaves.items() if 0 not in shape]
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in leaves.items() if 0 in shape}
    try:
        arrays |= {name: np.array(array) for name, array in orbax_arrays.restore(path / _ARRAYS, stored).items()}
    except Exception as error:  # Orbax and TensorStore raise errors of many types.
        raise Damaged(f'Orbax cannot read it: {first_line(error)}') from error
    for name, (dtype, shape) in leaves.items():
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise Damaged(f'{name} has another shape or dtype than it was saved with')
    return arrays


def first_line(error: BaseException) -> str:
    """The cause of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200]}' if lines else type(error).__name__


def sync_folder(path: Path) -> None:
    """Waits until the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_and_hash(path: Path) -> str:
    with path.open('rb') as file:
        os.fsync(file.fileno())
        return hashlib.sha256(file.read()).hexdigest()


def _dtype(name: str) -> np.dtype:
    # np.dtype('bfloat16') differs from JAX's type after an old TensorFlow was imported.
    return np.dtype(getattr(ml_dtypes, name, name))
