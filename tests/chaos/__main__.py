"""Conducts cases: python -m tests.chaos --cases 60 --processes 2; --seed N replays one, --table prints the results."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.programs import ROOT

from . import cases, experiment, results
from .cases import Case
from .experiment import FAILED, References, Stopped
from .results import Results


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.chaos', description='Breaks runs, and judges how they end.')
    parser.add_argument('--cases', type=int, default=60, help='how many (default: %(default)s)')
    parser.add_argument('--first-seed', type=int, default=0, help='of them (default: %(default)s)')
    parser.add_argument('--seed', type=int, help='replay this one, whether or not there is a result')
    half = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument('--processes', type=int, default=half, help='cases that run at once (default: %(default)s)')
    parser.add_argument('--slack', type=float, default=1.0, help='multiplies the bounds, for a machine that is busy')
    parser.add_argument('--quick', action='store_true', help='only cases that take less than a minute')
    parser.add_argument('--time-limit', type=float, default=float('inf'), help='begin no case after so many seconds')
    parser.add_argument('--runtime', choices=cases.RUNTIMES, help='only cases of this runtime')
    parser.add_argument('--fault', help='only cases whose fault has this text in its name')
    parser.add_argument('--retry', action='store_true', help='conduct failed cases again')
    parser.add_argument('--list', action='store_true', help='print the cases and exit')
    parser.add_argument('--table', action='store_true', help='print the results so far as Markdown and exit')
    parser.add_argument('--every-version', action='store_true', help='of all versions of the code, not of this one')
    parser.add_argument('--results', type=Path, default=ROOT / 'build' / 'chaos', help='folder (default: %(default)s)')
    arguments = parser.parse_args()
    if arguments.slack <= 0 or arguments.processes < 1:
        parser.error('--slack and --processes must be positive')

    from impala_jax.config import ConfigError
    from impala_jax.rundir.code_version import code_version
    from impala_jax.rundir.lock import only_process

    folder = arguments.results.absolute()
    kept = Results(folder / 'results.jsonl', f'{code_version()} python{platform.python_version()}')
    if arguments.table:
        print(results.table(kept.rows(arguments.every_version)))
        return 0
    chosen = list(itertools.islice(_chosen(arguments), 1 if arguments.seed is not None else arguments.cases))
    if arguments.list:
        print(*(case.line for case in chosen), sep='\n')
        return 0
    try:
        with only_process(folder, '--results'):
            return _conduct(chosen, arguments, folder, kept)
    except ConfigError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1


def _chosen(arguments: argparse.Namespace) -> Iterator[Case]:
    first = arguments.first_seed if arguments.seed is None else arguments.seed
    for seed in itertools.count(first):
        case = cases.draw(seed, cases.installed())
        fits = (
            (not arguments.quick or case.is_quick)
            and arguments.runtime in (None, case.runtime)
            and (arguments.fault is None or arguments.fault in case.kind)
        )
        if fits or arguments.seed is not None:
            yield case


def _conduct(chosen: list[Case], arguments: argparse.Namespace, folder: Path, kept: Results) -> int:
    os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')  # What was compiled is shared by the cases.
    of_failures = {str(row['seed']) for row in kept.rows(every_version=True) if row['outcome'] == FAILED}
    for left in sorted((folder / 'cases').glob('*')):
        if left.name not in of_failures:  # Those can be looked at.
            experiment.clear(left)  # Its harness was killed.
    stop = threading.Event()
    references = References(folder / 'references', stop.is_set)
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    failed: list[Case] = []
    left_out: list[Case] = []
    broken: list[Case] = []  # by a mistake of the harness

    def one(case: Case) -> None:
        if stop.is_set():
            return
        verdict = None if arguments.seed is not None else kept.known(case)
        if verdict is not None and arguments.retry and verdict['outcome'] == FAILED:
            verdict = None
        if verdict is not None:
            print(f'{results.in_a_line(verdict)} (known)', flush=True)
        else:
            if time.monotonic() - began > arguments.time_limit:
                left_out.append(case)
                return
            try:
                verdict = experiment.conduct(
                    case, folder / 'cases' / str(case.seed), references, arguments.slack, stop.is_set
                )
            except Stopped:
                return
            except Exception:
                broken.append(case)
                print(f'the harness failed at {case.line}\n{traceback.format_exc()}', file=sys.stderr, flush=True)
                return
            kept.add(verdict)
            print(results.report(verdict), flush=True)
        outcomes[verdict['outcome']] += 1
        if verdict['outcome'] == FAILED:
            failed.append(case)

    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        stop.set()

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
            futures = [pool.submit(one, case) for case in chosen]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(f'{outcomes.total()} cases:', ', '.join(f'{count} {name}' for name, count in sorted(outcomes.items())))
    if left_out:
        print(f'{len(left_out)} cases left out after {arguments.time_limit:g} s: the same command goes on with them')
    if failed:
        print('to replay what failed:', *(f'python -m tests.chaos --seed {case.seed}' for case in failed), sep='\n  ')
    if received:
        print('stopped; the same command goes on', file=sys.stderr)
        return 128 + received[0]
    return 2 if broken else 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
