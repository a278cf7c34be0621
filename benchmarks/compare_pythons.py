"""Speed of this project with two Pythons, or two versions of JAX: updates, acting, and whole runs.

    python benchmarks/compare_pythons.py PYTHON PYTHON [--measure shallow deep inference actor run] [--rounds 8]
                                         [--repeats 5] [--seconds 30] [--json FILE]

Each PYTHON is the interpreter of an environment with this project, for example `.venv/bin/python` and
`.venv312/bin/python`. The measurements are:

* `shallow`, `deep`: an update of the benchmark `learner.py`, T = 20, B = 32; `plain-shallow` and `plain-deep` are the
  same in plain Flax layers.
* `inference`, `actor`: an unroll of the benchmark `acting.py`, Pong with 8 environments.
* `run`: Pong with the runtime `threads`, frames per second; a round takes longer, so `--run-rounds` is separate.

Both interpreters measure in turn, and change places from round to round, so that other load affects both alike. A round
is the median of `--repeats` calls. The table has the rates of the rounds, per second, as median and range. `ratio` is
the second Python's rate divided by the first's, the median over the rounds: above 1, the second Python is faster. `by
CPU time` is the same ratio for the CPU time of the process, which other load affects less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import acting
import end_to_end
import jax
import learner
import numpy as np
from common import machine, report

from impala_jax import environments
from impala_jax.build import make_agent
from impala_jax.cli import command_line
from impala_jax.config import Config, LearnerConfig, NetworkConfig
from impala_jax.kernels import allocator

T, BATCH, NUM_ENVS = 20, 32, 8
PONG = end_to_end.ROOT / 'configs' / 'pong.py'
MEASUREMENTS = ('shallow', 'deep', 'inference', 'actor', 'run')
OTHERS = ('plain-shallow', 'plain-deep')


def unit(name: str) -> tuple[Callable[[], object], int]:
    """Returns a function to measure, and the number of agent steps per call."""
    torso = name.removeprefix('plain-')
    if torso in ('shallow', 'deep'):
        make = learner.ours if torso == name else learner.plain
        config = Config(network=NetworkConfig(torso), learner=LearnerConfig(BATCH, T))
        return make(config, learner.make_trajectories(T, BATCH)), T * BATCH
    config = command_line.load_config_file(PONG)
    agent = make_agent(config.network, environments.spec(config.environment), config.popart.enabled)
    _, fns = acting.parts(config, agent, agent.init(jax.random.PRNGKey(0)), NUM_ENVS)
    return fns[name], config.learner.unroll_length * NUM_ENVS


def serve(name: str, repeats: int, seconds: float) -> None:
    """Measures once per line of the standard input.

    The first line of the output describes this Python; the others are pairs of steps (`run`: frames) per second of
    wall-clock time and of CPU time, the latter null for a run.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Messages of libraries must not be read as answers.
    allocator.configure_allocator()

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    if name == 'run':
        answer(_versions())
        for _ in sys.stdin:
            answer([end_to_end.frames_per_second(PONG, 'threads', seconds, []), None])
        return
    fn, num_steps = unit(name)
    fn()
    answer(_versions())
    for _ in sys.stdin:
        wall, cpu = [], []
        for _ in range(repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            fn()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        answer([num_steps / float(np.median(wall)), num_steps / float(np.median(cpu))])


def _versions() -> str:
    return f'{platform.python_version()}, jax {jax.__version__}'


class Server:
    """`serve` in a process of an interpreter.

    Args:
      python: Interpreter.
      arguments: Arguments of this script.

    Attributes:
      versions: Versions of Python and JAX.
    """

    def __init__(self, python: Path, arguments: list[str]):
        self._python = python
        self._process = subprocess.Popen(
            [python, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={'PYTHONPATH': str(end_to_end.ROOT), **os.environ},
        )
        self.versions = self._answer()

    def measure(self) -> tuple[float, float | None]:
        """Measures once; see `serve`."""
        assert self._process.stdin is not None
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        return tuple(self._answer())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'{self._python} ended with exit code {self._process.wait(60)}')
        return json.loads(line)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pythons', nargs=2, metavar='PYTHON', type=Path, help='interpreters; the first is the base')
    parser.add_argument('--measure', nargs='+', choices=MEASUREMENTS + OTHERS, default=MEASUREMENTS)
    parser.add_argument('--rounds', type=int, default=8, help='rounds per measurement')
    parser.add_argument('--run-rounds', type=int, default=4, help='rounds of `run`')
    parser.add_argument('--repeats', type=int, default=5, help='calls per round')
    parser.add_argument('--seconds', type=float, default=30, help='duration of a run')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    parser.add_argument('--serve', choices=MEASUREMENTS + OTHERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.repeats, args.seconds)
        return
    about, rows = machine(), []
    del about['jax'], about['python']
    for name in args.measure:
        options = ['--serve', name, '--repeats', str(args.repeats), '--seconds', str(args.seconds)]
        servers = [Server(python, [*map(str, args.pythons), *options]) for python in args.pythons]
        samples: list[list[tuple[float, float | None]]] = [[], []]
        for i in range(args.run_rounds if name == 'run' else args.rounds):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                samples[which].append(servers[which].measure())
        for server in servers:
            server.close()
        walls, cpus = ([[sample[i] for sample in of_python] for of_python in samples] for i in (0, 1))
        by_cpu = '-' if name == 'run' else float(np.median(np.divide(cpus[1], cpus[0])))
        rows.append(
            {
                'measurement': name,
                **{f'{i + 1}: {server.versions}': walls[i] for i, server in enumerate(servers)},
                'ratio': float(np.median(np.divide(walls[1], walls[0]))),
                'by CPU time': by_cpu,
                'load': round(os.getloadavg()[0], 1),
            }
        )
    report('steps/s, of `run` frames/s', rows, about, args.json)


if __name__ == '__main__':
    main()
