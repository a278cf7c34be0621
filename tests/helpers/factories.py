"""Environment factories for tests, by name: `tests.helpers.factories:scripted`."""

from __future__ import annotations

import glob
import os
import time
from typing import Any

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.environments.catch import Catch

GO_ON, TERMINATE, TRUNCATE, RAISE, DIE, HANG = range(6)


class Scripted(dm_env.Environment):
    """Does what the action says; the reward is the number of the step in the episode, and the observation shows it."""

    num_actions = 6

    def __init__(self, seed: int):
        self.seed = seed
        self.count = 0
        self.rng = np.random.RandomState(seed)

    def reset(self):
        self.count = 0
        return dm_env.restart(self.observe())

    def step(self, action):
        self.count += 1
        if action == RAISE:
            raise ZeroDivisionError('as the action said')
        if action == DIE:
            os._exit(7)
        if action == HANG:
            time.sleep(600)
        if action == TERMINATE:
            return dm_env.termination(float(self.count), self.observe())
        if action == TRUNCATE:
            return dm_env.truncation(float(self.count), self.observe())
        return dm_env.transition(float(self.count), self.observe())

    def observe(self):
        return {
            'count': np.array(self.count, np.int64),
            'pair': (np.array([self.seed % 1000, self.rng.rand()], np.float64), np.array([True, False])),
            'picture': np.full((4, 6, 3), self.count, np.uint8),
        }

    def observation_spec(self):
        return {
            'count': specs.Array((), np.int64),
            'pair': (specs.Array((2,), np.float64), specs.Array((2,), bool)),
            'picture': specs.Array((4, 6, 3), np.uint8),
        }

    def action_spec(self):
        return specs.DiscreteArray(self.num_actions)


def scripted(seed: int) -> dm_env.Environment:
    return Scripted(seed)


def unpicklable(seed: int) -> dm_env.Environment:
    environment = Scripted(seed)
    environment.hook = (i for i in ())  # pyright: ignore[reportAttributeAccessIssue]
    return environment


def raises_when_built(seed: int) -> dm_env.Environment:
    raise OSError('no such level')


def raises_when_another_learns(seed: int) -> dm_env.Environment:
    """Cannot be built, once a file of metrics that METRICS, a glob pattern, names has rows."""
    deadline = time.monotonic() + 60
    while not any(os.path.getsize(path) for path in glob.glob(os.environ['METRICS'])):
        assert time.monotonic() < deadline, f'no rows in {os.environ["METRICS"]}'
        time.sleep(0.02)
    return raises_when_built(seed)


def different(seed: int) -> dm_env.Environment:
    """As many actions as chance has it."""
    environment = Scripted(seed)
    environment.num_actions = 2 + seed % 1000
    return environment


def wrong_shape(seed: int) -> dm_env.Environment:
    """The observations are not what the spec says."""
    environment = Scripted(seed)
    environment.observation_spec = lambda: {  # pyright: ignore[reportAttributeAccessIssue]
        **Scripted.observation_spec(environment),
        'count': specs.Array((3,), np.int64),
    }
    return environment


def continuous(seed: int) -> dm_env.Environment:
    environment = Scripted(seed)
    environment.action_spec = lambda: specs.BoundedArray((2,), np.float32, -1, 1)  # pyright: ignore
    return environment


def not_an_environment(seed: int) -> int:
    return seed


def draws(seed: int) -> dm_env.Environment:
    """Catch whose pictures are as the variable PICTURES says."""

    class Drawn(Catch):
        render_fps = 7

        def render(self) -> Any:
            board = super().render()
            grey = np.full((200, 150), 80, np.uint8)
            kind = os.environ.get('PICTURES', 'board')
            if kind == 'raises':
                raise ZeroDivisionError('no light')
            return {
                'board': board,
                'none': None,
                'text': 'a board\nof two lines',
                'list': [grey],
                'grey': grey,
                'rgba': np.repeat(grey[..., None], 4, axis=-1),
                'floats': np.full((200, 150, 3), 0.5),
                'wide_floats': np.full((200, 150, 3), 1.5),
                'integers': np.full((200, 150, 3), 80),
                'flags': grey > 0,
                'vector': np.zeros(3, np.uint8),
                'growing': np.full((200 + 10 * self._ball_row, 150, 3), 80, np.uint8),
            }[kind]

    return Drawn(seed=seed)


def fails_and_notes_when(seed: int) -> dm_env.Environment:
    """Catch whose every step fails; the time of the first failure goes to the file that FAILURE_TIME names."""

    class Failing(Catch):
        def step(self, action):
            try:
                with open(os.environ['FAILURE_TIME'], 'x') as file:
                    file.write(str(time.time()))
            except FileExistsError:
                pass
            raise ZeroDivisionError('the emulator is on fire')

    return Failing(seed=seed)


def fails_where_told(seed: int) -> dm_env.Environment:
    """Catch, whose every step fails after the first 1,000 of its process where the environment has FAILS_HERE."""

    class FailingLater(Catch):
        def step(self, action):
            _steps.append(1)
            if 'FAILS_HERE' in os.environ and len(_steps) > 1000:
                raise ZeroDivisionError('the emulator is on fire')
            return super().step(action)

    return FailingLater(seed=seed)


_steps: list[int] = []


class Flaky(Catch):
    """Catch, whose every step fails after the first FLAKY_AFTER of its process, where the environment has that."""

    def step(self, action):
        _steps.append(1)
        if len(_steps) > float(os.environ.get('FLAKY_AFTER', 'inf')):
            raise ZeroDivisionError('the emulator is on fire')
        return super().step(action)


def flaky(seed: int) -> dm_env.Environment:
    return Flaky(seed=seed)


def rewards_nan(seed: int) -> dm_env.Environment:
    """Catch whose rewards are not numbers."""

    class NaN(Catch):
        def step(self, action):
            return super().step(action)._replace(reward=float('nan'))

    return NaN(seed=seed)


def rewards_huge(seed: int) -> dm_env.Environment:
    """Catch whose rewards are finite, and whose squares are not."""

    class Huge(Catch):
        def step(self, action):
            return super().step(action)._replace(reward=1e30)

    return Huge(seed=seed)


class Shuffled(dm_env.Environment):
    """The right action is the position; the observation's dict has another order at each step."""

    def __init__(self, seed: int):
        self.rng = np.random.RandomState(seed)
        self.num_steps = self.position = 0

    def observe(self):
        self.position = self.rng.randint(2)
        values = {'position': self.position, 'velocity': self.rng.randint(2)}
        keys = sorted(values, reverse=bool(self.num_steps % 2))
        return {key: np.array([values[key]], np.float32) for key in keys}

    def reset(self):
        self.num_steps = 0
        return dm_env.restart(self.observe())

    def step(self, action):
        reward = float(action == self.position)
        self.num_steps += 1
        end = dm_env.termination if self.num_steps == 10 else dm_env.transition
        return end(reward, self.observe())

    def observation_spec(self):
        return {'position': specs.Array((1,), np.float32), 'velocity': specs.Array((1,), np.float32)}

    def action_spec(self):
        return specs.DiscreteArray(2)


def shuffled(seed: int) -> dm_env.Environment:
    return Shuffled(seed)
