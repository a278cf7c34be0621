"""Figures over environment frames: curves of runs, of a sweep, and of a population."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.rundir.files import EVALUATIONS, METRICS, RUN_CONFIG, SCHEDULE
from impala_jax.rundir.format import problem
from impala_jax.rundir.rows import read_rows
from impala_jax.studies.plotting.figures import (
    add_caption,
    add_hue_legend,
    add_legend,
    finish_axes,
    hue_styles,
    new_figure,
    palette,
)
from impala_jax.studies.plotting.labels import escape, frames_scale, label_of, panel_title, value_text
from impala_jax.studies.plotting.tables import (
    Table,
    align,
    caption,
    estimate,
    field_values,
    group_cells,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curve(workdirs: Sequence[Path | str]) -> Figure:
    """Draws the returns of runs over frames, one line per run and one panel per task.

    Dots with error bars are evaluations, with the standard error of their mean.

    Args:
      workdirs: Folders of the runs.

    Returns:
      The figure.

    Raises:
      ConfigError: A folder does not contain a run, or no episode of it has ended yet.
    """
    runs: dict[str, list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]] = {}
    paths = [Path(workdir) for workdir in workdirs]
    names = [path.name for path in paths] if len({path.name for path in paths}) == len(paths) else list(map(str, paths))
    for path, name in zip(paths, names, strict=True):
        task = _task(path)
        rows = [row for row in read_rows(path / METRICS) if 'episode_return_last_100' in row]
        if not rows:
            raise ConfigError(f'{path / METRICS}: no episode has ended yet')
        runs.setdefault(task, []).append((name, rows, read_rows(path / EVALUATIONS)))

    figure, panels = new_figure(len(runs))
    drawn = [run for task in runs.values() for run in task]
    scale, unit = frames_scale(max(rows[-1]['frames'] for _, rows, _ in drawn))
    styles = dict(zip(names, palette(len(names)), strict=True))
    for axes, (task, members) in zip(panels, runs.items(), strict=True):
        for name, rows, evaluations in members:
            returns = [row['episode_return_last_100'] for row in rows]
            axes.plot([row['frames'] / scale for row in rows], returns, label=name, **styles[name])
            if evaluations:
                axes.errorbar(
                    [row['frames'] / scale for row in evaluations],
                    [row['mean_return'] for row in evaluations],
                    [row['stderr'] for row in evaluations],
                    fmt='o',
                    markersize=4,
                    capsize=2,
                    # With a single run, black dots stand out better than dots in the colour of the run.
                    color='black' if len(names) == 1 else styles[name]['color'],
                )
        finish_axes(axes, f'environment frames{unit}', label_of('episode_return'), escape(task))
    from matplotlib.lines import Line2D

    training = 'training, mean of the last 100 episodes'
    handles = [
        Line2D([], [], label=training if len(names) == 1 else escape(name), **style) for name, style in styles.items()
    ]
    episodes = sorted({row['episodes'] for _, _, evaluations in drawn for row in evaluations})
    if episodes:
        games = f'{episodes[0]} episodes' if len(episodes) == 1 else f'{episodes[0]} to {episodes[-1]} episodes'
        label = f'evaluation, {games}, standard error'
        handles.append(Line2D([], [], color='black', marker='o', markersize=4, linestyle='none', label=label))
    add_legend(figure, handles)
    return figure


def _task(workdir: Path) -> str:
    """Returns the name of the environment that a run was trained on."""
    path = workdir / RUN_CONFIG
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        unreadable = problem(content.get('format', 1))
        if unreadable:
            raise ConfigError(f'{path} {unreadable}')
        return content['config']['environment']['name']
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f'{workdir} has no readable {RUN_CONFIG}; give the --workdir of a run') from error


def curves(
    table: Table,
    metric: str = 'episode_return_last_100',
    hue: str | None = None,
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
    statistic: str = 'mean',
) -> Figure:
    """Draws a metric over frames, with a line for each value of `hue` and a panel for each value of `panel`.

    Lines are means, or another statistic, over runs, and bands are their intervals. A line covers the frames that all
    of its runs have.

    Args:
      table: Table of a sweep.
      metric: Name of a numeric column.
      hue: Name of a field; None for one line per panel.
      panel: Name of a field; None for one panel.
      over: Names of the fields to average over.
      statistic: Name of the statistic over runs, in `STATISTICS`.

    Returns:
      The figure.

    Raises:
      ConfigError: A column is unknown, or runs in a mean differ in a field that is not in `over`.
    """
    groups = group_cells(table, metric, [panel, hue], over)
    figure, panels = new_figure(len(field_values(table, panel)))
    scale, unit = frames_scale(float(np.max(table['frames'])))
    styles = hue_styles(table, hue)
    for axes, panel_value in zip(panels, field_values(table, panel), strict=True):
        for hue_value, style in styles.items():
            cells = groups.get((panel_value, hue_value))
            if not cells:
                continue
            frames, values = align(cells)
            value, low, high = estimate(cells, over, statistic, values)
            axes.plot(frames / scale, value, label=value_text(hue, hue_value), **style)
            axes.fill_between(frames / scale, low, high, color=style['color'], alpha=0.2, linewidth=0)
        finish_axes(axes, f'environment frames{unit}', label_of(metric), panel_title(panel, panel_value))
    add_hue_legend(figure, hue, styles)
    add_caption(figure, caption(groups.values(), over, statistic))
    return figure


def pbt(workdir: Path | str) -> Figure:
    """Draws the fitness and hyperparameters of a population over frames.

    There is one line per member, and a dot where it copied another member.

    Args:
      workdir: Folder of the population.

    Returns:
      The figure.

    Raises:
      ConfigError: The folder does not contain a population, or no member has started yet.
    """
    schedules = {}
    for path in sorted(Path(workdir).glob(f'member_*/{SCHEDULE}')):
        # The last hyperparameters of a member are valid up to its latest frame.
        schedule, last = read_rows(path), read_rows(path.with_name(METRICS), last_bytes=100_000)[-1:]
        if schedule:
            schedules[path.parent.name] = schedule, max([row['frames'] for row in [schedule[-1], *last]])
    if not schedules:
        raise ConfigError(f'{workdir} holds no population; give the --workdir of launch/pbt.py')
    figure, panels = new_figure(4, columns=2)
    scale, unit = frames_scale(max(end for _, end in schedules.values()))
    styles = dict(zip(schedules, palette(len(schedules)), strict=True))
    for axes, name in zip(panels, ('fitness', 'learning_rate', 'entropy_cost', 'epsilon'), strict=True):
        for member, (schedule, end) in schedules.items():
            rows = [row for row in schedule if row[name] is not None]
            copies = [row for row in rows if row.get('copied')]
            frames, values = [row['frames'] for row in rows], [row[name] for row in rows]
            if name != 'fitness':
                frames, values = [*frames, end], [*values, values[-1]]
            draw = axes.plot if name == 'fitness' else partial(axes.step, where='post')
            draw(np.divide(frames, scale), values, **styles[member])
            axes.plot(
                [row['frames'] / scale for row in copies],
                [row[name] for row in copies],
                marker='o',
                markersize=4,
                linestyle='none',
                color=styles[member]['color'],
            )
        if name != 'fitness':
            axes.set_yscale('log')
        finish_axes(axes, f'environment frames{unit}', '', label_of(name))
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=member.replace('_', ' '), **style) for member, style in styles.items()]
    label = 'copies another member'
    handles.append(Line2D([], [], color='black', marker='o', markersize=4, linestyle='none', label=label))
    add_legend(figure, handles)
    return figure
