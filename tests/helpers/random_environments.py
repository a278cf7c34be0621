"""Environments drawn at random, by name: `tests.helpers.random_environments:e17`.

Number 17 has a random nested observation space and random ends, and some of what it returns is not what its space says:
other dtypes, lists, values that do not fit, numbers that are not finite, dicts in another order, missing or unknown
keys. All that it returns goes to a file in the folder that the variable RECORDS names, before it is returned.
"""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.float32, np.float64, np.bool_]


def __getattr__(name: str) -> Any:
    if name[0] == 'e' and name[1:].isdecimal():
        return functools.partial(RandomEnvironment, int(name[1:]))
    raise AttributeError(name)


def random_space(rng: np.random.RandomState, depth: int = 0) -> spaces.Space:
    kind = rng.choice(['box', 'binary', 'multi', 'dict', 'tuple'] if depth < 2 else ['box', 'binary', 'multi'])
    if kind == 'binary':
        return spaces.MultiBinary(int(rng.randint(1, 4)))
    if kind == 'multi':
        return spaces.MultiDiscrete(rng.randint(2, 6, size=2))
    if kind == 'dict':
        keys = rng.permutation(['a', 'b', 'c', 'd'])[: rng.randint(1, 4)]
        return spaces.Dict({str(key): random_space(rng, depth + 1) for key in keys})
    if kind == 'tuple':
        return spaces.Tuple([random_space(rng, depth + 1) for _ in range(rng.randint(1, 3))])
    dtype = np.dtype(DTYPES[rng.randint(len(DTYPES))])
    shape = tuple(rng.randint(1, 4, size=rng.randint(0, 3)).tolist())
    low, high = (0, 1) if dtype.kind == 'b' else (0, 100) if dtype.kind in 'ui' else (-2, 2)
    return spaces.Box(low, high, shape, dtype)


def lie(rng: np.random.RandomState, value: Any) -> Any:
    """What an environment with a mistake might return for a leaf's `value`."""
    array = np.array(value)
    which = rng.randint(9)
    if which < 4:
        return array.astype([np.float64, np.int64, np.float32, np.uint8][which])
    if which == 4:
        return array.tolist()
    array = array.astype(np.float64)
    array.reshape(-1)[rng.randint(array.size)] = [0.5, 300.0, rng.choice([np.nan, np.inf]), -1.0][which - 5]
    return array


class RandomEnvironment(gymnasium.Env):
    def __init__(self, number: int, seed: int):
        structure = np.random.RandomState(number)
        self.honest = structure.rand() < 0.3
        self.observation_space = random_space(structure)
        self.action_space = spaces.Discrete(3)
        self.observation_space.seed(seed)
        self.rng = np.random.RandomState([number, seed])
        self.record = Path(os.environ['RECORDS']) / f'{number}-{seed}'

    def reset(self, *, seed=None, options=None):
        observation = self.observe(self.observation_space)
        self.write(('reset', observation))
        return observation, {}

    def step(self, action):
        observation, reward = self.observe(self.observation_space), float(self.rng.randint(-3, 4))
        if not self.honest and self.rng.rand() < 0.02:
            reward = float(self.rng.choice([np.nan, np.inf, 1e300]))
        terminated, truncated = bool(self.rng.rand() < 0.1), bool(self.rng.rand() < 0.1)
        self.write(('step', int(action), observation, reward, terminated, truncated))
        return observation, reward, terminated, truncated, {}

    def observe(self, space):
        if isinstance(space, spaces.Dict):
            keys = self.rng.permutation(list(space.spaces))
            observation = {str(key): self.observe(space.spaces[str(key)]) for key in keys}
            if not self.honest and self.rng.rand() < 0.02:
                observation.pop(str(keys[0]))
            if not self.honest and self.rng.rand() < 0.02:
                observation['unknown'] = 0.0
            return observation
        if isinstance(space, spaces.Tuple):
            return tuple(self.observe(part) for part in space.spaces)
        value = space.sample()
        return lie(self.rng, value) if not self.honest and self.rng.rand() < 0.1 else value

    def write(self, event):
        with self.record.open('ab') as file:
            pickle.dump(event, file)


def records(folder: Path, number: int) -> list[list[Any]]:
    """The events of each environment with this number, in the order that they were written."""
    found = []
    for path in folder.glob(f'{number}-*'):
        events = []
        with path.open('rb') as file:
            while file.peek(1):
                events.append(pickle.load(file))
        found.append(events)
    return found
