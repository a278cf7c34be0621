"""Atari games, emulated and preprocessed in C++ threads by ale-py's `AtariVectorEnv`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from impala_jax.config import ConfigError, EnvironmentConfig, closest
from impala_jax.environments import base
from impala_jax.seeds import derived_seed
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, StepInfo, TimeStep

_MAX_FRAMES = 108_000  # A game is truncated after half an hour of play.
_STACK = 4
_NOOP = 0
# Two-player games: ale-py has their ROMs, but opening one ends the process.
_NOT_EMULATED = {'combat', 'joust', 'maze_craze', 'warlords'}
_FULL_ACTION_SPACE = (
    'NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE UPRIGHTFIRE '
    'UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE'
).split()


def games() -> list[str]:
    """Lists the games that ale-py plays, by names such as `space_invaders`.

    Raises:
      ConfigError: ale-py or gymnasium is not installed.
    """
    try:
        import gymnasium  # noqa: F401 - required by ale_py.vector_env
        from ale_py import roms
    except ImportError as error:
        raise ConfigError(f"Atari needs ale-py and gymnasium: pip install 'impala_jax[atari]' ({error})") from error
    return sorted(set(roms.get_all_rom_ids()) - _NOT_EMULATED)


def game_name(name: str) -> str:
    """Returns ale-py's name of a game, ignoring case and underscores in `name`.

    Raises:
      ConfigError: The game is unknown; the message suggests the closest names.
    """
    known = {game.replace('_', ''): game for game in games()}
    plain = re.sub('[^a-z0-9]', '', name.lower())
    if plain not in known:
        raise ConfigError(f'unknown Atari game {name!r}; {closest(plain, known, "atari/")}')
    return known[plain]


class _NoopStarts:
    """An AtariVectorEnv whose games begin with 1 to 30 no-ops, uniformly distributed; ale-py's range includes 0.

    Args:
      emulator: AtariVectorEnv with `noop_max` 31.
    """

    def __init__(self, emulator: Any):
        self._emulator = emulator
        self._game_over = np.zeros(emulator.num_envs, bool)

    def reset(self, seed: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See `AtariVectorEnv.reset`."""
        self._game_over[:] = False
        return self._drawn_again(np.ones_like(self._game_over), *self._emulator.reset(seed=seed))

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """See `AtariVectorEnv.step`."""
        frames, rewards, terminated, truncated, info = self._emulator.step(actions)
        frames, info = self._drawn_again(self._game_over, frames, info)
        self._game_over = terminated | truncated
        return frames, rewards, terminated, truncated, info

    def _drawn_again(self, new_game: np.ndarray, frames: np.ndarray, info: dict[str, np.ndarray]):
        """Restarts new games that began with 0 no-ops; returns the resulting `frames` and `info`."""
        while (without := new_game & (info['episode_frame_number'] == 0)).any():
            frames, info = self._emulator.reset(options={'reset_mask': without})
        return frames, info


class AtariVectorEnvironment:
    """A `VectorEnvironment` of one Atari game.

    Observations are [84, 84, 4] uint8: greyscale, the maximum of the last two frames, four frames with the newest last.

    In training with the preset `paper`, an episode ends when a life is lost, but the game continues: the next episode
    begins one no-op later in the same game, and `episode_return` is the return of the whole game. (AtariVectorEnv's
    own `episodic_life` begins a new game at each lost life, so only first lives would ever be played.)

    A game is truncated after half an hour of play, or after `max_episode_steps` agent steps if that is sooner.

    Args:
      config: The environment's name and settings.
      num_envs: Number of games played together.
      seed: Seed from which each game's own seed is derived.
      evaluation: Whether episodes are whole games with every preset.
      max_episode_steps: Number of agent steps after which a game is truncated; None for half an hour of play only.

    Raises:
      ConfigError: The game is unknown, or ale-py is not installed.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        num_envs: int,
        seed: int,
        *,
        evaluation: bool = False,
        max_episode_steps: int | None = None,
    ):
        game = game_name(config.name.removeprefix('atari/'))
        from ale_py.vector_env import AtariVectorEnv

        max_frames = _MAX_FRAMES
        if max_episode_steps is not None:
            max_frames = min(max_frames, max_episode_steps * config.frames_per_step)
        paper = config.preset == 'paper'
        full_action_space = not paper if config.full_action_space is None else config.full_action_space
        self.num_envs = num_envs
        self._episodes_are_lives = paper and not evaluation
        self._seeds = np.array([derived_seed(seed, i) for i in range(num_envs)])
        self._emulator: Any = AtariVectorEnv(
            game,
            num_envs,
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=0.0 if paper else 0.25,
            full_action_space=full_action_space,
            stack_num=1,  # Stacked in this class instead: channels last, and only the new frame is copied.
            frameskip=config.frames_per_step,
            noop_max=31 if paper else 0,  # ale-py's bound is exclusive.
            reward_clipping=False,
            use_fire_reset=False,
        )
        own = [action.name for action in self._emulator.ale.get_action_set()]
        if paper:
            self._emulator = _NoopStarts(self._emulator)
        names = _FULL_ACTION_SPACE if full_action_space else own
        # Skiing has no fire button: actions with FIRE are mapped to those without.
        self._own_actions = np.array(
            [own.index(name if name in own else name.replace('FIRE', '') or 'NOOP') for name in names]
        )
        observation = ArraySpec((84, 84, _STACK), np.dtype(np.uint8), stacked=True)
        self.spec = EnvironmentSpec(observation, len(names), render_fps=60 / config.frames_per_step)
        self._stack = np.zeros((num_envs, 84, 84, _STACK), np.uint8)
        self._lives = np.zeros(num_envs, np.int32)
        self._returns = np.zeros(num_envs, np.float64)
        self._game_over = np.zeros(num_envs, bool)  # The next step starts a new game.
        self._life_lost = np.zeros(num_envs, bool)  # The next step starts a new episode in the same game.
        self._started = False

    def reset(self) -> TimeStep:
        """See `VectorEnvironment.reset`."""
        n = self.num_envs
        frames, info = self._emulator.reset(seed=None if self._started else self._seeds)
        self._started = True
        self._push(frames, np.ones(n, bool))
        self._lives = info['lives']
        self._returns[:] = 0
        self._game_over, self._life_lost = np.zeros(n, bool), np.zeros(n, bool)
        zeros = np.zeros(n, np.float32)
        return TimeStep(np.full(n, FIRST, np.int32), zeros, np.ones(n, np.float32), self._stack, np.zeros(n, np.int32))

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """See `VectorEnvironment.step`."""
        # An invalid action kills a thread of AtariVectorEnv, which then waits forever.
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        new_game = self._game_over
        first = new_game | self._life_lost
        frames, rewards, terminated, truncated, info = self._emulator.step(
            np.where(self._life_lost, _NOOP, self._own_actions[actions])
        )
        self._push(frames, new_game)

        over = terminated | truncated
        lives = info['lives']
        lost = (lives < self._lives) & (lives > 0) & ~over & ~first if self._episodes_are_lives else np.zeros_like(over)
        self._lives = lives
        self._returns += rewards
        episode_returns = np.where(over, self._returns, 0).astype(np.float32)
        self._returns[over] = 0
        # A game that ends in the no-op after a lost life ends with a FIRST timestep, followed by another FIRST.
        self._game_over, self._life_lost = over, lost
        last = (over | lost) & ~first

        timestep = TimeStep(
            np.select([first, last], [FIRST, LAST], MID).astype(np.int32),
            np.where(first, 0, rewards).astype(np.float32),
            np.where(last & ~truncated, 0, 1).astype(np.float32),
            self._stack,
            np.where(first, 0, actions).astype(np.int32),
        )
        return timestep, StepInfo(episode_returns, over, np.zeros(self.num_envs, np.int32))

    def get_state(self) -> bytes:
        """Raises NotImplementedError: AtariVectorEnv has no interface for saving its state."""
        raise NotImplementedError('AtariVectorEnv cannot be saved: a resumed run starts new games')

    def set_state(self, state: bytes) -> None:
        """Raises NotImplementedError, as `get_state` does."""
        raise NotImplementedError('AtariVectorEnv cannot be restored: a resumed run starts new games')

    def render(self) -> np.ndarray:
        """Returns the newest frame of the agent's observation, with the aspect ratio of the screen."""
        return base.picture(self._stack[0], height=416, width=320)

    def close(self) -> None:
        """See `VectorEnvironment.close`."""
        self._emulator = None

    def _push(self, frames: np.ndarray, new_game: np.ndarray) -> None:
        """Appends the newest frames, [N, 1, 84, 84], to a copy of the stack; older frames are zero in new games."""
        stack = np.empty_like(self._stack)
        # Four stacked bytes form one little-endian integer; the shift drops the oldest, 3x faster than four copies.
        np.right_shift(self._stack.view('<u4'), 8, out=stack.view('<u4'))
        stack[..., -1] = frames[:, 0]
        if new_game.any():
            stack[new_game, ..., :-1] = 0
        self._stack = stack
