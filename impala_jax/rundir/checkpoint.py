"""Checkpoints: the arrays are written by Orbax, verified by a manifest, and appear by one atomic rename.

A checkpoint is the directory `<step>/` with `arrays/` (Orbax) and `checkpoint.json`: the configuration, the caller's
metadata, and a SHA-256 of every file, written last. A kill at any moment leaves only a hidden temporary directory
behind. Of several hosts the first one saves, for all, and hands on what it restores (`impala_jax.learner`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost as orbax_processes

from impala_jax import config as config_lib
from impala_jax.config import Config, ConfigError
from impala_jax.rundir.format import FORMAT, problem
from impala_jax.system import stopping
from impala_jax.types import PyTree

DIRECTORY = 'checkpoints'  # in the workdir

_ARRAYS = 'arrays'
_MANIFEST = 'checkpoint.json'
_RUNTIME = 'runtime'  # the part of a state whose leaves may change their shape between save and restore
_TEMPORARY = '.temporary-'

_logger = logging.getLogger(__name__)
_T = TypeVar('_T')


class CheckpointError(Exception):
    """A checkpoint that could not be written or read: one line with the path, the cause and the remedy."""


class CheckpointMismatch(CheckpointError, ConfigError):
    """A good checkpoint, but of another configuration."""


class Checkpoint(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: PyTree  # of numpy arrays
    metadata: dict[str, Any]
    config: Config


class _Damaged(Exception):
    """The message is the cause."""


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
        arrays = _flatten(state)
        header = {'step': step, 'config': config_lib.to_dict(self._config), 'metadata': metadata}
        json.dumps(header)  # What is no JSON is a mistake of the caller's, and fails before anything is written.
        what = f'cannot write checkpoint {self._path(step)}'
        size = sum(array.nbytes for array in arrays.values())
        space = (self._directory, size)
        with stopping.unhurried(), _one_line_errors(what, 'the former checkpoints are intact', space=space):
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
                _verify(final)
                return
            except _Damaged as error:
                _logger.warning('checkpoint %s is damaged (%s); it is written anew', final, error)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()
        temporary = self._directory / f'{_TEMPORARY}{final.name}-{os.getpid()}'
        try:
            temporary.mkdir()
            # Orbax refuses arrays without elements; their shape and dtype in the manifest say everything.
            _orbax_save(temporary / _ARRAYS, {name: array for name, array in arrays.items() if array.size})
            manifest = {
                'format': FORMAT,
                **header,
                'leaves': {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()},
                'files': {
                    str(path.relative_to(temporary)): [path.stat().st_size, _sync_and_hash(path)]
                    for path in sorted(temporary.rglob('*'))
                    if path.is_file()
                },
            }
            (temporary / _MANIFEST).write_text(json.dumps({'sha256': _digest(manifest), **manifest}))
            _sync_and_hash(temporary / _MANIFEST)
            for folder in [path for path in temporary.rglob('*') if path.is_dir()] + [temporary]:
                _sync_folder(folder)
            if final.exists():
                self._remove(final)
            temporary.rename(final)
            _sync_folder(self._directory)
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
        raise CheckpointError(f'cannot read {directory}: {_first_line(error)}') from error


def check_config(workdir: Path, config: Config) -> None:
    """Compares `config` with the newest checkpoint that has a manifest, if any; reads nothing else.

    Raises:
      CheckpointMismatch: it was written by another configuration.
    """
    directory = Path(workdir).absolute() / DIRECTORY
    for step in reversed(steps(directory)):
        path = directory / f'{step:09d}'
        try:
            manifest = _read_manifest(path)
        except _Damaged:
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
                manifest = _bounded(f'cannot read {path}', timeout_s, lambda path=path: _verify(path))
                check(path, manifest)
                loaded = {}
                if arrays:
                    loaded = _bounded(f'cannot read {path}', timeout_s, lambda p=path, m=manifest: _load(p, m))
                return _Saved(step, path, manifest, loaded), set(damaged)
            except _Damaged as error:
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


def _verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it.

    Raises:
      _Damaged: with the cause.
    """
    manifest = _read_manifest(path)
    for name, (size, sha256) in manifest['files'].items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _Damaged(f'{name}: {error.strerror}') from error
        if len(content) != size:
            raise _Damaged(f'{name} has {len(content)} bytes instead of {size}')
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _Damaged(f'{name} has another checksum')
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises: _Damaged, with the cause, or CheckpointMismatch: it is of a newer format."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        digest = manifest.pop('sha256')
    except OSError as error:
        raise _Damaged(f'{_MANIFEST}: {error.strerror}') from error
    except (ValueError, AttributeError, KeyError) as error:
        raise _Damaged(f'{_MANIFEST} is no manifest') from error
    if digest != _digest(manifest):
        raise _Damaged(f'{_MANIFEST} has another checksum')
    unreadable = problem(manifest['format'])  # Not damaged, and so neither passed over nor removed.
    if unreadable:
        raise CheckpointMismatch(f'checkpoint {path} {unreadable}, or another --workdir')
    return manifest


def _load(path: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    leaves = {name: (_dtype(dtype), tuple(shape)) for name, (dtype, shape) in manifest['leaves'].items()}
    stored = [name for name, (_, shape) in leaves.items() if 0 not in shape]
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in leaves.items() if 0 in shape}
    try:
        arrays |= {name: np.array(array) for name, array in _orbax_restore(path / _ARRAYS, stored).items()}
    except Exception as error:  # Orbax and TensorStore raise many kinds.
        raise _Damaged(f'Orbax cannot read it: {_first_line(error)}') from error
    for name, (dtype, shape) in leaves.items():
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise _Damaged(f'{name} is not as it was saved')
    return arrays


def _fit(template: PyTree, saved: _Saved, strict: bool) -> PyTree:
    """The saved arrays in the template's structure; `strict` allows no saved leaf that the template lacks."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template, is_leaf=lambda leaf: leaf is None)
    values, used, problems = [], set(), []
    for path, leaf in leaves:
        name = _name(path)
        if leaf is None:
            below = [other for other in saved.arrays if other == name or other.startswith(f'{name}/')]
            used.update(below)
            values.append(_nest({other[len(name) + 1 :]: saved.arrays[other] for other in below}))
            continue
        array = saved.arrays.get(name)
        values.append(array)
        used.add(name)
        if array is None:
            problems.append(f'{name} is not in it')
        elif not _is_runtime(name):
            expected = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
            if array.shape != tuple(expected.shape) or array.dtype != expected.dtype:
                problems.append(f'{name} is {_describe(array)} there, {_describe(expected)} now')
    if strict:
        problems += [f'{name} is not known now' for name in saved.arrays if name not in used and not _is_runtime(name)]
    if problems:
        more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise CheckpointMismatch(
            f'checkpoint {saved.path} holds another state: {"; ".join(problems[:3])}{more}; '
            'use the network, optimiser and environment it was written with, or another --workdir'
        )
    return jax.tree_util.tree_unflatten(treedef, values)


def _flatten(state: PyTree) -> dict[str, np.ndarray]:
    """The state's leaves by their paths."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name, array = _name(path), np.asarray(leaf)
        if array.dtype.kind in 'OUSMm':
            raise TypeError(f'{name} is {_describe(array)}; a checkpoint holds numbers only')
        if name in arrays:
            raise ValueError(f'two leaves of the state have the path {name}')
        arrays[name] = array
    return arrays


def _nest(arrays: dict[str, np.ndarray]) -> Any:
    """Nested dicts from paths; the bare array of the empty path; None of nothing."""
    if not arrays or '' in arrays:
        return arrays.get('')
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split('/')
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return nested


def _name(path: tuple[Any, ...]) -> str:
    def part(key: Any) -> str:
        return str(next(getattr(key, field) for field in ('name', 'key', 'idx') if hasattr(key, field)))

    return '/'.join(map(part, path)) or 'value'


def _is_runtime(name: str) -> bool:
    return name.split('/')[0] == _RUNTIME


def _dtype(name: str) -> np.dtype:
    # np.dtype('bfloat16') is another type than JAX's once an old TensorFlow is imported.
    return np.dtype(getattr(ml_dtypes, name, name))


def _describe(array: Any) -> str:
    return f'{np.dtype(array.dtype).name}{list(array.shape)}'


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """A checkpointer of this process alone; synchronous, it leaves no thread behind."""
    # One active process means no barrier between hosts. NumPy arrays are written in process 0 only, whatever the
    # options say, so each host that saves is that one to Orbax.
    options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    process_index = orbax_processes.process_index
    orbax_processes.process_index = lambda: 0
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=options)) as checkpointer:
            yield checkpointer
    finally:
        orbax_processes.process_index = process_index


def _orbax_save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if arrays:
        with _quiet_orbax(), _quiet_tensorstore(), _orbax() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def _orbax_restore(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet_orbax(), _orbax() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax reports every stage through absl, as warnings too."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quiet_tensorstore() -> Iterator[None]:
    """After a write that failed, TensorStore prints a traceback for each other one: nobody waits for them any more."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous  # Not after an error: they still come.


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
        cause = _first_line(error)
        if space and space[0].exists():
            free = shutil.disk_usage(space[0]).free
            if free < space[1]:
                cause = f'the disk is full: {free / 1e6:.1f} MB are free, it takes up to {space[1] / 1e6:.1f} MB'
        raise CheckpointError('; '.join(filter(None, [f'{what}: {cause}', remedy]))) from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200]}' if lines else type(error).__name__


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_and_hash(path: Path) -> str:
    with path.open('rb') as file:
        os.fsync(file.fileno())
        return hashlib.sha256(file.read()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
