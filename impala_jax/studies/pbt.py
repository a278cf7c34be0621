"""Population based training (Espeholt et al., 2018, section 5.3.2 and appendix F; Jaderberg et al., 2017).

A population is a folder, and each member is an ordinary run in its own subfolder. There is no server. At regular
intervals, a member reads the newest valid checkpoint of another member. If that member's fitness is better by a margin,
it continues with that member's weights and with a mutation of its hyperparameters. A member publishes only its
checkpoint, which contains weights, hyperparameters and fitness. Checkpoints are renamed into place and verified by
readers, so members may die or join late. In addition, `pbt.jsonl` records each comparison, for users and figures.

The hyperparameters are inputs of the compiled update, so a change requires neither recompilation nor new environments.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax import config as config_lib
from impala_jax import seeds
from impala_jax.build import make_hyperparameters
from impala_jax.config import Config, ConfigError, PBTConfig
from impala_jax.evaluation.scores import human_normalised
from impala_jax.learner import Learner
from impala_jax.optimizer import Hyperparameters
from impala_jax.rundir import checkpoint
from impala_jax.rundir.checkpoint import CheckpointError
from impala_jax.rundir.files import EVALUATIONS, METRICS, SCHEDULE, write_atomically
from impala_jax.rundir.format import FORMAT, problem
from impala_jax.rundir.rows import append_row, drop_rows, read_rows
from impala_jax.system import program
from impala_jax.training.hooks import Checkpoints, Metrics
from impala_jax.training.hosts import Updated
from impala_jax.training.loop import Hook, TrainingLoop
from impala_jax.types import PyTree

_POPULATION = 'population.json'
_MEMBER = 'member_'
_logger = logging.getLogger(__name__)


_FIELDS = ('optimizer.learning_rate', 'loss.entropy_cost', 'optimizer.epsilon')


def draw(config: PBTConfig, rng: np.random.Generator) -> Hyperparameters:
    """Samples the initial hyperparameters of a member."""

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    return Hyperparameters(
        learning_rate=log_uniform(*config.learning_rate),
        entropy_cost=log_uniform(*config.entropy_cost),
        epsilon=float(rng.choice(config.epsilon)),
    )


def mutate(hyperparameters: Hyperparameters, config: PBTConfig, rng: np.random.Generator) -> Hyperparameters:
    """Multiplies or divides each hyperparameter by `mutation_factor`, with probability `mutation_probability`."""
    chosen = rng.choice([config.mutation_factor, 1 / config.mutation_factor], size=len(hyperparameters))
    mutated = rng.random(len(hyperparameters)) < config.mutation_probability
    return Hyperparameters(*np.multiply(hyperparameters, np.where(mutated, chosen, 1.0)).tolist())


def fitness(tasks: Sequence[str], returns: Sequence[float]) -> float:
    """Computes the fitness of a member: the mean over tasks of capped human-normalised scores, where 1 is human level.

    Args:
      tasks: Names of the tasks. For a task without a known human score, the unnormalised return is used.
      returns: Mean return on each task.
    """
    normalised = [human_normalised(task, value) for task, value in zip(tasks, returns, strict=True)]
    scores = [
        value if percent is None else min(percent / 100, 1.0)
        for percent, value in zip(normalised, returns, strict=True)
    ]
    return float(np.mean(scores))


def member_config(config: Config, index: int) -> Config:
    """Returns the configuration of a member, with its own seed and initial hyperparameters.

    It is deterministic, so that a member can be restarted on any machine.

    Args:
      config: Configuration of the population.
      index: Index of the member.
    """
    entropy = (config.seed, 5, index)  # 0 to 4 are roles within a run, see `runtimes.nodes`.
    first = draw(config.pbt, np.random.default_rng(seeds.sequence(*entropy)))
    values = {'pbt.member': index, 'seed': seeds.derived_seed(*entropy)}
    return config_lib.replace(config, values | dict(zip(_FIELDS, first, strict=True)))


def member_folder(population: Path, index: int) -> Path:
    """Returns the run folder of member `index`."""
    return Path(population) / f'{_MEMBER}{index:02d}'


def members(population: Path) -> list[Path]:
    """Returns the run folders of the members that have a checkpoint, in the order of their indices."""
    folders = [path for path in Path(population).glob(f'{_MEMBER}*') if path.name.removeprefix(_MEMBER).isdecimal()]
    published = [path for path in folders if checkpoint.steps(path / checkpoint.DIRECTORY)]
    return sorted(published, key=lambda path: int(path.name.removeprefix(_MEMBER)))


def join(population: Path, config: Config) -> None:
    """Creates the population's folder, or checks that its configuration is the same.

    Args:
      population: Folder of the population.
      config: Configuration of the population.

    Raises:
      ConfigError: The folder has a different configuration, or is not writable.
    """
    path = Path(population) / _POPULATION
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            content = {'format': FORMAT, 'config': config_lib.to_dict(config)}
            write_atomically(path, json.dumps(content, indent=2) + '\n')
        known = _read_population(path, config)
    except OSError as error:
        raise ConfigError(f'cannot write to --workdir {population}: {error.strerror}; give another folder') from error
    except ValueError as error:
        raise ConfigError(f'{path} is damaged; delete it, and the next start writes it again') from error
    fields = config_lib.differences(known, config, 'there')
    if fields:
        raise ConfigError(
            f'cannot join the population in {population}: the configuration differs in {"; ".join(fields)}; '
            'use the same configuration, or another --workdir'
        )


def _read_population(path: Path, joined_by: Config) -> Config:
    """Configuration of a population; ValueError if the file is damaged."""
    content = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a JSON object')
    values = content.get('config', content)  # Version 0.1 wrote the configuration only.
    reason = problem(content.get('format', 1))
    if reason:
        raise ConfigError(f'{path} {reason}')
    return config_lib.from_dict(config_lib.upgraded(values, joined_by))


def summary(population: Path) -> str:
    """Summarises the results of the members in one line each, best first, with a command for evaluation."""
    lines = []
    for workdir in members(population):
        schedule, evaluations, rows = (
            read_rows(workdir / name, last_bytes=100_000)[-1:] for name in (SCHEDULE, EVALUATIONS, METRICS)
        )
        score = dict(*evaluations).get('mean_return', dict(*rows).get('episode_return_last_100', -math.inf))
        text = '  '.join(
            f'{name.replace("_", " ")} {row[name]:.3g}' for row in schedule for name in Hyperparameters._fields
        )
        returned = 'no episode has ended' if score == -math.inf else f'return {score:.2f}'
        lines.append((score, f'{workdir.name}  {returned}  {text}', workdir))
    lines.sort(key=lambda line: -line[0])
    evaluate = [f'Evaluate   {program.command("evaluate")} --workdir {shlex.quote(str(line[2]))}' for line in lines[:1]]
    return '\n'.join([line[1] for line in lines] + evaluate)


class Member:
    """A member of a population: its hyperparameters, its comparisons with others, and its published metadata.

    Args:
      config: Configuration returned by `member_config`.
      workdir: Run folder returned by `member_folder`.
    """

    def __init__(self, config: Config, workdir: Path):
        self.hyperparameters = make_hyperparameters(config)
        self._config = config
        self._workdir = workdir

    def resume(self, frames: int, metadata: dict[str, Any] | None) -> None:
        """Resumes from the metadata of a checkpoint, or starts if it is None.

        Args:
          frames: Number of frames at which to resume; later rows of the schedule are removed.
          metadata: Metadata of the checkpoint.
        """
        if metadata is not None:
            self.hyperparameters = Hyperparameters(**metadata['hyperparameters'])
        if not drop_rows(self._workdir / SCHEDULE, frames):
            self._record(0, {'fitness': None})

    def metadata(self, fitness: float | None) -> dict[str, Any]:
        """Returns the metadata that the member publishes in its checkpoints."""
        return {'hyperparameters': self.hyperparameters._asdict(), 'fitness': fitness}

    def is_due(self, num_updates: int) -> bool:
        """Whether a comparison is due after `num_updates` updates; never after the last update."""
        config, frames = self._config, num_updates * self._config.frames_per_update
        before = frames - config.frames_per_update
        interval = config.pbt.interval_frames
        crossed = frames // interval > before // interval
        return crossed and frames >= config.pbt.burn_in_frames and num_updates < config.total_updates

    def evolve(self, frames: int, fitness: float | None, template: PyTree) -> PyTree | None:
        """Compares this member with a uniformly sampled one, and copies that member if it is better by the margin.

        While its own fitness is unknown, for example after copying, a member does not copy. If the other member cannot
        be read, the comparison is skipped, so members never fail because of others.

        Args:
          frames: Number of frames of this member.
          fitness: Fitness of this member; None if it is not known yet.
          template: Structure of the state, as in `checkpoint.restore`.

        Returns:
          The copied state to continue from, in which case `hyperparameters` has changed; None to continue unchanged.
        """
        config = self._config.pbt
        # Seeded by the number of frames, so that a restarted member repeats a comparison with the same random numbers.
        rng = np.random.default_rng(seeds.sequence(self._config.seed, frames))
        others = [path for path in members(self._workdir.parent) if path.name != self._workdir.name]
        row: dict[str, Any] = {'fitness': fitness}
        copied = None
        if fitness is not None and others:
            other = others[rng.integers(len(others))]
            try:
                saved = checkpoint.restore(other, template)
            except CheckpointError as error:
                _logger.warning('skipping the comparison with %s: %s', other.name, error)
            else:
                published = saved.metadata['pbt']
                row |= {'other': int(other.name.removeprefix(_MEMBER)), 'other_fitness': published['fitness']}
                if published['fitness'] is not None and published['fitness'] - fitness > config.threshold:
                    self.hyperparameters = mutate(Hyperparameters(**published['hyperparameters']), config, rng)
                    copied = saved.state
        self._record(frames, {**row, 'copied': copied is not None})
        return copied

    def _record(self, frames: int, row: dict[str, Any]) -> None:
        append_row(self._workdir / SCHEDULE, {'frames': frames, **row, **self.hyperparameters._asdict()})


class Evolution(Hook):
    """A hook that turns a training loop into a member of a population.

    Args:
      config: Configuration returned by `member_config`.
      workdir: Run folder returned by `member_folder`.
      tasks: Names of a suite's tasks; () for a single environment.
      learner: Learner that places copied states on its devices.
      metrics: Hook with the mean returns, from which the fitness is computed.
      checkpoints: Hook that writes the checkpoints of the member.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        tasks: tuple[str, ...],
        learner: Learner,
        metrics: Metrics,
        checkpoints: Checkpoints,
    ):
        self._member = Member(config, workdir)
        self._tasks = tasks or (config.environment.name,)
        self._learner, self._metrics, self._checkpoints = learner, metrics, checkpoints
        checkpoints.save_with(dict, lambda: {'pbt': self._member.metadata(self._fitness)})

    def begin(self, loop: TrainingLoop) -> None:
        """Sets the loop's hyperparameters, from a checkpoint if there is one."""
        restored = self._checkpoints.restored_metadata
        self._member.resume(loop.frames, None if restored is None else restored['pbt'])
        loop.hyperparameters = self._member.hyperparameters

    def updated(self, loop: TrainingLoop, update: Updated) -> None:
        """Compares this member with another if that is due, and requests a checkpoint to save the result."""
        own = loop.state
        if own is None or not self._member.is_due(loop.num_updates):
            return
        copied = self._member.evolve(loop.frames, self._fitness, {'learner': own})
        if copied is not None:
            state = copied['learner']._replace(num_updates=own.num_updates, skipped=own.skipped)
            loop.replace_state(self._learner.restore(state))
            loop.hyperparameters = self._member.hyperparameters
            self._metrics.stats.forget_returns(loop.num_updates)
        self._checkpoints.want()

    @property
    def _fitness(self) -> float | None:
        """Fitness of the member; None while it is unknown."""
        returns = self._metrics.stats.mean_returns
        return None if returns is None else fitness(self._tasks, returns)
