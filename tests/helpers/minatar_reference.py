"""What MinAtar 1.0.15 does; python -m tests.helpers.minatar_reference writes it to `PATH`.

MinAtar is not among the pins, because its licence is GPL-3.0: python -m pip install --no-deps minatar==1.0.15.
"""

import copy
import logging
from typing import NamedTuple

import numpy as np

from tests.helpers.programs import ROOT

PATH = ROOT / 'tests' / 'environments' / 'functional' / 'minatar.npz'
GAMES = ('breakout', 'space_invaders')
NUM_STEPS = 4_000
STYLES = ((0.05, True), (0.0, True), (1.0, True), (0.0, False))
"""How episodes are played, in turn: probability of a random action, and whether the cannon shoots."""
_NOOP, _LEFT, _RIGHT, _FIRE = 0, 1, 3, 5


class Recording(NamedTuple):
    """A game, row by row; the row after the end of an episode is the start of the next one."""

    first: np.ndarray  # [N] bool, whether the row is the start of an episode; then only `side` and observation count.
    side: np.ndarray  # [N] bool, whether the ball enters from the right.
    action: np.ndarray  # [N] uint8, as the agent chose it.
    repeat: np.ndarray  # [N] bool, whether the last action was executed instead.
    reward: np.ndarray  # [N] uint8
    terminated: np.ndarray  # [N] bool
    observation: np.ndarray  # [N, 10, 10, channels] bool


def load(game: str) -> Recording:
    with np.load(PATH) as file:
        shape = file[f'{game}/shape']
        observation = np.unpackbits(file[f'{game}/observation'], count=shape.prod()).reshape(shape).astype(bool)
        return Recording(*(file[f'{game}/{name}'] for name in Recording._fields[:-1]), observation)


class Drawn(np.random.RandomState):
    """Random numbers that remember the last one between 0 and 1."""

    last = 0.0

    def rand(self, *shape):
        self.last = super().rand(*shape)
        return self.last


def record(game: str, num_steps: int, seed: int) -> Recording:
    from minatar import Environment

    environment, rows, rng = Environment(game), [], np.random.RandomState(seed)
    environment.random = environment.env.random = drawn = Drawn(seed)
    terminated, steps, episode = True, 0, -1
    while steps < num_steps:
        if terminated:
            environment.reset()
            episode += 1
            environment.last_action = _NOOP  # The package keeps that of the previous episode.
            side = getattr(environment.env, 'ball_x', 0) == 9
            rows.append((True, side, 0, False, 0, False, environment.state()))
            terminated = False
            continue
        if rng.rand() < STYLES[episode % len(STYLES)][0]:
            action = rng.randint(6)
        elif game == 'breakout':
            action = catch(environment.env, steps // 40 % 2 == 1)
        else:
            action = dodge(environment.env, rng, STYLES[episode % len(STYLES)][1])
        reward, terminated = environment.act(action)
        repeat = drawn.last < environment.sticky_action_prob
        rows.append((False, False, action, repeat, reward, terminated, environment.state()))
        steps += 1
    dtypes = (bool, bool, np.uint8, bool, np.uint8, bool, bool)
    return Recording(*(np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)))


def catch(game, edge) -> int:
    """Moves below the column where the ball comes down, or with `edge` to where it would go next."""
    game = copy.deepcopy(game)
    paddle = game.pos
    for _ in range(20):
        if game.ball_y == 8 and game.ball_dir >= 2:
            break
        game.act(_NOOP)
    ahead = 1 if game.ball_dir in (1, 2) else -1
    target = int(np.clip(game.ball_x + ahead * edge, 0, 9))
    return _NOOP if target == paddle else _LEFT if target < paddle else _RIGHT


def dodge(game, rng, may_shoot) -> int:
    """Chooses the action after which moving to one side, and shooting, brings most within a few steps."""

    def value(first: int, then: int) -> float:
        future, total = copy.deepcopy(game), 0.0
        for t in range(14):
            shoots = may_shoot and future.shot_timer == 0 and future.alien_map[:, future.pos].any()
            reward, terminated = future.act(first if t == 0 else then if t < 4 else _FIRE if shoots else _NOOP)
            if terminated:
                return total - 100 + t
            total += reward * 0.97**t
        return total

    actions = (_LEFT, _RIGHT, _NOOP, _FIRE)[: 4 if may_shoot else 3]
    values = [max(value(first, then) for then in actions) + 0.01 * rng.rand() for first in actions]
    return actions[int(np.argmax(values))]


def main() -> None:
    logging.disable()  # MinAtar warns that it cannot draw.
    arrays = {}
    for seed, game in enumerate(GAMES):
        recording = record(game, NUM_STEPS, seed)
        arrays |= {f'{game}/{name}': value for name, value in recording._asdict().items()}
        arrays[f'{game}/shape'] = np.array(recording.observation.shape)
        arrays[f'{game}/observation'] = np.packbits(recording.observation)
        returns = [part.sum() for part in np.split(recording.reward.astype(int), np.flatnonzero(recording.first))]
        print(game, f'{recording.first.sum()} episodes, returns up to {max(returns)}')
    np.savez_compressed(PATH, **arrays)


if __name__ == '__main__':
    main()
