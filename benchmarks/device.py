"""Training rates of the runtime `device`, and what a population costs.

    python benchmarks/device.py [--frames 600000] [--members 64] [--rounds 3] [--json FILE]

The first table has frames per second of training, from the rows of metrics after the first second of each run: Catch
with an MLP in `lockstep`, `threads` and `device`, and Breakout of MinAtar with its convolution in `device`. The second
compares a run of Catch with a population of them, both with their compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import machine, report

from impala_jax import run
from impala_jax.config import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    NetworkConfig,
    OptimizerConfig,
)
from impala_jax.rundir.files import METRICS
from impala_jax.rundir.rows import read_rows
from impala_jax.runtimes.device.population import Population


def experiment(name: str, torso: str, batch_size: int, frames: int) -> Config:
    """Returns the configuration of a run."""
    return Config(
        total_frames=frames,
        environment=EnvironmentConfig(name=name),
        network=NetworkConfig(torso=torso),
        learner=LearnerConfig(batch_size=batch_size, unroll_length=20),
        optimizer=OptimizerConfig(name='adam', learning_rate=1e-3, epsilon=1e-8),
        actor=ActorConfig(num_actors=1, num_envs=batch_size),
        evaluator=EvaluatorConfig(episodes=0),
        logging=LoggingConfig(interval_updates=50, interval_s=0.5),
    )


def rate(config: Config, runtime: str) -> float:
    """Returns the median rate over the rows of a run, without those of the first second after the first row."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        run(config, folder, runtime)
        rows = read_rows(Path(folder) / METRICS)
    start = rows[0]['wall_time_s'] + 1.0
    return float(np.median([row['frames_per_second'] for row in rows if row['wall_time_s'] > start]))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=600_000, help='frames of the slower runs')
    parser.add_argument('--members', type=int, default=64, help='members of the population')
    parser.add_argument('--rounds', type=int, default=3, help='measurements of each')
    parser.add_argument('--json', type=Path, help='write the first table to this file')
    args = parser.parse_args()
    about = machine()
    catch = experiment('jax/catch', 'mlp', 32, args.frames)
    runs = {
        ('Catch, NumPy', 'lockstep'): dataclasses.replace(catch, environment=EnvironmentConfig(name='catch')),
        ('Catch, NumPy', 'threads'): dataclasses.replace(catch, environment=EnvironmentConfig(name='catch')),
        ('Catch', 'device'): experiment('jax/catch', 'mlp', 32, 8 * args.frames),
        ('Catch, B = 256', 'device'): experiment('jax/catch', 'mlp', 256, 16 * args.frames),
        ('Breakout, convolution, B = 64', 'device'): experiment('jax/minatar/breakout', 'minatar', 64, 2 * args.frames),
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key, config in runs.items():
            rates[key].append(rate(config, key[1]))
    rows = [
        {'task': task, 'runtime': runtime, 'frames/s': found, 'ratio': float(np.median(found) / np.median(first))}
        for first in [rates['Catch, NumPy', 'lockstep']]
        for (task, runtime), found in rates.items()
    ]
    report('Training, T = 20, B = 32 unless stated', rows, about, args.json)

    times: dict[int, list[float]] = {1: [], args.members: []}
    for _ in range(args.rounds):
        for count, found in times.items():
            start = time.perf_counter()
            members = [dataclasses.replace(catch, seed=seed) for seed in range(count)]
            Population(catch, count, 0).train(members, threading.Event())
            found.append(time.perf_counter() - start)
    one = float(np.median(times[1]))
    rows = [
        {
            'members': count,
            'seconds': found,
            'seconds per run': float(np.median(found)) / count,
            'runs of a member in this time': float(np.median(found)) / one,
        }
        for count, found in times.items()
    ]
    report(f'A population on Catch, {args.frames:,} frames each, with compilation', rows, about, None)


if __name__ == '__main__':
    main()
