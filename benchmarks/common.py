"""Helpers for the benchmarks: machine description, interleaved timing, medians, peak of matrix products, tables."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from impala_jax.system.machine import num_cores


def machine() -> dict[str, Any]:
    """Describes the machine that the benchmark runs on."""
    device = jax.devices()[0]
    return {
        'backend': jax.default_backend(),
        'device': device.device_kind,
        'cpu': _cpu_model(),
        'cores': num_cores(),
        'load_1_min': round(os.getloadavg()[0], 2),
        'jax': jax.__version__,
        'python': platform.python_version(),
    }


def in_turn(fns: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measures functions in alternation, so that other load on the machine affects all of them alike.

    Args:
      fns: Functions by name; each must block until its result is ready. They are called once before the measurement.
      repeats: Number of measured calls of each function.

    Returns:
      Time of each call, in seconds, by name.
    """
    for fn in fns.values():
        fn()
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            times[name].append(time.perf_counter() - start)
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns median and range."""
    return {'median': float(np.median(values)), 'lowest': min(values), 'highest': max(values)}


def matmul_peak(size: int = 2048, repeats: int = 10) -> float:
    """Measures the best FLOP/s of float32 matrix products of this size."""
    x = jnp.ones([size, size])
    product = jax.jit(jnp.matmul)
    times = in_turn({'product': lambda: product(x, x).block_until_ready()}, repeats)['product']
    return 2 * size**3 / min(times)


def text(values: Sequence[float], digits: int) -> str:
    """Formats values as `median [lowest, highest]`."""
    s = summary(values)
    return f'{s["median"]:,.{digits}f} [{s["lowest"]:,.{digits}f}, {s["highest"]:,.{digits}f}]'


def report(title: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path | None) -> None:
    """Prints rows as a table below a description of the machine, and writes both to a JSON file.

    Args:
      title: Title of the table.
      rows: Rows with the same keys; lists of numbers are printed as median and range, and written to JSON unchanged.
      about: Description of the machine, as returned by `machine`.
      path: JSON file; None for no file.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(', '.join(f'{name} {value}' for name, value in about.items()), highlight=False)
    table = Table(title=title, title_justify='left')
    for name in rows[0]:
        table.add_column(name, justify='left' if isinstance(rows[0][name], str) else 'right')
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)
    if path is not None:
        path.write_text(json.dumps({'machine': dict(about), 'rows': [dict(row) for row in rows]}, indent=2) + '\n')


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return text(value, 0 if np.median(value) >= 100 else 2)
    return f'{value:,.2f}' if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor()
