"""DeepMind Lab (Beattie et al., 2016), through its Python module `deepmind_lab`; see docs/dmlab.md for installation."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import logging
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import data
from impala_jax.config import ConfigError, EnvironmentConfig, closest
from impala_jax.system.machine import expand_home
from impala_jax.types import INSTRUCTION

INSTRUCTION_LENGTH = 16
"""Number of words of an instruction that the agent observes."""
NUM_WORD_IDS = 1001
"""Number of word ids: 0 is padding; words are hashed into the other 1000 (section 3 of the released network)."""

HARDWARE = (
    "environment.renderer 'hardware' needs a module that was built with libdmlab_headless_hw.so, and a GPU that EGL "
    "finds; 'software' renders on the CPU"
)
"""Advice for failures of hardware rendering; the engine writes its own message to the standard error."""

_HEIGHT, _WIDTH = 72, 96
_DMLAB30 = 'contributed/dmlab30/'
# These need the pictures of Brady et al. (2008), or 'dummy' in place of their folder.
_NEED_PICTURES = ('psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition')
_NUM_PICTURES = 2400
_TEST_MIXER_SEED = '0x600D5EED'

# Appendix D. Columns: look right and look up (pixels per frame), strafe right, move forward, fire, jump, crouch.
ACTIONS = np.array(
    [
        [0, 0, 0, 1, 0, 0, 0],  # forward
        [0, 0, 0, -1, 0, 0, 0],  # backward
        [0, 0, -1, 0, 0, 0, 0],  # strafe left
        [0, 0, 1, 0, 0, 0, 0],  # strafe right
        [-20, 0, 0, 0, 0, 0, 0],  # look left
        [20, 0, 0, 0, 0, 0, 0],  # look right
        [-20, 0, 0, 1, 0, 0, 0],  # look left and forward
        [20, 0, 0, 1, 0, 0, 0],  # look right and forward
        [0, 0, 0, 0, 1, 0, 0],  # fire
    ],
    np.intc,
)

_logger = logging.getLogger(__name__)


def factory(config: EnvironmentConfig, evaluation: bool = False) -> Callable[[int], dm_env.Environment]:
    """Returns a function that builds a level from a seed.

    Args:
      config: The settings; the name is `dmlab/<level>`.
      evaluation: Whether to build the test level that corresponds to the level.

    Raises:
      ConfigError: `deepmind_lab` is not installed, or the level or an option cannot be used.
    """
    level = engine_level(config, evaluation)
    try:
        _import_engine()
    except ImportError as error:
        raise ConfigError(
            f'{config.name} needs the module deepmind_lab, which is not on a package index: build it as described in '
            f'docs/dmlab.md (or docs/users/build.md of github.com/google-deepmind/lab) ({error})'
        ) from error
    return functools.partial(DeepMindLab, config, level, evaluation, _level_cache(config.level_cache))


def _import_engine() -> Any:
    """Imports the engine's module without the warnings that the import raises in every process of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return importlib.import_module('deepmind_lab')


def _level_cache(path: str) -> LevelCache | None:
    folder = expand_home(path) if path else None
    if path and folder is None:
        _logger.warning(
            'environment.level_cache %r: this user has no home directory, so compiled maps are not cached; give '
            'another folder',
            path,
        )
    return None if folder is None else LevelCache(folder)


def engine_level(config: EnvironmentConfig, evaluation: bool = False) -> str:
    """Returns the engine's name of a level: `contributed/dmlab30/<level>` in DMLab-30, otherwise the name itself.

    Args:
      config: The settings; the name is `dmlab/<level>`.
      evaluation: Whether to return the test level that corresponds to the level.

    Raises:
      ConfigError: The level or its data set cannot be used. Only what can be checked without the engine is checked.
    """
    name = config.name.removeprefix('dmlab/')
    short, tested = name.removeprefix(_DMLAB30), data.dmlab30_levels()
    _check_data_set(config, needs_pictures=short in _NEED_PICTURES)
    if short in tested:
        return _DMLAB30 + (tested[short] if evaluation else short)
    for train, test in tested.items():
        if short == test:
            if not evaluation:
                raise ConfigError(
                    f'environment.name {config.name!r} is held out for tests; train on dmlab/{train}, '
                    f'whose evaluation plays {test}'
                )
            return _DMLAB30 + short
    return name


def _check_data_set(config: EnvironmentConfig, needs_pictures: bool) -> None:
    """Raises ConfigError for a folder that would abort the engine's process, at once or within an episode."""
    path = config.dataset_path
    if needs_pictures and not path:
        raise ConfigError(
            f'{config.name} needs pictures: set --environment.dataset-path to the folder that docs/dmlab.md describes, '
            "or to 'dummy' for plain colours, which make the task different from the paper's"
        )
    if path in ('', 'dummy'):
        return
    try:
        present = set(os.listdir(path))
    except OSError as error:
        raise ConfigError(f"environment.dataset_path {path!r}: {error.strerror}; give a folder, or 'dummy'") from error
    if needs_pictures:
        missing = [name for i in range(_NUM_PICTURES) if (name := f'{i + 1:04d}.png') not in present]
        if missing:
            raise ConfigError(
                f'environment.dataset_path {path!r} lacks {len(missing)} of the {_NUM_PICTURES} pictures '
                f'0001.png to {_NUM_PICTURES}.png that docs/dmlab.md describes, {missing[0]} first; add them, or give '
                "'dummy'"
            )


class DeepMindLab(dm_env.Environment):
    """A level with observations {'rgb': [72, 96, 3] uint8, 'instruction': [16] int32}; see `word_ids`.

    The engine does not return an observation after the last action of an episode, so a LAST timestep repeats the
    previous observation. Its discount is 0, as in the released code, so it is not used for bootstrapping. In levels
    without instructions, which do not occur in DMLab-30, all word ids are 0.

    The engine ends its whole process when a map is missing, starts threads, and must not be forked. It must therefore
    be built in a separate process (`processes.py`), which also removes the temporary files of a killed engine.

    Args:
      config: The renderer, the action repeat and the data set.
      level: The engine's name of the level.
      evaluation: Whether to allow held-out levels, and to sample maps as in the paper's tests.
      cache: Cache for compiled maps; None for no cache.
      seed: Seed from which the episodes' seeds are drawn.

    Raises:
      ConfigError: The level is unknown to the engine or cannot be built, or a level of DMLab-30 has no instruction.
    """

    def __init__(self, config: EnvironmentConfig, level: str, evaluation: bool, cache: LevelCache | None, seed: int):
        # With more threads, the software renderers of several environments would compete for the cores.
        os.environ.setdefault('LP_NUM_THREADS', '0')
        deepmind_lab = _import_engine()
        settings = {'width': str(_WIDTH), 'height': str(_HEIGHT), 'logLevel': 'WARN'}
        if config.dataset_path:
            settings['datasetPath'] = config.dataset_path
        if evaluation:
            settings |= {'allowHoldOutLevels': 'true', 'mixerSeed': _TEST_MIXER_SEED}
        self._frames_per_step = config.frames_per_step
        self.render_fps = 60 / config.frames_per_step
        self._rng = np.random.RandomState(seed)
        self._running = False
        self._observation: dict[str, np.ndarray] = {}
        self._folder = tempfile.mkdtemp(prefix='dmlab_')
        in_dmlab30 = level.removeprefix(_DMLAB30) in {name for pair in data.dmlab30_levels().items() for name in pair}

        def build(observations: list[str]) -> Any:
            return deepmind_lab.Lab(
                level,
                observations,
                settings,
                renderer=config.renderer,
                level_cache=cache,
                temp_folder=self._folder,
            )

        try:
            try:
                self._lab = build(['RGB_INTERLEAVED', 'INSTR'])
            except ValueError as error:  # The observations of a level cannot be listed without building the engine.
                if in_dmlab30 or "Unknown observation 'INSTR'" not in str(error):
                    raise
                self._lab = build(['RGB_INTERLEAVED'])
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder)
            suggestion = closest(level.removeprefix(_DMLAB30), data.dmlab30_levels(), 'dmlab/')
            remedy = 'is the build complete?' if in_dmlab30 else suggestion
            reason = ' '.join(str(error).split()).rstrip('.')
            if config.renderer == 'hardware' and 'RL API' in reason:  # The renderer's library cannot be loaded.
                remedy = HARDWARE
            raise ConfigError(f'DeepMind Lab cannot build {config.name!r}: {reason}; {remedy}') from error

    def reset(self) -> dm_env.TimeStep:
        """See `dm_env.Environment.reset`."""
        self._lab.reset(seed=int(self._rng.randint(2**31, dtype=np.int64)))
        self._running = True
        return dm_env.restart(self._observe())

    def step(self, action: int) -> dm_env.TimeStep:
        """Takes an action, an index into `ACTIONS`, for `frames_per_step` frames."""
        if not self._running:
            return self.reset()
        reward = self._lab.step(ACTIONS[action], num_steps=self._frames_per_step)
        self._running = self._lab.is_running()
        if not self._running:
            return dm_env.termination(reward, self._observation)
        return dm_env.transition(reward, self._observe())

    def observation_spec(self) -> dict[str, specs.Array]:
        """The image, [72, 96, 3] uint8, and the instruction, [16] int32 word ids."""
        return {
            'rgb': specs.Array((_HEIGHT, _WIDTH, 3), np.uint8, name='rgb'),
            INSTRUCTION: specs.BoundedArray((INSTRUCTION_LENGTH,), np.int32, 0, NUM_WORD_IDS - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        """The nine actions of the paper's appendix D."""
        return specs.DiscreteArray(len(ACTIONS), name='action')

    def render(self) -> np.ndarray:
        """Returns the image of the last observation, [72, 96, 3] uint8."""
        return self._observation['rgb']

    def close(self) -> None:
        """Closes the engine and removes its temporary folder."""
        try:
            self._lab.close()
        finally:
            if os.path.isdir(self._folder):
                shutil.rmtree(self._folder)

    def _observe(self) -> dict[str, np.ndarray]:
        seen = self._lab.observations()
        self._observation = {'rgb': seen['RGB_INTERLEAVED'], INSTRUCTION: word_ids(seen.get('INSTR', ''))}
        return self._observation


@functools.lru_cache(maxsize=4096)
def word_ids(instruction: str) -> np.ndarray:
    """Converts an instruction to word ids from 1 to 1000, padded with 0; [16] int32, read-only.

    An id is derived from the CRC-32 of the word, modulo 1000. Unlike Python's own hash, it is the same in all processes
    and runs.
    """
    words = instruction.split()
    if len(words) > INSTRUCTION_LENGTH:
        _report_long_instructions()
    ids = np.zeros(INSTRUCTION_LENGTH, np.int32)
    for i, word in enumerate(words[:INSTRUCTION_LENGTH]):
        ids[i] = zlib.crc32(word.encode()) % (NUM_WORD_IDS - 1) + 1
    ids.flags.writeable = False
    return ids


@functools.cache
def _report_long_instructions() -> None:
    _logger.warning('an instruction has more than %d words; the agent sees only these', INSTRUCTION_LENGTH)


class LevelCache:
    """A folder as the engine's level cache, so that each map is compiled once.

    Any number of processes may use the same folder, because files are written atomically. Each file ends with a
    checksum of its key and map, because a damaged map would end the engine's process; damaged files are removed. If a
    map cannot be cached, for example because the disk is full, it is compiled again. Only one of the processes that use
    the folder reports problems, each kind once.

    Args:
      folder: The folder, created if necessary.

    Raises:
      ConfigError: The folder cannot be created.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._reported: set[str] = set()
        self._is_reporter: bool | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"environment.level_cache {str(folder)!r}: {error.strerror}; give another folder, or '' for none"
            ) from error

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copies the cached map for `key` to `pk3_path`, and returns whether there was one that could be read.

        The engine aborts if this returns True without writing the file; exceptions propagate out of its `reset`.
        """
        path = self._path(key)
        try:
            stored = path.read_bytes()
            content = stored[: -hashlib.sha256().digest_size]
            if stored != content + _checksum(key, content):
                path.unlink(missing_ok=True)
                self._report('damaged', f"held a damaged file (or an older version's), {path.name}, which was removed")
                return False
            Path(pk3_path).write_bytes(content)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._report('read', f'cannot be read: {error.strerror or error}')
            with contextlib.suppress(OSError):
                os.unlink(pk3_path)
            return False
        return True

    def write(self, key: str, pk3_path: str) -> None:
        """Caches the map in the file `pk3_path` for `key`."""
        partial = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # The folder may have been removed since.
            content = Path(pk3_path).read_bytes()
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix='.partial', delete=False) as file:
                partial = Path(file.name)
                file.write(content + _checksum(key, content))
                file.flush()
                os.fsync(file.fileno())  # Otherwise a crash of the machine could leave an incomplete file.
            os.replace(partial, self._path(key))
        except OSError as error:
            self._report('written', f'cannot be written: {error.strerror or error}')
            if partial is not None:
                with contextlib.suppress(OSError):
                    partial.unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f'{hashlib.sha256(key.encode()).hexdigest()}.pk3'

    def _report(self, kind: str, text: str) -> None:
        if kind in self._reported:
            return
        self._reported.add(kind)
        if self._is_reporter is None:
            self._is_reporter = self._become_reporter()
        if self._is_reporter:
            _logger.warning('the level cache %s %s; such maps are compiled again', self._folder, text)

    def _become_reporter(self) -> bool:
        """Whether this process reports problems: the first one, which holds a lock until it ends."""
        try:
            descriptor = os.open(self._folder, os.O_RDONLY)
        except OSError:  # Without a lock, all processes report.
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
        return True


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b'\0' + content).digest()
