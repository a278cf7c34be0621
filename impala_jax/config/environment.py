"""Configuration of the task."""

from __future__ import annotations

import dataclasses
from typing import Literal

from impala_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """Which task, and how it is stepped."""

    name: str = 'catch'
    """`catch`, `catch_memory`, `delayed_bandit`, `bsuite/catch/0`, `atari/pong`, `dmlab/rooms_watermaze`,
    `gymnasium/CartPole-v1`, `gymnasium/minigrid:MiniGrid-Empty-5x5-v0` (after importing `minigrid`), or a factory
    `module:function` that is called as `function(seed=...)` and returns a dm_env.Environment or a gymnasium.Env; or one
    of the suites `atari57`, `dmlab30` and `minisuite`, whose tasks are spread evenly over all actors' environments."""
    preset: Literal['paper', 'machado'] = 'paper'
    """Atari only. `paper`: 1 to 30 no-ops at the start, the minimal action set, episodes end at life loss in training.
    `machado` (Machado et al., 2018): sticky actions with probability .25, all 18 actions, episodes are games."""
    full_action_space: bool | None = None
    """Atari only: all 18 actions, or the game's minimal set. None: as the preset has it; all 18 in `atari57`."""
    action_repeat: int | None = None
    """Environment frames in one agent step; all budgets and metrics count frames. None: 4 on Atari and DeepMind Lab, 1
    elsewhere. For a factory it only states what the environment itself does."""
    max_failures: int = 3
    """An environment that fails this many times without finishing an episode in between ends the run."""
    processes: int = 0
    """Worker processes an actor spreads its environments over. 0: none for the built-in environments (which step
    faster inside the actor), one an environment for DeepMind Lab, and as many as there are cores, at most one an
    environment, for the others."""
    renderer: Literal['software', 'hardware'] = 'software'
    """DeepMind Lab only: pictures are drawn by the CPU, or by a GPU."""
    level_cache: str = '~/.cache/impala_jax/dmlab_levels'
    """DeepMind Lab only: a folder for compiled maps, shared by all processes and runs; '' for none."""
    dataset_path: str = ''
    """DeepMind Lab only: the folder of pictures that two of DMLab-30's psychlab levels need; `dummy` for plain colours,
    which are another task than the paper's."""

    def __post_init__(self):
        require(bool(self.name), 'environment.name is empty; try --environment.name catch')
        require_positive('environment', max_failures=self.max_failures)
        if self.action_repeat is not None:
            require_positive('environment', action_repeat=self.action_repeat)
        require(self.processes >= 0, f'environment.processes must be 0 or more, got {self.processes}')
        require(
            not (self.processes and self.name.startswith('dmlab/')),
            f'environment.processes {self.processes}: each environment of DeepMind Lab has a process of its own; leave '
            'it at 0',
        )

    @property
    def frames_per_step(self) -> int:
        """Environment frames in one agent step."""
        if self.action_repeat is not None:
            return self.action_repeat
        return 4 if self.name in ('atari57', 'dmlab30') or self.name.startswith(('atari/', 'dmlab/')) else 1
