"""Throughput as a function of the number of environments and of learners, compared with ideal scaling.

    python benchmarks/scaling.py [--step-ms 50] [--envs 1 4 16 64 256] [--per-actor 1 8] [--hosts 1 2 4]
                                 [--runtime threads launchpad] [--seconds 15] [--repeats 1] [--plot FILE] [--json FILE]

The environments are synthetic (`synthetic.py`): a step takes a fixed time but no CPU time, so a small machine can
simulate many. For environments, the benchmark runs `launch/local.py` with one learner and actors of `--per-actor`
environments each; the ideal is environments / step time. For learners, it runs `launch/tpu_pod.py --simulate-hosts`
with 8 actors of 8 environments and a batch of 8 per host; the ideal is the number of hosts times the throughput of one.
All programs run on this machine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, report
from end_to_end import ROOT, frames_per_second

BENCHMARKS = Path(__file__).resolve().parent
CONFIG = BENCHMARKS / 'synthetic.py'
ACTORS_PER_HOST, ENVS_PER_ACTOR = 8, 8


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--step-ms', type=float, default=50.0, help='duration of a step (default: %(default)g)')
    parser.add_argument('--envs', type=int, nargs='*', default=(1, 4, 16, 64, 256), help='total, with one learner')
    parser.add_argument('--per-actor', type=int, nargs='+', default=(1, 8), help='environments per actor')
    parser.add_argument('--hosts', type=int, nargs='*', default=(1, 2, 4), help='numbers of learners, one per host')
    parser.add_argument('--runtime', nargs='+', default=('threads', 'launchpad'), help='runtimes to measure')
    parser.add_argument('--seconds', type=float, default=15.0, help='duration of the training in each run')
    parser.add_argument('--repeats', type=int, default=1, help='runs per measurement')
    parser.add_argument('--plot', type=Path, help='draw the results into this png or svg file')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()
    os.environ['SYNTHETIC_STEP_S'] = str(args.step_ms / 1e3)
    os.environ['PYTHONPATH'] = f'{ROOT}{os.pathsep}{BENCHMARKS}'
    about, rows = machine(), []

    def measure(kind: str, size: int, script: str, overrides: dict[str, Any], runtime: str) -> list[float]:
        flags = [text for name, value in overrides.items() for text in (f'--{name}', str(value))]
        rates = [frames_per_second(CONFIG, runtime, args.seconds, flags, script) for _ in range(args.repeats)]
        print(f'{kind}, {runtime}: {size}: {np.median(rates):,.0f} steps/s', flush=True)
        return rates

    for runtime in args.runtime:
        for per_actor in args.per_actor:
            for envs in args.envs:
                if envs % per_actor:
                    continue
                overrides = {'actor.num-actors': envs // per_actor, 'actor.num-envs': per_actor}
                # At most what all actors produce in one unroll: larger batches would make updates come in bursts.
                overrides['learner.batch-size'] = min(envs, 32)
                kind = f'environments, {per_actor} an actor'
                rates = measure(kind, envs, 'local.py', overrides, runtime)
                rows.append(row(kind, runtime, envs, rates, envs * 1e3 / args.step_ms))
        alone = None
        for hosts in args.hosts:
            overrides = {
                'simulate-hosts': hosts,
                'actor.num-actors': ACTORS_PER_HOST,
                'actor.num-envs': ENVS_PER_ACTOR,
                'learner.batch-size': ENVS_PER_ACTOR * hosts,
            }
            rates = measure('learners', hosts, 'tpu_pod.py', overrides, runtime)
            alone = float(np.median(rates)) / hosts if alone is None else alone
            rows.append(row('learners', runtime, hosts, rates, alone * hosts))
    report(f'synthetic environments with {args.step_ms:g} ms per step', rows, about, args.json)
    if args.plot is not None:
        plot(rows, args.plot)


def row(kind: str, runtime: str, size: int, rates: list[float], ideal: float) -> dict[str, Any]:
    """Returns a row of the table."""
    share = float(np.median(rates)) / ideal
    return {'of': kind, 'runtime': runtime, 'number': size, 'steps/s': rates, 'ideal': ideal, 'of the ideal': share}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws two panels: environments, on logarithmic axes, and learners."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout='constrained')
    for axes, title in zip(panels, ('environments', 'learners'), strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for line in rows:
            if line['of'].startswith(title):
                actors = line['of'].partition(', ')[2]
                lines.setdefault(f'{actors}, {line["runtime"]}' if actors else line['runtime'], []).append(line)
        for name, points in lines.items():
            numbers = [point['number'] for point in points]
            rates = [np.median(point['steps/s']) for point in points]
            axes.plot(numbers, rates, marker='o', markersize=4, alpha=0.8, label=name)
        ideal = sorted({(line['number'], line['ideal']) for line in rows if line['of'].startswith(title)})
        axes.plot(*zip(*ideal, strict=True), color='gray', linestyle=':', label='ideal')
        scale = 'log' if title == 'environments' else 'linear'
        axes.set(xscale=scale, yscale=scale, xlabel=title, ylabel='steps/s')
        numbers = sorted({number for number, _ in ideal})
        axes.set_xticks(numbers, numbers)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f'figure: {path}')


if __name__ == '__main__':
    main()
