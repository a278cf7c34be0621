"""Checkpoints of a run: written under another name, verified, and in place by one atomic rename.

A kill at any moment leaves only a hidden temporary directory behind. Of several hosts the first one saves, for all, and
hands on what it restores (`impala_jax.learner`).
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

DIRECTORY = 'checkpoints'  # in the workdir
_TEMPORARY = '.temporary-'
_logger = logging.getLogger(__name__)
_T = TypeVar('_T')


class Checkpoint(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: PyTree  # of numpy arrays
    metadata: dict[str, Any]
    config: Config


class _Saved(NamedTuple):
    """A verified checkpoint as it lies on the disk."""

    step: int
    path: Path
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]  # by the leaf's path in the state


class Checkpointer:
    """Writes and restores the checkpoints of one run."""

    def __init__(self, directory: Path, config: Config, keep: int):
        self._directory = Path(directory).absolute()
        self._config = config
        self._keep = keep
        self._damaged: set[int] = set()  # steps found to be damaged, which do not count as kept
        with _one_line_errors(f'cannot write checkpoints to {self._directory}'):
            existing = next(path for path in (self._directory, *self._directory.parents) if path.exists())
            if not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Writes a checkpoint; returns when it is on the disk. A step that is there already is left alone.

        Args:
          step: grows over the run; the highest is the newest.
          state: numpy or fully addressable JAX arrays, numbers, None and empty containers.
          metadata: JSON values.
        Raises:
          CheckpointError: it could not be written; the former ones are intact.
        """
        arrays = state_arrays.flatten(state)
        header = {'step': step, 'config': config_lib.to_dict(self._config), 'metadata': metadata}
        json.dumps(header)  # What is no JSON is a mistake of the caller's, and fails before anything is written.
        what = f'cannot write checkpoint {self._path(step)}'
        size = sum(array.nbytes for array in arrays.values())
        space = (self._directory, size)
        with stopping.critical_section(), _one_line_errors(what, 'the former checkpoints are intact', space=space):
            _bounded(what, self._config.timeout_s, lambda: self._save(step, arrays, header))

    def restore_latest(self, template: PyTree) -> Checkpoint | None:
        """The newest good checkpoint, or None where there is none at all; damaged ones are reported and passed over.

        Args:
          template: the structure, shapes and dtypes expected: arrays or `jax.ShapeDtypeStruct`s. Leaves below the key
            `runtime` are not compared. None stands for whatever was saved there: an array, nested dicts of arrays (by
            key, field or index), or None.
        Raises:
          CheckpointMismatch: it was written by another configuration, or the state has another structure.
          CheckpointError: there are checkpoints, but none is good.
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
                _logger.warning('checkpoint %s is damaged (%s); it is written anew', final, error)
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
        """Takes the checkpoint away at once, so that none is ever seen half removed."""
        hidden = self._directory / f'{_TEMPORARY}{path.name}-removed-{os.getpid()}'
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _remove_temporaries(self) -> None:
        for path in self._directory.glob(f'{_TEMPORARY}*'):
            shutil.rmtree(path, ignore_errors=True)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, good or not, ascending."""
    try:
        return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f'cannot read {directory}: {first_line(error)}') from error


def check_config(workdir: Path, config: Config) -> None:
    """Compares `config` with the newest checkpoint that has a manifest, if any; reads nothing else.

    Raises:
      CheckpointMismatch: it was written by another configuration.
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
    """Whether the newest good checkpoint of a run has leaves below `part`, a path in its state.

    Raises:
      CheckpointError: there is no good checkpoint.
    """
    return any(name.startswith(f'{part}/') for name in _newest_of(workdir, arrays=False).manifest['leaves'])


def require_utf8(workdir: Path) -> None:
    """Raises ConfigError if TensorStore, which writes checkpoints, would write to another folder than Python."""
    try:
        same = str(workdir).encode() == os.fsencode(workdir)
    except UnicodeEncodeError:  # Bytes that the locale cannot decode.
        same = False
    if not same:
        raise ConfigError(
            f'--workdir {str(workdir)!a}: this name needs UTF-8, but the locale is {sys.getfilesystemencoding()}; set '
            'LC_ALL=C.UTF-8 or PYTHONUTF8=1, or give a name in ASCII'
        )


def load_config(workdir: Path) -> Config:
    """The configuration of the newest good checkpoint of a run.

    Raises:
      CheckpointError: there is no good checkpoint.
    """
    saved = _newest_of(workdir, arrays=False)
    return _config_of(saved.path, saved.manifest)


def restore(workdir: Path, template: PyTree) -> Checkpoint:
    """The newest good checkpoint of a run, to read only: whatever of its state `template` does not name is left out.

    Raises:
      CheckpointMismatch: the template's leaves are not in it, or of another shape or dtype.
      CheckpointError: there is no good checkpoint.
    """
    saved = _newest_of(workdir)
    state = _fit(template, saved, strict=False)
    return Checkpoint(saved.step, state, saved.manifest['metadata'], _config_of(saved.path, saved.manifest))


def _newest_of(workdir: Path, arrays: bool = True) -> _Saved:
    require_utf8(Path(workdir).absolute())
    directory = Path(workdir).absolute() / DIRECTORY
    saved, _ = _newest(directory, Config().timeout_s, arrays=arrays)
    if saved is None:
        raise CheckpointError(f'no checkpoint in {directory}; give the --workdir of a run that has saved one')
    return saved


def _newest(
    directory: Path,
    timeout_s: float,
    check: Callable[[Path, dict[str, Any]], None] = lambda path, manifest: None,
    arrays: bool = True,
) -> tuple[_Saved | None, set[int]]:
    """The newest good checkpoint, and the damaged steps above it."""
    for _ in range(3):  # The run that owns the directory may remove old ones while we read.
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
                _logger.warning('checkpoint %s is damaged (%s); trying the one before', path, error)
        if not damaged and not removed:
            return None, set()
        if damaged:
            break
    causes = '; '.join(f'{step}: {cause}' for step, cause in damaged.items())
    raise CheckpointError(
        f'no checkpoint in {directory} is good ({causes}); put a good copy there, or start anew with another --workdir'
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
    """The saved state in the template's structure; raises CheckpointMismatch where it does not fit."""
    state, problems = state_arrays.fit(template, saved.arrays, strict)
    if problems:
        more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise CheckpointMismatch(
            f'checkpoint {saved.path} holds another state: {"; ".join(problems[:3])}{more}; '
            'use the network, optimiser and environment it was written with, or another --workdir'
        )
    return state


def _bounded(what: str, timeout_s: float, fn: Callable[[], _T]) -> _T:
    """Calls `fn` in a thread, for a file system may hang; Orbax cannot run in a notebook's own thread either."""
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
    except Exception as error:  # Orbax and TensorStore raise many kinds.
        cause = first_line(error)
        if space and space[0].exists():
            free = shutil.disk_usage(space[0]).free
            if free < space[1]:
                cause = f'the disk is full: {_size_text(free)} are free, it takes up to {_size_text(space[1])}'
        raise CheckpointError('; '.join(filter(None, [f'{what}: {cause}', remedy]))) from error


def _size_text(size: int) -> str:
    """A number of bytes, as in 4.2 MB."""
    for unit, unit_size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if size >= unit_size:
            return f'{size / unit_size:.1f} {unit}'
    return f'{size} bytes'
