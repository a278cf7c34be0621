"""`impala evaluate`: plays full episodes with a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from impala_jax.cli import command_line
from impala_jax.config import ConfigError
from impala_jax.environments import suites
from impala_jax.evaluation.run_evaluation import play
from impala_jax.evaluation.scores import estimate_text, table
from impala_jax.evaluation.video import check_video
from impala_jax.rundir import checkpoint
from impala_jax.studies import plotting


def parse() -> argparse.Namespace:
    """Parses the command line.

    Raises:
      ConfigError: A value is out of range, or a file cannot be written as named.
    """
    parser = command_line.Parser(
        description='Plays full episodes (whole games, not single lives) with the newest checkpoint of a run.'
    )
    parser.add_argument('--workdir', required=True, type=Path, help='directory of the run')
    parser.add_argument(
        '--suite', help="play each task of atari57, dmlab30 or minisuite (default: the run's environment)"
    )
    parser.add_argument('--episodes', type=int, default=100, help='episodes per task (default: %(default)s)')
    parser.add_argument('--num-envs', type=int, default=16, help='episodes played in parallel (default: %(default)s)')
    parser.add_argument('--greedy', action='store_true', help='take the most likely action instead of sampling')
    parser.add_argument(
        '--seed', type=int, default=1_000_003, help='seed for environments and actions (default: %(default)s)'
    )
    parser.add_argument(
        '--json',
        type=Path,
        help='write the scores to this file; in a suite, each finished task is also saved in FILE.partial.jsonl, from '
        'which the same command resumes',
    )
    parser.add_argument('--plot', type=Path, help="draw a suite's scores into this png or svg file")
    parser.add_argument('--video', type=Path, help='record one episode in this mp4 or gif file')
    parser.add_argument(
        '--max-episode-steps', type=int, help="truncate episodes after this many steps (default: the run's)"
    )
    parser.add_argument(
        '--timeout-s', type=float, help="longest wait for an environment, in seconds (default: the run's)"
    )
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    for name in ('episodes', 'num_envs', 'max_episode_steps', 'timeout_s'):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ConfigError(f'--{name.replace("_", "-")} must be positive, got {value}')
    if arguments.video is not None:
        check_video(arguments.video)
    if arguments.plot is not None:
        plotting.check_output(arguments.plot, '--plot')
        played = arguments.suite or checkpoint.load_config(arguments.workdir).environment.name
        if played not in suites.SUITES:
            raise ConfigError(f'--plot draws the scores of a suite, and {played!r} is not a suite; add --suite')
    if arguments.json is not None:
        if not arguments.json.absolute().parent.is_dir():
            raise ConfigError(f'--json {arguments.json}: there is no directory {arguments.json.absolute().parent}')
        if arguments.json.is_dir():
            raise ConfigError(f'--json {arguments.json}: there is a directory of this name; give a file')


def evaluate() -> None:
    """Plays the episodes, and prints or writes the scores."""
    arguments = parse()
    partial = None if arguments.json is None else arguments.json.with_name(f'{arguments.json.name}.partial.jsonl')
    scores, recording = play(
        arguments.workdir,
        suite=arguments.suite,
        episodes=arguments.episodes,
        num_envs=arguments.num_envs,
        greedy=arguments.greedy,
        seed=arguments.seed,
        record=arguments.video is not None,
        max_episode_steps=arguments.max_episode_steps,
        timeout_s=arguments.timeout_s,
        partial=partial,
        report=lambda line: print(line, flush=True),
    )
    _print(scores)
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(scores, indent=2) + '\n')
        except OSError as error:
            raise ConfigError(f'--json {arguments.json}: cannot be written: {error.strerror}') from error
        if partial is not None:
            partial.unlink(missing_ok=True)
    if arguments.plot is not None:
        plotting.save(plotting.suite(scores), arguments.plot)
        print(f'figure: {arguments.plot}')
    if arguments.video is not None and recording is not None:
        recording.write(arguments.video)  # Last, because it may fail.
        print(f'video of one game: {arguments.video}')


def _print(scores: dict[str, Any]) -> None:
    if 'tasks' in scores:
        Console().print(table(scores))
        return
    print(f'{scores["environment"]}: {scores["episodes"]} games at {scores["frames"]:,} frames')
    print('mean {mean_return:.2f}  standard error {stderr:.2f}  median {median_return:.2f}'.format(**scores))
    print(f'lowest {scores["min_return"]:.2f}  highest {scores["max_return"]:.2f}')
    if scores['human_normalised'] is not None:
        text = estimate_text(scores['human_normalised'], scores['human_normalised_interval'])
        print(f'human-normalised {text} %')


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.main(evaluate)
