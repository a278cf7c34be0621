"""A stand-in for DeepMind Lab's Python module: its interface and its pitfalls, as on a real build, but no game.

Put this folder at the front of `sys.path` (worker processes get their parent's) or of PYTHONPATH. What the real module
refuses, misreads, dies of or hangs at, this one does too, so that code which passes here keeps to the interface:

* wrong types and values raise, an action that is not contiguous is misread in silence (as no action);
* after an episode's end there are no observations; frames that `num_steps` skips count, though they were not played;
* True from the cache's `fetch` without the file, a missing or damaged map, a `datasetPath` without the pictures and a
  reset after `close` end the process;
* children that are forked from a process that holds a Lab which was reset hang;
* levels outside DMLab-30 may have no INSTR;
* the temporary folder is used as it is and left behind.

Every level is a corridor: moving forward is rewarded by 1 a frame, firing costs 0.5 a frame. An episode lasts 42
frames, which four do not divide, so that its last step ends early.

Environment variables make it as slow and as noisy as the real one, in all processes that inherit them:

| variable | effect |
|---|---|
| `DMLAB_STAND_IN_RESET_S` | compiling a map in `reset` takes so many seconds; the level cache's maps take none |
| `DMLAB_STAND_IN_STEP_S` | a step takes so many seconds now and then, as where a map is loaded inside an episode |
| `DMLAB_STAND_IN_STEP_EVERY` | every how many steps of a Lab (default 10) |
| `DMLAB_STAND_IN_HARDWARE` | hardware rendering fails: `no library` for it, or `no GPU` |
| `DMLAB_STAND_IN_WARNS` | if not empty, importing the module warns as the real wheel does |

As in the real module, a shell with a child of its own does that work. Both inherit every file descriptor that is
inheritable, and outlive a worker that is killed. Meanwhile the call keeps the interpreter's lock: no other thread of
the process runs, and Python's signal handlers run only afterwards.
"""

import ctypes
import hashlib
import os
import signal
import tempfile
import warnings
import weakref
from pathlib import Path

import numpy as np

EPISODE_FRAMES = 42
_DMLAB30 = (
    'rooms_collect_good_objects_train rooms_collect_good_objects_test rooms_exploit_deferred_effects_train '
    'rooms_exploit_deferred_effects_test rooms_select_nonmatching_object rooms_watermaze rooms_keys_doors_puzzle '
    'language_select_described_object language_select_located_object language_execute_random_task '
    'language_answer_quantitative_question lasertag_one_opponent_small lasertag_three_opponents_small '
    'lasertag_one_opponent_large lasertag_three_opponents_large natlab_fixed_large_map natlab_varying_map_regrowth '
    'natlab_varying_map_randomized skymaze_irreversible_path_hard skymaze_irreversible_path_varied '
    'psychlab_arbitrary_visuomotor_mapping psychlab_continuous_recognition psychlab_sequential_comparison '
    'psychlab_visual_search explore_object_locations_small explore_object_locations_large '
    'explore_obstructed_goals_small explore_obstructed_goals_large explore_goal_locations_small '
    'explore_goal_locations_large explore_object_rewards_few explore_object_rewards_many'
).split()
_WITHOUT_INSTRUCTION = {'tests/empty_room_test', 'demos/random_maze'}
# Levels outside DMLab-30, one of them without its map.
_LEVELS = {f'contributed/dmlab30/{name}' for name in _DMLAB30} | {'seekavoid_arena_01', 'tests/missing_map'}
_LEVELS |= _WITHOUT_INSTRUCTION
_HELD_OUT = ('rooms_collect_good_objects_test', 'rooms_exploit_deferred_effects_test')
_NEED_DATASET = ('psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition')
_SETTINGS = {
    *('width', 'height', 'fps', 'mixerSeed', 'randomSeed', 'logLevel', 'allowHoldOutLevels', 'datasetPath'),
}
_ACTIONS = (
    ('LOOK_LEFT_RIGHT_PIXELS_PER_FRAME', -512, 512),
    ('LOOK_DOWN_UP_PIXELS_PER_FRAME', -512, 512),
    ('STRAFE_LEFT_RIGHT', -1, 1),
    ('MOVE_BACK_FORWARD', -1, 1),
    ('FIRE', 0, 1),
    ('JUMP', 0, 1),
    ('CROUCH', 0, 1),
)
_PICTURES = 2400
_was_reset = weakref.WeakSet()
_libc = ctypes.PyDLL(None)  # Unlike CDLL, it keeps the interpreter's lock.
_libc.popen.restype = ctypes.c_void_p
_libc.pclose.argtypes = (ctypes.c_void_p,)
_libc.fread.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
os.register_at_fork(after_in_child=lambda: signal.pause() if len(_was_reset) else None)

if os.environ.get('DMLAB_STAND_IN_WARNS'):
    for category, text in {
        DeprecationWarning: 'the imp module is deprecated in favour of importlib',
        UserWarning: 'pkg_resources is deprecated as an API.\nRefrain from using it, or pin to Setuptools<81.',
        ImportWarning: '_SixMetaPathImporter.find_spec() not found; falling back to find_module()',
    }.items():
        warnings.warn(text, category, stacklevel=2)


class Lab:
    """See the module; more on the real one in docs/users/python_api.md of its repository."""

    def __init__(self, level, observations, config=None, renderer='software', level_cache=None, temp_folder=None):
        config = {} if config is None else config
        if type(level) is not str:
            raise TypeError(f'level must be str, not {type(level).__name__}')
        if type(observations) is not list:
            raise TypeError(f'observations must be list, not {type(observations).__name__}')
        for key, value in config.items():
            if type(key) is not str or type(value) is not str:
                raise TypeError(f'config must be of str, not {key!r}: {value!r}')
            if key not in _SETTINGS:
                raise RuntimeError(f'Invalid setting. Key: "{key}"')
        if renderer not in ('software', 'hardware'):
            raise RuntimeError(f'Invalid renderer! Actual: "{renderer}"; Expected: "hardware" or "software"')
        self._failure = os.environ.get('DMLAB_STAND_IN_HARDWARE', '') if renderer == 'hardware' else ''
        if self._failure == 'no library':
            raise RuntimeError('Failed to connect RL API')
        if level not in _LEVELS:
            raise RuntimeError(f'Level not found: "{level}"')
        self._level = level.rpartition('/')[2]
        if self._level in _HELD_OUT and config.get('allowHoldOutLevels') != 'true':
            raise RuntimeError(f'Level "{level}" is held out: allowHoldOutLevels must be "true"')
        if self._level in _NEED_DATASET:
            if 'datasetPath' not in config:
                raise RuntimeError(f'Level "{level}" needs datasetPath')
            if config['datasetPath'] != 'dummy' and not os.path.isdir(config['datasetPath']):
                os.abort()
        self._pictures = config['datasetPath'] if self._level in _NEED_DATASET else 'dummy'
        self._width, self._height = int(config.get('width', 320)), int(config.get('height', 240))
        if self._width % 4:
            raise RuntimeError('width must be a multiple of 4')
        shapes = {
            'RGB_INTERLEAVED': ((self._height, self._width, 3), np.uint8),
            'RGB': ((3, self._height, self._width), np.uint8),
            'INSTR': ((), str),
        }
        if level in _WITHOUT_INSTRUCTION:
            del shapes['INSTR']
        for name in observations:
            if name not in shapes:
                raise ValueError(f"Unknown observation '{name}'.")
        self._spec = [{'name': name, 'shape': shapes[name][0], 'dtype': shapes[name][1]} for name in observations]
        self._mixer_seed = config.get('mixerSeed', '0')
        self._cache = level_cache
        self._folder = Path(temp_folder or tempfile.mkdtemp(prefix='dmlab_temp_folder_'))
        (self._folder / 'engine').write_text(str(os.getpid()))
        self._properties = {}
        self._episode = -1
        self._seed = self._frames = self._counted = self._steps = 0
        self._running = self._closed = False

    def __reduce__(self):
        raise TypeError(f'cannot pickle {type(self).__name__!r} object')

    def reset(self, episode=-1, seed=None):
        if self._closed:
            signal.raise_signal(signal.SIGSEGV)
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise ValueError(f"'seed' must be an int below 2**63, not {seed!r}")
        if type(episode) is not int:
            raise ValueError(f"'episode' must be an int, not {episode!r}")
        if self._failure == 'no GPU':
            print('Failed to create EGL display for device index 0!', flush=True)
            os._exit(3)
        if self._level == 'missing_map':
            print("ERROR: Couldn't load maps/missing_map.bsp", flush=True)
            os._exit(1)
        self._episode = self._episode + 1 if episode < 0 else episode
        self._seed = int.from_bytes(os.urandom(4), 'little') if seed is None else seed
        self._load_map()
        if self._pictures != 'dummy' and not os.path.isfile(f'{self._pictures}/{self._seed % _PICTURES + 1:04d}.png'):
            os.abort()
        self._frames = self._counted = 0
        self._running = True
        _was_reset.add(self)
        return True

    def step(self, action, num_steps=1):
        self._require(self._running, 'Environment in wrong status for call to step()')
        if not isinstance(action, np.ndarray):
            raise TypeError(f'action must be numpy.ndarray, not {type(action).__name__}')
        if action.dtype != np.intc or action.shape != (len(_ACTIONS),):
            raise ValueError(f'action must be 7 x intc, not {action.shape} x {action.dtype}')
        if type(num_steps) is not int:
            raise TypeError(f'num_steps must be int, not {type(num_steps).__name__}')
        if num_steps < 1:
            raise ValueError(f"'num_steps' must be positive, got {num_steps}")
        if not action.flags.c_contiguous:
            action = np.zeros_like(action)
        for value, (name, low, high) in zip(action.tolist(), _ACTIONS, strict=True):
            if not low <= value <= high:
                raise ValueError(f'action {name} must lie in [{low}, {high}], got {value}')
        self._steps += 1
        if self._steps % int(os.environ.get('DMLAB_STAND_IN_STEP_EVERY', '10')) == 0:
            _work(os.environ.get('DMLAB_STAND_IN_STEP_S', ''))
        played = min(num_steps, EPISODE_FRAMES - self._frames)
        self._frames += played
        self._counted += num_steps
        self._running = self._frames < EPISODE_FRAMES
        return float(played * (action[3] - 0.5 * action[4]))

    def is_running(self):
        return self._running

    def num_steps(self):
        return self._counted

    def observations(self):
        self._require(self._running, 'Environment in wrong status for call to observations()')
        return {entry['name']: self._observe(entry['name']) for entry in self._spec}

    def observation_spec(self):
        return [dict(entry) for entry in self._spec]

    def action_spec(self):
        return [{'name': name, 'min': low, 'max': high} for name, low, high in _ACTIONS]

    def events(self):
        self._require(not self._closed, 'Environment closed')
        return []

    def properties(self, key=''):
        return {name: 'rw' for name in self._properties if name.startswith(key)}

    def read_property(self, key):
        return self._properties[key]

    def write_property(self, key, value):
        self._properties[key] = value

    def close(self):
        self._closed, self._running = True, False
        _was_reset.discard(self)

    def _observe(self, name):
        if name == 'INSTR':
            if not self._level.startswith('language_'):
                return ''
            return f'Pick the {"red" if self._frames < EPISODE_FRAMES // 2 else "blue"} object {self._seed % 5}'
        text = f'{self._level} {self._mixer_seed} {self._episode} {self._seed} {self._frames}'
        shape = next(entry['shape'] for entry in self._spec if entry['name'] == name)
        picture = np.empty(shape, np.uint8)
        picture[...] = hashlib.sha256(text.encode()).digest()[0]
        return picture

    def _load_map(self):
        """Compiles the map, unless the cache has it; as in some real levels, there are but a few maps."""
        key = f'{self._level} {self._mixer_seed} {self._seed % 3}'
        path = self._folder / 'map.pk3'
        path.unlink(missing_ok=True)
        if self._cache is not None and self._cache.fetch(key, str(path)):
            if not path.is_file():
                os.abort()
            if path.read_bytes() != f'map of {key}'.encode() * 1000:
                print(f"ERROR: Couldn't load maps/{self._level}.bsp", flush=True)
                os._exit(1)
            return
        _work(os.environ.get('DMLAB_STAND_IN_RESET_S', ''))
        path.write_text(f'map of {key}' * 1000)
        (self._folder / 'compiled').write_text(str(self._episode))
        if self._cache is not None:
            self._cache.write(key, str(path))

    @staticmethod
    def _require(condition, message):
        if not condition:
            raise RuntimeError(message)


def _work(seconds):
    """A shell and its child take so many seconds; '' for no work."""
    if not seconds:
        return
    # More than one command, so that every shell starts a process for the first.
    pipe = _libc.popen(f'sleep {float(seconds)}; echo done'.encode(), b'r')
    output = ctypes.create_string_buffer(4096)
    while _libc.fread(output, 1, len(output), pipe):
        pass
    _libc.pclose(pipe)
