"""Checkpoints of a run, written to a temporary directory that one atomic rename puts in place.

A kill at any moment leaves at most a hidden temporary directory. On several hosts, host 0 saves the checkpoint of all
hosts and broadcasts what it restores (`impala_jax.training.hosts`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from impala_jax import config as config_lib
from impala_jax.config import Config, ConfigError
from impala_jax.rundir import checkpoint_format, state_arrays
from impala_jax.rundir.checkpoint_format import CheckpointError, CheckpointMismatch, Damaged, first_line
from impala_jax.system import stopping
from impala_jax.types import PyTree

DIRECTORY = 'checkpoints'  # Folder in the workdir.
_TEMPORARY = '.temporary-'
_logger = logging.getLogger(__name__)
_T = TypeVar('_T')


class Checkpoint(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: PyTree  # Leaves are NumPy arrays.
    metadata: dict[str, Any]
    config: Config


class _Saved(NamedTuple):
    """A verified checkpoint in its stored form."""

    step: int
    path: Path
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]  # Keyed by the leaf's path in the state.


class Checkpointer:
    """Writes and restores the checkpoints of one run.

    Args:
      directory: Folder of the checkpoints; made when the first one is saved.
      config: Configuration of the run, stored in each checkpoint.
      keep: Number of checkpoints kept; older ones are removed.

    Raises:
      CheckpointError: If the folder cannot be written.
    """

    def __init__(self, directory: Path, config: Config, keep: int):
        self._directory = Path(directory).absolute()
        self._config = config
        self._keep = keep
        self._damaged: set[int] = set()  # Steps of damaged checkpoints, which do not count towards `keep`.
        with _one_line_errors(f'cannot write checkpoints to {self._directory}'):
            existing = next(path for path in (self._directory, *self._directory.parents) if path.exists())
            if not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Writes a checkpoint; returns when it is on the disk. An intact checkpoint of the same step is left unchanged.

        Args:
          step: Number that grows over the run; the highest is the newest.
          state: PyTree of NumPy or fully addressable JAX arrays, numbers, None and empty containers.
          metadata: JSON-serialisable values.

        Raises:
          CheckpointError: If it cannot be written; the earlier checkpoints are intact.
        """
        arrays = state_arrays.flatten(state)
        header = {'step': step, 'config': config_lib.to_dict(self._config), 'metadata': metadata}
        json.dumps(header)  # Metadata that is not JSON is a bug of the caller; it fails before anything is written.
        what = f'cannot write checkpoint {self._path(step)}'
        size = sum(array.nbytes for array in arrays.values())
        space = (self._directory, size)
        with stopping.critical_section(), _one_line_errors(what, 'the earlier checkpoints are intact', space=space):
            _bounded(what, self._config.timeout_s, lambda: self._save(step, arrays, header))

    def restore_latest(self, template: PyTree) -> Checkpoint | None:
        """Restores the newest intact checkpoint; logs and skips damaged ones.

        Args:
          template: PyTree of arrays or `jax.ShapeDtypeStruct`s with the expected structure, shapes and dtypes. Leaves
            below the key `runtime` are not compared. None matches any saved value: an array, nested dicts of arrays
            (by key, field or index), or None.

        Returns:
          The checkpoint, or None if the folder holds no checkpoint.

        Raises:
          CheckpointMismatch: If it was written with another configuration, or its state has another structure.
          CheckpointError: If there are checkpoints, but all are damaged.
        """
        saved, damaged = _newest(
            self._directory,
            self._config.timeout_s,
            check=lambda path, manifest: _require_same_config(path, manifest, self._config),
        )
        self._damaged |= damaged
        if saved is None:
            return None
        state = _fit(template, saved, strict=True)
        return Checkpoint(saved.step, state, saved.manifest['metadata'], _config_of(saved.path, saved.manifest))

    def _path(self, step: int) -> Path:
        return self._directory / f'{step:09d}'

    def _save(self, step: int, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        final = self._path(step)
        if final.exists():
            try:
                checkpoint_format.verify(final)
                return
            except Damaged as error:
                _logger.warning('checkpoint %s is damaged (%s); it is written again', final, error)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()
        temporary = self._directory / f'{_TEMPORARY}{final.name}-{os.getpid()}'
        try:
            checkpoint_format.write(temporary, arrays, header)
            if final.exists():
                self._remove(final)
            temporary.rename(final)
            checkpoint_format.sync_folder(self._directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._damaged.discard(step)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        older = [step for step in steps(self._directory) if step != newest]
        good = [step for step in older if step not in self._damaged]
        surplus = good[: len(good) - (self._keep - 1)] if len(good) >= self._keep else []
        for step in surplus + [step for step in older if step in self._damaged]:
            self._remove(self._path(step))
        self._damaged.clear()

    def _remove(self, path: Path) -> None:
        """Renames the checkpoint before deleting it, so no reader sees it half removed."""
        hidden = self._directory / f'{_TEMPORARY}{path.name}-removed-{os.getpid()}'
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _remove_temporaries(self) -> None:
        for path in self._directory.glob(f'{_TEMPORARY}*'):
            shutil.rmtree(path, ignore_errors=True)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, damaged ones included, in ascending order."""
    try:
        return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f'cannot read {directory}: {first_line(error)}') from error


def check_config(workdir: Path, config: Config) -> None:
    """Compares `config` with the newest checkpoint that has a readable manifest, if any; reads manifests only.

    Raises:
      CheckpointMismatch: If the checkpoint was written with another configuration.
    """
    directory = Path(workdir).absolute() / DIRECTORY
    for step in reversed(steps(directory)):
        path = directory / f'{step:09d}'
        try:
            manifest = checkpoint_format.read_manifest(path)
        except Damaged:
            continue
        return _require_same_config(path, manifest, config)


def holds(workdir: Path, part: str) -> bool:
    """Whether the newest intact checkpoint of a run has leaves below `part`, a path in its state.

    Raises:
      CheckpointError: If there is no intact checkpoint.
    """
    return any(name.startswith(f'{part}/') for name in _newest_of(workdir, arrays=False).manifest['leaves'])


def require_utf8(workdir: Path) -> None:
    """Checks that TensorStore, which writes checkpoints, encodes the folder's name as Python does.

    Raises:
      ConfigError: If the name needs UTF-8 and the locale uses another encoding.
    """
    try:
        same = str(workdir).encode() == os.fsencode(workdir)
    except UnicodeEncodeError:  # Bytes that the locale cannot decode.
        same = False
    if not same:
        raise ConfigError(
            f'--workdir {str(workdir)!a}: this name needs UTF-8, but the locale is {sys.getfilesystemencoding()}; set '
            'LC_ALL=C.UTF-8 or PYTHONUTF8=1, or give an ASCII name'
        )


def load_config(workdir: Path) -> Config:
    """The configuration of the newest intact checkpoint of a run.

    Raises:
      CheckpointError: If there is no intact checkpoint.
    """
    saved = _newest_of(workdir, arrays=False)
    return _config_of(saved.path, saved.manifest)


def restore(workdir: Path, template: PyTree) -> Checkpoint:
    """Reads the parts of the newest intact checkpoint of a run that `template` names.

    Args:
      workdir: Folder of the run.
      template: PyTree as in `Checkpointer.restore_latest`; leaves that it lacks are not restored.

    Raises:
      CheckpointMismatch: If a leaf of the template is missing, or has another shape or dtype.
      CheckpointError: If there is no intact checkpoint.
    """
    saved = _newest_of(workdir)
    state = _fit(template, saved, strict=False)
    return Checkpoint(saved.step, state, saved.manifest['metadata'], _config_of(saved.path, saved.manifest))


def _newest_of(workdir: Path, arrays: bool = True) -> _Saved:
    require_utf8(Path(workdir).absolute())
    directory = Path(workdir).absolute() / DIRECTORY
    saved, _ = _newest(directory, Config().timeout_s, arrays=arrays)
    if saved is None:
        raise CheckpointError(f'no checkpoint in {directory}; give the --workdir of a run that has saved a checkpoint')
    return saved


def _newest(
    directory: Path,
    timeout_s: float,
    check: Callable[[Path, dict[str, Any]], None] = lambda path, manifest: None,
    arrays: bool = True,
) -> tuple[_Saved | None, set[int]]:
    """The newest intact checkpoint, and the steps of newer, damaged ones."""
    for _ in range(3):  # The run that owns the directory may remove old checkpoints during the read.
        damaged: dict[int, str] = {}
        removed = False
        for step in reversed(steps(directory)):
            path = directory / f'{step:09d}'
            try:
                manifest = _bounded(f'cannot read {path}', timeout_s, lambda path=path: checkpoint_format.verify(path))
                check(path, manifest)
                loaded = {}
                if arrays:
                    loaded = _bounded(
                        f'cannot read {path}', timeout_s, lambda p=path, m=manifest: checkpoint_format.load(p, m)
                    )
                return _Saved(step, path, manifest, loaded), set(damaged)
            except Damaged as error:
                if not path.exists():
                    removed = True
                    continue
                damaged[step] = str(error)
                _logger.warning('checkpoint %s is damaged (%s); trying the previous one', path, error)
        if not damaged and not removed:
            return None, set()
        if damaged:
            break
    causes = '; '.join(f'{step}: {cause}' for step, cause in damaged.items())
    raise CheckpointError(
        f'no checkpoint in {directory} is good ({causes}); put a good copy there, or start again with another --workdir'
    )


def _require_same_config(path: Path, manifest: dict[str, Any], config: Config) -> None:
    fields = config_lib.differences(_config_of(path, manifest, config), config)
    if fields:
        raise CheckpointMismatch(
            f'cannot resume from {path}: the configuration differs in {"; ".join(fields)}; '
            'use the same configuration, or another --workdir'
        )


def _config_of(path: Path, manifest: dict[str, Any], resumed_by: Config | None = None) -> Config:
    try:
        return config_lib.from_dict(config_lib.upgraded(manifest['config'], resumed_by))
    except ConfigError as error:
        raise CheckpointMismatch(f'checkpoint {path} was written by another version of impala_jax: {error}') from error


def _fit(template: PyTree, saved: _Saved, strict: bool) -> PyTree:
    """The saved state in the template's structure; raises CheckpointMismatch if it does not fit."""
    state, problems = state_arrays.fit(template, saved.arrays, strict)
    if problems:
        more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise CheckpointMismatch(
            f'checkpoint {saved.path} holds another state: {"; ".join(problems[:3])}{more}; '
            'use the network, optimiser and environment it was written with, or another --workdir'
        )
    return state


def _bounded(what: str, timeout_s: float, fn: Callable[[], _T]) -> _T:
    """Calls `fn` in a thread, because a file system may hang and Orbax cannot run in a notebook's main thread."""
    result: list[_T] = []
    errors: list[BaseException] = []

    def target():
        try:
            result.append(fn())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name='checkpoint', daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not result:
        raise CheckpointError(f'{what}: the file system did not answer within {timeout_s:g} s')
    return result[0]


@contextlib.contextmanager
def _one_line_errors(what: str, remedy: str = '', space: tuple[Path, int] | None = None) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of many types.
        cause = first_line(error)
        if space and space[0].exists():
            free = shutil.disk_usage(space[0]).free
            if free < space[1]:
                cause = f'the disk is full: {_size_text(free)} are free, up to {_size_text(space[1])} are needed'
        raise CheckpointError('; '.join(filter(None, [f'{what}: {cause}', remedy]))) from error


def _size_text(size: int) -> str:
    """Formats a number of bytes, as in 4.2 MB."""
    for unit, unit_size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if size >= unit_size:
            return f'{size / unit_size:.1f} {unit}'
    return f'{size} bytes'
