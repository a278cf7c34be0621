"""Summary of a run, printed when its process ends."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from impala_jax.rundir.files import EVALUATIONS, METRICS
from impala_jax.rundir.progress import format_duration
from impala_jax.rundir.rows import read_rows
from impala_jax.rundir.stats import RECENT_EPISODES
from impala_jax.system import program


def summary(workdir: Path) -> str:
    """A summary of a run's results in a few lines, from its files."""
    workdir = Path(workdir)
    lines = []
    rows = read_rows(workdir / METRICS)
    if rows:
        frames, wall_time_s = rows[-1]['frames'], rows[-1].get('wall_time_s', 0.0)
        lines.append(f'Trained     {frames:,} frames in {format_duration(wall_time_s)}')
        episodes = rows[-1].get('episodes', 0)
        recent = [row['episode_return_last_100'] for row in rows if 'episode_return_last_100' in row]
        if recent:
            count = min(episodes, RECENT_EPISODES)
            lines.append(f'Return      {recent[-1]:.2f}, mean of the last {count} training episode{"s"[: count != 1]}')
        else:
            lines.append('Return      no training episode has ended')
    evaluations = read_rows(workdir / EVALUATIONS)
    if evaluations:
        last = evaluations[-1]
        spread = ''.join(
            f', {label} {last[name]:.2f}'
            for name, label in (('stderr', 'standard error'), ('median_return', 'median'))
            if last.get(name) is not None
        )
        lines.append(
            f'Evaluation  {last["mean_return"]:.2f}, mean of {last["episodes"]} episodes{spread} '
            f'(at {last["frames"]:,} frames)'
        )
    lines.append(f'Files       {workdir}')
    lines.append(f'Evaluate    {program.command("evaluate")} --workdir {shlex.quote(str(workdir))} --episodes 100')
    return '\n'.join(lines)


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """Prints `summary` without wrapping, so that its last line can be copied."""
    print(summary(workdir), file=console.file if console else sys.stdout, flush=True)
