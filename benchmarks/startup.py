"""Time from the command to the first learner update, without and with a filled compilation cache.

    python benchmarks/startup.py [--config configs/pong.py] [--runtime launchpad threads] [--repeats 3] [--json FILE]

The figures are seconds until the first row of metrics, which is configured to be written after the first update.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, report

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300


def start(config: str, runtime: str, workdir: Path, cache: Path) -> float:
    """Measures the time to the first update of a run, in seconds, and stops the run.

    Args:
      config: Configuration of the run.
      runtime: Runtime of the run.
      workdir: Folder of the run.
      cache: Folder of the compilation cache.

    Raises:
      RuntimeError: The run ended, or there was no update within `TIMEOUT_S`.
    """
    command = [sys.executable, ROOT / 'launch' / 'local.py', '--config', config, '--workdir', workdir]
    command += ['--runtime', runtime, '--logging.interval-s', '0.001', '--evaluator.episodes', '0']
    environment = {**os.environ, 'XDG_CACHE_HOME': str(cache), 'PYTHONPATH': str(ROOT)}
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = workdir / 'metrics.jsonl'
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.monotonic() - begin > TIMEOUT_S:
                raise RuntimeError(f'{runtime}: no update after {time.monotonic() - begin:.0f} s')
            time.sleep(0.01)
        return time.monotonic() - begin
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/pong.py', help='configuration of the runs')
    parser.add_argument('--runtime', nargs='+', default=('launchpad', 'threads'), help='runtimes to measure')
    parser.add_argument('--repeats', type=int, default=3, help='starts per runtime')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()
    about, rows = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for runtime in args.runtime:
            times: dict[str, list[float]] = {'first start, s': [], 'next start, s': []}
            for repeat in range(args.repeats):
                for name, seconds in times.items():
                    place = Path(folder) / f'{runtime}{repeat}'
                    seconds.append(start(args.config, runtime, place / name.split()[0], place / 'cache'))
            ratio = float(np.median(times['first start, s']) / np.median(times['next start, s']))
            rows.append({'runtime': runtime, **times, 'ratio': ratio})
    report(f'{args.config}: from command to first update', rows, about, args.json)


if __name__ == '__main__':
    main()
