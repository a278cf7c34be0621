"""Search for the numbers of actors and environments with the highest throughput on this machine.

    python benchmarks/tune.py [--config configs/pong.py] [--runtime launchpad] [--actors 1 2 4] [--envs 4 8 16 32]
                              [--seconds 20] [--repeats 2] [--json FILE]

It runs every combination for `--seconds` of training, in alternation, and prints the best one. The default of
`--actors` is half an actor, one and two actors per core. The fastest combination need not learn fastest: with more
environments, trajectories come from older parameters, and updates come in bursts if one unroll of all actors fills
several batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import machine, report
from end_to_end import frames_per_second

from impala_jax.system.machine import num_cores


def main() -> None:
    """Runs the search."""
    cores = num_cores()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Further arguments are overrides of the configuration, as for launch/local.py.',
    )
    parser.add_argument('--config', default='configs/pong.py', help='configuration of the runs')
    parser.add_argument('--runtime', default='launchpad', help='runtime of the runs')
    actors = sorted({max(cores // 2, 1), cores, 2 * cores})
    parser.add_argument('--actors', type=int, nargs='+', default=actors, help='numbers of actors')
    parser.add_argument('--envs', type=int, nargs='+', default=(4, 8, 16, 32), help='numbers of environments per actor')
    parser.add_argument('--seconds', type=float, default=20, help='duration of the training in each run')
    parser.add_argument('--repeats', type=int, default=2, help='runs per combination')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args, overrides = parser.parse_known_args()
    about = machine()
    rates: dict[tuple[int, int], list[float]] = {(actors, envs): [] for actors in args.actors for envs in args.envs}
    for _ in range(args.repeats):
        for (actors, envs), measured in rates.items():
            flags = ['--actor.num-actors', str(actors), '--actor.num-envs', str(envs), *overrides]
            measured.append(frames_per_second(args.config, args.runtime, args.seconds, flags))
            print(f'{actors} actors with {envs} environments: {measured[-1]:,.0f} frames/s', flush=True)
    rows = [
        {'actors': str(actors), 'environments per actor': str(envs), 'frames/s': measured}
        for (actors, envs), measured in sorted(rates.items(), key=lambda item: -np.median(item[1]))
    ]
    report(f'{args.config}, runtime {args.runtime}, best first', rows, about, args.json)
    actors, envs = rows[0]['actors'], rows[0]['environments per actor']
    print(f'--actor.num-actors {actors} --actor.num-envs {envs}')


if __name__ == '__main__':
    main()
