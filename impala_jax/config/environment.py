"""Configuration of the environment."""

from __future__ import annotations

import dataclasses
from typing import Literal

from impala_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """The environment, and how actors step it."""

    name: str = 'catch'
    """Environment: `catch`, `catch_memory`, `delayed_bandit`, `bsuite/catch/0`, `atari/pong`, `dmlab/rooms_watermaze`,
    `gymnasium/CartPole-v1`, `gymnasium/minigrid:MiniGrid-Empty-5x5-v0` (imports `minigrid` first), or a factory
    `module:function` that is called as `function(seed=...)` and returns a dm_env.Environment or a gymnasium.Env. As
    pure functions in JAX: `jax/minatar/breakout`, `gymnax/Breakout-MinAtar`, or `jax/module:function`. Also a suite:
    `atari57`, `dmlab30` or `minisuite`, whose tasks are distributed evenly over the environments of all actors."""
    preset: Literal['paper', 'machado'] = 'paper'
    """Atari only. `paper`: 1 to 30 initial no-ops, the minimal action set, and training episodes that end with a life.
    `machado` (Machado et al., 2018): sticky actions with probability 0.25, all 18 actions, and episodes that end with
    the game."""
    full_action_space: bool | None = None
    """Atari only: whether to use all 18 actions instead of the game's minimal set. None: as in the preset; all 18 in
    `atari57`."""
    action_repeat: int | None = None
    """Environment frames per agent step; budgets and metrics count frames. None: 4 for Atari and DeepMind Lab, else 1.
    For a factory it states what the environment itself does."""
    max_failures: int = 3
    """Number of failures of an environment, without a finished episode in between, that ends the run."""
    processes: int = 0
    """Worker processes per actor, over which it distributes its environments. 0: no processes for the built-in
    environments, which are faster inside the actor; one process per environment for DeepMind Lab; and one per core, but
    at most one per environment, for others."""
    renderer: Literal['software', 'hardware'] = 'software'
    """DeepMind Lab only: rendering on the CPU (`software`) or a GPU (`hardware`)."""
    level_cache: str = '~/.cache/impala_jax/dmlab_levels'
    """DeepMind Lab only: folder for compiled maps, common to all processes and runs; '' for no cache."""
    dataset_path: str = ''
    """DeepMind Lab only: folder of the images that two psychlab levels of DMLab-30 need. `dummy` uses plain colours
    instead, which changes the task."""

    def __post_init__(self):
        require(bool(self.name), 'environment.name is empty; try --environment.name catch')
        require_positive('environment', max_failures=self.max_failures)
        if self.action_repeat is not None:
            require_positive('environment', action_repeat=self.action_repeat)
        require(self.processes >= 0, f'environment.processes must be 0 or more, got {self.processes}')
        require(
            not (self.processes and self.name.startswith('dmlab/')),
            f'environment.processes {self.processes}: each environment of DeepMind Lab has its own process; use 0',
        )

    @property
    def is_functional(self) -> bool:
        """Whether the environment consists of pure functions in JAX."""
        return self.name.startswith(('jax/', 'gymnax/'))

    @property
    def frames_per_step(self) -> int:
        """Number of environment frames per agent step."""
        if self.action_repeat is not None:
            return self.action_repeat
        return 4 if self.name in ('atari57', 'dmlab30') or self.name.startswith(('atari/', 'dmlab/')) else 1
