"""Speed of the compiled V-trace implementations: `auto`, `scan`, `associative_scan`, and RLax's.

    python benchmarks/vtrace.py [--shapes 20,32 1000,32] [--seconds 2] [--json FILE]

Targets and advantages are timed together, jitted, with inputs on the device. The variants alternate, so that other load
on the machine affects all of them alike. A row has the median time of a call and, in brackets, the 10th and 90th
percentile. RLax fixes c_bar to 1 and processes one trajectory at a time, so it is mapped over the batch. `auto` is the
CPU kernel where it is compiled, and otherwise the scan that was faster in this benchmark.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
import rlax
from common import machine

from impala_jax import vtrace
from impala_jax.kernels import allocator

SHAPES = ((20, 32), (80, 32), (100, 256), (1000, 32))


def make_inputs(T: int, B: int) -> dict[str, jax.Array]:
    """Creates random inputs of `from_importance_weights`, [T, B]."""
    rng = np.random.RandomState(0)
    inputs = {
        'log_rhos': 0.5 * rng.randn(T, B),
        'discounts': 0.99 * (rng.rand(T, B) > 0.02),
        'rewards': rng.randn(T, B),
        'values': rng.randn(T, B),
        'bootstrap_value': rng.randn(B),
    }
    return {name: jax.device_put(value.astype(np.float32)) for name, value in inputs.items()}


def with_rlax(log_rhos, discounts, rewards, values, bootstrap_value):
    """Computes targets and advantages with RLax from the same inputs."""
    values_t = jax.numpy.concatenate([values[1:], bootstrap_value[None]])
    fn = jax.vmap(rlax.vtrace_td_error_and_advantage, in_axes=1, out_axes=1)
    returns = fn(values, values_t, rewards, discounts, jax.numpy.exp(log_rhos))
    return vtrace.VTraceReturns(returns.errors + values, returns.pg_advantage)


VARIANTS = {
    'auto': functools.partial(vtrace.from_importance_weights, implementation='auto'),
    'scan': functools.partial(vtrace.from_importance_weights, implementation='scan'),
    'associative_scan': functools.partial(vtrace.from_importance_weights, implementation='associative_scan'),
    'rlax': with_rlax,
}


def measure(T: int, B: int, seconds: float) -> dict[str, dict[str, float]]:
    """Measures the time of a call, in microseconds, by variant.

    Args:
      T: Number of steps.
      B: Batch size.
      seconds: Duration of the measurement, in seconds.
    """
    inputs = make_inputs(T, B)
    fns = {name: jax.jit(fn) for name, fn in VARIANTS.items()}
    results = {name: jax.block_until_ready(fn(**inputs)) for name, fn in fns.items()}
    for name, result in results.items():
        np.testing.assert_allclose(result.vs, results['scan'].vs, rtol=1e-3, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(
            result.pg_advantages, results['scan'].pg_advantages, rtol=1e-3, atol=1e-3, err_msg=name
        )
    times: dict[str, list[float]] = {name: [] for name in fns}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(**inputs))
            times[name].append(1e6 * (time.perf_counter() - start))
    return {
        name: {
            'median_us': float(np.median(values)),
            'p10_us': float(np.percentile(values, 10)),
            'p90_us': float(np.percentile(values, 90)),
            'calls': len(values),
        }
        for name, values in times.items()
    }


def _shape(text: str) -> tuple[int, int]:
    T, B = (int(part) for part in text.split(','))
    return T, B


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', type=_shape, nargs='+', default=SHAPES, metavar='T,B', help='shapes')
    parser.add_argument('--seconds', type=float, default=2.0, help='duration of the measurement per shape')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()

    allocator.configure_allocator()
    about = {**machine(), 'rlax': rlax.__version__}
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    print('\nmicroseconds per call: median [10th, 90th percentile]\n')
    print('| T, B | ' + ' | '.join(VARIANTS) + ' | fastest |')
    print('|---' * (len(VARIANTS) + 2) + '|')
    rows = []
    for T, B in args.shapes:
        measured = measure(T, B, args.seconds)
        fastest = min(measured, key=lambda name: measured[name]['median_us'])
        cells = [f'{m["median_us"]:.0f} [{m["p10_us"]:.0f}, {m["p90_us"]:.0f}]' for m in measured.values()]
        print(f'| {T}, {B} | ' + ' | '.join(cells) + f' | {fastest} |')
        rows.append({'T': T, 'B': B, 'fastest': fastest, 'variants': measured})
    about['load_1_min_after'] = round(os.getloadavg()[0], 2)
    if args.json:
        args.json.write_text(json.dumps({'machine': about, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
