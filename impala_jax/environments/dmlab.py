"""DeepMind Lab (Beattie et al., 2016) by its own Python module, `deepmind_lab`; docs/dmlab.md says how to get it."""

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
"""Words of an instruction that the agent sees."""
NUM_WORD_IDS = 1001
"""0 stands for no word; words are hashed into the other 1000 (section 3 of the released network)."""

HARDWARE = (
    "environment.renderer 'hardware' needs a module that was built with libdmlab_headless_hw.so, and a GPU that EGL "
    "finds; 'software' draws on the CPU"
)
"""What to do where hardware rendering fails; the engine's own words are on the standard error."""

_HEIGHT, _WIDTH = 72, 96
_DMLAB30 = 'contributed/dmlab30/'
# Without the pictures of Brady et al. (2008), or a word in place of their folder, these cannot be built.
_NEED_PICTURES = ('psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition')
_NUM_PICTURES = 2400
_TEST_MIXER_SEED = '0x600D5EED'

# Appendix D, in the engine's terms: look right and up (pixels a frame), strafe right, move, fire, jump, crouch.
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
    """What builds the level that `config.name` means, `dmlab/<level>`, from a seed; in evaluation, its test level.

    Raises:
      ConfigError: `deepmind_lab` is not installed, or the level or an option cannot be used.
    """
    level = engine_level(config, evaluation)
    try:
        _import_engine()
    except ImportError as error:
        raise ConfigError(
            f'{config.name} needs the module deepmind_lab, which no package index has: build it as docs/dmlab.md (or '
            f'docs/users/build.md of github.com/google-deepmind/lab) says ({error})'
        ) from error
    return functools.partial(DeepMindLab, config, level, evaluation, _level_cache(config.level_cache))


def _import_engine() -> Any:
    """The engine's module; its import, in every process of a run, would warn of what it is made with."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return importlib.import_module('deepmind_lab')


def _level_cache(path: str) -> LevelCache | None:
    folder = expand_home(path) if path else None
    if path and folder is None:
        _logger.warning(
            'environment.level_cache %r: this user has no home directory, so every map is compiled when it is needed; '
            'give another folder',
            path,
        )
    return None if folder is None else LevelCache(folder)


def engine_level(config: EnvironmentConfig, evaluation: bool = False) -> str:
    """The engine's name of a level: `contributed/dmlab30/<level>` for those of DMLab-30, others as they are.

    Raises:
      ConfigError: The level or its data set cannot be used, as far as this can be known without the engine.
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
    """Refuses a folder that would abort the engine's process, some at once, others in the middle of an episode."""
    path = config.dataset_path
    if needs_pictures and not path:
        raise ConfigError(
            f'{config.name} needs pictures: set --environment.dataset-path to the folder that docs/dmlab.md describes, '
            "or to 'dummy' for plain colours, which are another task than the paper's"
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
    """A level; observations are {'rgb': [72, 96, 3] uint8, 'instruction': [16] int32}, see `word_ids`.

    The engine has no observation after an episode's last action: a LAST timestep repeats the one before it. Its
    discount is 0, as in the released code, so that nothing is bootstrapped from it. A level without instructions, which
    no level of DMLab-30 is, has the instruction of no words.

    The engine ends its whole process when a map is missing, starts threads, and must not be forked: build this in a
    process of its own (`processes.py`), whose end also removes what a killed engine leaves in its temporary folder.

    Args:
      config: The renderer, the action repeat and the data set.
      level: The engine's name of it.
      evaluation: Levels that are held out may be played, and maps are drawn as in the paper's tests.
      cache: For compiled maps.
      seed: Of the episodes' seeds.
    Raises:
      ConfigError: the engine does not know the level, or cannot build it, or a level of DMLab-30 has no instruction.
    """

    def __init__(self, config: EnvironmentConfig, level: str, evaluation: bool, cache: LevelCache | None, seed: int):
        # The software renderer's threads would fight over the cores with those of other environments.
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
            except ValueError as error:  # Nothing else tells what a level has before the engine is built.
                if in_dmlab30 or "Unknown observation 'INSTR'" not in str(error):
                    raise
                self._lab = build(['RGB_INTERLEAVED'])
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder)
            suggestion = closest(level.removeprefix(_DMLAB30), data.dmlab30_levels(), 'dmlab/')
            remedy = 'is the build complete?' if in_dmlab30 else suggestion
            reason = ' '.join(str(error).split()).rstrip('.')
            if config.renderer == 'hardware' and 'RL API' in reason:  # The library of this renderer cannot be loaded.
                remedy = HARDWARE
            raise ConfigError(f'DeepMind Lab cannot build {config.name!r}: {reason}; {remedy}') from error

    def reset(self) -> dm_env.TimeStep:
        self._lab.reset(seed=int(self._rng.randint(2**31, dtype=np.int64)))
        self._running = True
        return dm_env.restart(self._observe())

    def step(self, action: int) -> dm_env.TimeStep:
        if not self._running:
            return self.reset()
        reward = self._lab.step(ACTIONS[action], num_steps=self._frames_per_step)
        self._running = self._lab.is_running()
        if not self._running:
            return dm_env.termination(reward, self._observation)
        return dm_env.transition(reward, self._observe())

    def observation_spec(self) -> dict[str, specs.Array]:
        return {
            'rgb': specs.Array((_HEIGHT, _WIDTH, 3), np.uint8, name='rgb'),
            INSTRUCTION: specs.BoundedArray((INSTRUCTION_LENGTH,), np.int32, 0, NUM_WORD_IDS - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        return specs.DiscreteArray(len(ACTIONS), name='action')

    def render(self) -> np.ndarray:
        return self._observation['rgb']

    def close(self) -> None:
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
    """An instruction's words as ids from 1 to 1000, [16] int32, then zeros; read-only.

    The id is a word's CRC-32 modulo 1000: the same in all processes and runs, which Python's own hash is not.
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
    """The engine's level cache as a folder: maps that were compiled once are not compiled again.

    Any number of processes may share the folder: a file appears there whole or not at all. Each file ends with a
    checksum of its key and map, because a damaged map ends the engine's process: what does not fit is removed. What
    cannot be written, as on a full disk, is compiled again. Of the processes that share the folder only one reports
    this, and each kind of trouble once.

    Raises:
      ConfigError: the folder cannot be made.
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
        """Copies what `write` was given for `key` to `pk3_path`; False if there is nothing, or it cannot be had.

        The engine dies if this is True without the file, and lets exceptions out of `reset`.
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
        """Keeps a copy of the file `pk3_path` for `key`."""
        partial = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # Somebody may have emptied the cache.
            content = Path(pk3_path).read_bytes()
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix='.partial', delete=False) as file:
                partial = Path(file.name)
                file.write(content + _checksum(key, content))
                file.flush()
                os.fsync(file.fileno())  # Otherwise a crash of the machine could leave the name without the content.
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
        """Whether this process reports: the first one, which keeps a lock for its life. All others fail alike."""
        try:
            descriptor = os.open(self._folder, os.O_RDONLY)
        except OSError:  # Without a lock, all report.
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
