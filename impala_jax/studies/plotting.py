"""Figures of runs and of sweeps; `launch/plot.py` draws them from the command line.

A sweep's table has one row for each log point of each cell, which is one run: first the column `cell` (its name) and
the fields of `Config` that were swept, by their dotted names, then `frames` and the metrics, among them `final_return`,
the mean return of the final evaluation, the same on every row of a cell.

Means are over runs that differ in nothing but their seed. Where another field would be averaged over in silence, the
functions refuse, and say which. Intervals are 95 % percentile bootstrap intervals over the seeds of a mean.

matplotlib is imported by the first figure only. A figure belongs to whoever called, not to pyplot: save it with `save`,
or show it in a notebook after `%matplotlib inline`.
"""

from __future__ import annotations

import collections
import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from impala_jax.config import ConfigError, closest
from impala_jax.evaluation.scores import (
    AGGREGATES,
    estimate_text,
    human_normalised,
    paper_agents,
    resampled_means,
    task_label,
)
from impala_jax.rundir.format import problem
from impala_jax.rundir.metrics import EVALUATIONS, METRICS, RUN_CONFIG, SCHEDULE, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = dict[str, np.ndarray]
"""Column -> its values, [rows]: float64 (NaN where the file has nothing), or strings."""

FORMATS = ('.png', '.svg')

_DPI = 300
_POINTS = 500  # at most, of a mean curve
_CORRECTIONS = {
    'vtrace': 'V-trace',
    'one_step_is': '1-step IS',
    'epsilon_correction': 'ε-correction',
    'none': 'no correction',
}
_LABELS = {
    'environment.name': 'task',
    'episode_return': 'return of an episode',
    'episode_return_last_100': 'return (last 100 episodes)',
    'kl_behaviour_target': 'KL(behaviour, target)',
    'vtrace.correction': 'correction',
    'optimizer.learning_rate': 'learning rate',
    'policy_lag': 'policy lag (updates)',
    'policy_lag_mean': 'mean policy lag (updates)',
    'rho_bar': r'$\bar{\rho}$',
    'c_bar': r'$\bar{c}$',
    'vtrace.rho_bar': r'$\bar{\rho}$',
    'vtrace.c_bar': r'$\bar{c}$',
    'vtrace.pg_rho_bar': r"policy gradient's $\bar{\rho}$",
    'vtrace.lambda': r'$\lambda$',
}
# Okabe and Ito (2008), told apart by the colour-blind too; without its yellow, which is too light for lines.
_PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_HATCH = '////'
_Style = dict[str, Any]  # `color` and `linestyle`


class Matrix(NamedTuple):
    """A heat map to stand beside a measured one, such as what the theory predicts."""

    title: str
    x: Sequence[float]  # [X]
    y: Sequence[float]  # [Y]
    values: np.ndarray  # [Y, X]; NaN is left blank


class _Cell(NamedTuple):
    """A run: its fields, and where one metric of it is known."""

    name: str
    fields: dict[str, Any]
    frames: np.ndarray  # [N], ascending
    values: np.ndarray  # [N], finite

    @property
    def final(self) -> float:
        return float(self.values[-1])


def read_table(path: Path | str) -> Table:
    """Reads a sweep's `results.csv`.

    A column is numeric if all that it holds are numbers (`inf` is one) and, in front of `frames`, nothing is missing.

    Raises:
      ConfigError: there is no such file, or it is not a sweep's table.
    """
    path = Path(path)
    try:
        with path.open(newline='', encoding='utf-8') as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from error
    for name in ('cell', 'frames'):
        if name not in header:
            raise ConfigError(f'{path} is no table of a sweep: it has no column {name!r}')
    if not rows:
        raise ConfigError(f'{path} has no rows')
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ConfigError(f'{path}: row {number} has {len(row)} values for {len(header)} columns')
    table = {}
    for index, name in enumerate(header):
        column = [row[index] for row in rows]
        # Names of cells are hexadecimal: some look like numbers.
        numbers = None if name == 'cell' else _numbers(column, missing=index > header.index('frames'))
        table[name] = np.array(column) if numbers is None else numbers
    if table['frames'].dtype.kind != 'f' or np.isnan(table['frames']).any():
        raise ConfigError(f"{path}: the column 'frames' holds something that is no number")
    return table


def select(table: Table, values: Mapping[str, Any]) -> Table:
    """The rows whose columns have these values, which may be given as they are written in the file.

    Raises:
      ConfigError: an unknown column, or a value that it does not hold.
    """
    for name, wanted in values.items():
        column = _column(table, name)
        if column.dtype.kind == 'f':
            numbers = _numbers([str(wanted)], missing=False)
            keep = np.zeros(len(column), bool) if numbers is None else column == numbers
        else:
            keep = column == str(wanted)
        if not keep.any():
            held = ', '.join(_plain(value) for value in _distinct(column)[:20])
            raise ConfigError(f'no row has {name}={wanted}; {name} holds {held}')
        table = {other: column[keep] for other, column in table.items()}
    return table


def left_out(table: Table, metric: str = 'final_return') -> list[str]:
    """The cells that have no value of `metric`, as those that have not ended; no figure of it counts them.

    Raises:
      ConfigError: an unknown column, or one that is not numeric.
    """
    known = set(table['cell'][np.isfinite(_numeric(table, metric))])
    return [name for name in _distinct(table['cell']) if name not in known]


def bootstrap_interval(
    values: Any,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval of the mean over the first axis (Efron, 1979).

    With few values it is too narrow: of five normal ones, it holds the true mean in 84 % of cases, not in 95 %.

    Args:
      values: [N, ...]; the same N are drawn, with replacement, for all that the other axes hold.
      confidence: the share of the resamples' means between the limits.
      num_resamples: how often N values are drawn.
      seed: the same seed draws the same.
      strata: [N], what of each value was chosen and not sampled, such as its task: as many values are drawn of each
        stratum as it has, so that differences between strata do not count as noise. None: a single one.
    Returns:
      (low, high), each float64 [...]; NaN where a stratum has one value, which tells nothing about its spread.
    Raises:
      ValueError: no values, or a confidence or a number of resamples that cannot be.
    """
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must lie in (0, 1), got {confidence}')
    if num_resamples < 1:
        raise ValueError(f'num_resamples must be positive, got {num_resamples}')
    means = resampled_means(values, num_resamples, np.random.default_rng(seed), strata)
    if min(collections.Counter(strata or [None] * len(values)).values()) == 1:
        return np.full(means.shape[1:], np.nan), np.full(means.shape[1:], np.nan)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def learning_curve(workdirs: Sequence[Path | str]) -> Figure:
    """The returns of runs over frames, from their workdirs: a line a run, and a panel a task.

    Dots with bars are evaluations, with the standard error of their mean.

    Raises:
      ConfigError: something is no workdir, or no episode has ended there yet.
    """
    runs: dict[str, list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]] = {}
    paths = [Path(workdir) for workdir in workdirs]
    names = [path.name for path in paths] if len({path.name for path in paths}) == len(paths) else list(map(str, paths))
    for path, name in zip(paths, names, strict=True):
        rows = [row for row in read_rows(path / METRICS) if 'episode_return_last_100' in row]
        try:
            content = json.loads((path / RUN_CONFIG).read_text(encoding='utf-8'))
            unreadable = problem(content.get('format', 1))
            if unreadable:
                raise ConfigError(f'{path / RUN_CONFIG} {unreadable}')
            task = content['config']['environment']['name']
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f'{path} has no readable {RUN_CONFIG}; give the --workdir of a run') from error
        if not rows:
            raise ConfigError(f'{path / METRICS}: no episode has ended yet')
        runs.setdefault(task, []).append((name, rows, read_rows(path / EVALUATIONS)))

    figure, panels = _figure(len(runs))
    drawn = [run for task in runs.values() for run in task]
    scale, unit = _scale(max(rows[-1]['frames'] for _, rows, _ in drawn))
    styles = dict(zip(names, _palette(len(names)), strict=True))
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
                    # Alone, an evaluation need not share its run's colour, and stands out better.
                    color='black' if len(names) == 1 else styles[name]['color'],
                )
        _finish(axes, f'environment frames{unit}', _LABELS['episode_return'], _escape(task))
    from matplotlib.lines import Line2D

    training = 'training, mean of the last 100 episodes'
    handles = [
        Line2D([], [], label=training if len(names) == 1 else _escape(name), **style) for name, style in styles.items()
    ]
    episodes = sorted({row['episodes'] for _, _, evaluations in drawn for row in evaluations})
    if episodes:
        games = f'{episodes[0]} episodes' if len(episodes) == 1 else f'{episodes[0]} to {episodes[-1]} episodes'
        label = f'evaluation, {games}, standard error'
        handles.append(Line2D([], [], color='black', marker='o', markersize=4, linestyle='none', label=label))
    _legend(figure, handles)
    return figure


def curves(
    table: Table,
    metric: str = 'episode_return_last_100',
    hue: str | None = None,
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
) -> Figure:
    """A metric over frames: a line for each value of `hue`, a panel for each value of `panel`.

    Lines are means over runs, bands their intervals. A line reaches as far as all of its runs do.

    Args:
      table: of a sweep.
      metric: a numeric column.
      hue: a field, or None for one line a panel.
      panel: a field, or None for one panel.
      over: the fields to average over.
    Raises:
      ConfigError: an unknown column, or a field which a mean would go over and that is not in `over`.
    """
    groups = _groups(table, metric, [panel, hue], over)
    figure, panels = _figure(len(_values(table, panel)))
    scale, unit = _scale(float(np.max(table['frames'])))
    styles = _styles(table, hue)
    for axes, panel_value in zip(panels, _values(table, panel), strict=True):
        for hue_value, style in styles.items():
            cells = groups.get((panel_value, hue_value))
            if not cells:
                continue
            frames, values = _align(cells)
            low, high = _interval(cells, over, values)
            axes.plot(frames / scale, values.mean(axis=0), label=_text(hue, hue_value), **style)
            axes.fill_between(frames / scale, low, high, color=style['color'], alpha=0.2, linewidth=0)
        _finish(axes, f'environment frames{unit}', _label(metric), _title(panel, panel_value))
    _hue_legend(figure, hue, styles)
    return figure


def heatmap(
    table: Table,
    metric: str = 'final_return',
    x: str = 'vtrace.c_bar',
    y: str = 'vtrace.rho_bar',
    panel: str | None = None,
    theory: Matrix | None = None,
    over: Sequence[str] = ('seed',),
) -> Figure:
    """The mean of each run's last value of a metric on the grid of two fields, in the cells with half of its interval.

    Combinations that were not measured are blank; c_bar > rho_bar, for which Theorem 1 proves nothing, is hatched.

    Args:
      table: of a sweep.
      metric: a numeric column.
      x: a field.
      y: a field.
      panel: a field, with a panel for each of its values; or None.
      theory: drawn beside the panels, with a scale of its own.
      over: the fields to average over.
    Raises:
      ConfigError: an unknown column, or a field which a mean would go over and that is not in `over`.
      ValueError: the shape of `theory`'s values is not that of its labels.
    """
    if theory is not None and np.shape(theory.values) != (len(theory.y), len(theory.x)):
        raise ValueError(f'theory has values {np.shape(theory.values)} for {len(theory.y)} y and {len(theory.x)} x')
    groups = _groups(table, metric, [panel, y, x], over)
    xs, ys, panel_values = _values(table, x), _values(table, y), _values(table, panel)
    means = np.full((len(panel_values), len(ys), len(xs)), np.nan)
    halves = np.full_like(means, np.nan)
    for (panel_value, y_value, x_value), cells in groups.items():
        index = panel_values.index(panel_value), ys.index(y_value), xs.index(x_value)
        low, high = _interval(cells, over)
        means[index], halves[index] = np.mean([cell.final for cell in cells]), (high - low) / 2

    num_panels = len(panel_values) + (theory is not None)
    size = max(3.0, 0.75 * len(xs) + 0.5), max(2.6, 0.62 * len(ys) + 0.8)
    figure, panels = _figure(num_panels, size=size, grid=False)
    limits = _limits(means)
    mesh = None
    for axes, panel_value, mean, half in zip(panels, panel_values, means, halves, strict=False):
        mesh = _matrix(axes, x, y, xs, ys, mean, half, limits)
        _finish(axes, _label(x), _label(y), _title(panel, panel_value) or ('measured' if theory else ''))
    # In two lines, for a grid of three rows is no higher than that.
    label = _label(metric) + ('\n(± half of its 95 % interval)' if np.isfinite(halves).any() else '')
    assert mesh is not None
    figure.colorbar(mesh, ax=panels[: len(panel_values)], label=label)
    hatched = _outside_theory(x, y, xs, ys) & np.isfinite(means).any(axis=0)
    if theory is not None:
        axes, values = panels[-1], np.asarray(theory.values, np.float64)
        mesh = _matrix(axes, x, y, theory.x, theory.y, values, np.full_like(values, np.nan), _limits(values))
        _finish(axes, _label(x), _label(y), theory.title)
        figure.colorbar(mesh, ax=axes)
        outside = _outside_theory(x, y, theory.x, theory.y) & np.isfinite(values)
    else:
        outside = np.zeros(1, bool)
    if hatched.any() or outside.any():
        from matplotlib.patches import Patch

        label = rf'{_LABELS["c_bar"]} > {_LABELS["rho_bar"]}: outside the theory'
        _legend(figure, [Patch(facecolor='none', edgecolor='0.35', hatch=_HATCH, linewidth=0, label=label)])
    return figure


def ranked(
    table: Table,
    metric: str = 'final_return',
    hue: str | None = 'vtrace.correction',
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
) -> Figure:
    """The last values of a metric of all sets of hyperparameters, best first, a line for each value of `hue`.

    As in the paper's figures of stability across hyperparameters: a line that stays high is robust. A set is what is
    left of the fields without `hue`, `panel` and `over`, over which the mean is taken.

    Args:
      table: of a sweep.
      metric: a numeric column; higher is better.
      hue: a field, or None for one line a panel.
      panel: a field, or None for one panel.
      over: the fields to average over.
    Raises:
      ConfigError: an unknown column.
    """
    others = [name for name in _fields(table) if name not in (hue, panel, *over)]
    groups = _groups(table, metric, [panel, hue, *others], over)
    figure, panels = _figure(len(_values(table, panel)))
    styles = _styles(table, hue)
    for axes, panel_value in zip(panels, _values(table, panel), strict=True):
        for hue_value, style in styles.items():
            finals = sorted(
                (
                    float(np.mean([cell.final for cell in cells]))
                    for key, cells in groups.items()
                    if key[:2] == (panel_value, hue_value)
                ),
                reverse=True,
            )
            ranks = np.arange(1, len(finals) + 1)
            axes.plot(ranks, finals, marker='o', markersize=3, label=_text(hue, hue_value), **style)
        axes.locator_params(axis='x', integer=True)
        _finish(axes, 'rank of the hyperparameters', _label(metric), _title(panel, panel_value))
    _hue_legend(figure, hue, styles)
    return figure


def sensitivity(
    table: Table,
    field: str,
    metric: str = 'final_return',
    hue: str | None = None,
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
) -> Figure:
    """The mean of the last values of a metric against a field, with its interval, a line for each value of `hue`.

    The field's axis is logarithmic where its values are spread by a factor of ten or more, and has a place for inf.

    Args:
      table: of a sweep.
      field: a numeric field.
      metric: a numeric column.
      hue: a field, or None for one line a panel.
      panel: a field, or None for one panel.
      over: the fields to average over.
    Raises:
      ConfigError: an unknown column, one that is not numeric, or a field which a mean would go over and that is not in
        `over`.
    """
    _numeric(table, field)
    groups = _groups(table, metric, [panel, hue, field], over)
    figure, panels = _figure(len(_values(table, panel)))
    styles = _styles(table, hue)
    for axes, panel_value in zip(panels, _values(table, panel), strict=True):
        position = _knob_axis(axes, _values(table, field))
        for hue_value, style in styles.items():
            knob = [value for value in _values(table, field) if (panel_value, hue_value, value) in groups]
            if not knob:
                continue
            runs = [groups[panel_value, hue_value, value] for value in knob]
            low, high = np.transpose([_interval(cells, over) for cells in runs])
            means = [np.mean([cell.final for cell in cells]) for cells in runs]
            axes.plot(position(knob), means, marker='o', markersize=4, label=_text(hue, hue_value), **style)
            axes.fill_between(position(knob), low, high, color=style['color'], alpha=0.2, linewidth=0)
        _finish(axes, _label(field), _label(metric), _title(panel, panel_value))
    _hue_legend(figure, hue, styles)
    return figure


def pbt(workdir: Path | str) -> Figure:
    """A population's fitness and hyperparameters over frames, from its folder: a line a member, a dot where it copied.

    Raises:
      ConfigError: there is no population, or no member has begun.
    """
    schedules = {}
    for path in sorted(Path(workdir).glob(f'member_*/{SCHEDULE}')):
        # A member goes on with its last hyperparameters until where it is now.
        schedule, last = read_rows(path), read_rows(path.with_name(METRICS), last_bytes=100_000)[-1:]
        if schedule:
            schedules[path.parent.name] = schedule, max([row['frames'] for row in [schedule[-1], *last]])
    if not schedules:
        raise ConfigError(f'{workdir} holds no population; give the --workdir of launch/pbt.py')
    figure, panels = _figure(4, columns=2)
    scale, unit = _scale(max(end for _, end in schedules.values()))
    styles = dict(zip(schedules, _palette(len(schedules)), strict=True))
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
        _finish(axes, f'environment frames{unit}', '', _label(name))
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=member.replace('_', ' '), **style) for member, style in styles.items()]
    label = 'copies another member'
    handles.append(Line2D([], [], color='black', marker='o', markersize=4, linestyle='none', label=label))
    _legend(figure, handles)
    return figure


def bias_variance(
    rows: Iterable[Mapping[str, Any]],
    x: str = 'rho_bar',
    hue: str = 'c_bar',
    bias: str = 'bias',
    variance: str = 'variance',
) -> Figure:
    """Squared bias and variance of value targets against a knob, a panel each and a line for each value of `hue`.

    A scale is logarithmic where what is drawn is positive and spread by a factor of ten (the knob) or a hundred.

    Args:
      rows: dicts with the keys below, whose values are numbers, or strings of numbers such as 'inf'.
      x: the key of the knob.
      hue: the key that tells the lines apart.
      bias: the key of the SQUARED bias; it is drawn as it is.
      variance: the key of the variance.
    Raises:
      ConfigError: no rows, a key that a row lacks, or a value that is no number.
    """
    numbers = []
    for row in rows:
        try:
            numbers.append([float(row[key]) for key in (x, hue, bias, variance)])
        except KeyError as error:
            raise ConfigError(f'a row has no {error}; {closest(error.args[0], row)}') from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f'a row holds something that is no number: {dict(row)}') from error
    if not numbers:
        raise ConfigError('there are no rows to draw')
    data = np.array(numbers)  # [N, 4]
    hues = np.unique(data[:, 1]).tolist()
    styles = dict(zip(hues, _sequential(len(hues)), strict=True))
    figure, panels = _figure(2)
    for axes, column, label in zip(panels, (2, 3), ('squared bias', 'variance'), strict=True):
        position = _knob_axis(axes, np.unique(data[:, 0]).tolist())
        for i, (value, style) in enumerate(styles.items()):
            line = data[data[:, 1] == value]
            line = line[np.argsort(line[:, 0])]
            # Thinner and thinner, so that lines which coincide are all seen: the bias may not depend on `hue`.
            size = np.linspace(3, 1.2, len(styles))[i]
            at = position(line[:, 0])
            axes.plot(
                at, line[:, column], marker='o', linewidth=size, markersize=2.5 * size, label=_text(hue, value), **style
            )
        if _is_spread(data[:, column], 100):
            axes.set_yscale('log')
        _finish(axes, _label(x), '', '')
        axes.set_ylabel(f'{label} of the value targets')
    _hue_legend(figure, hue, styles)
    return figure


def suite(result: Mapping[str, Any]) -> Figure:
    """Human-normalised scores of a suite's tasks as bars, best first, and as marks those of the paper's agents.

    Bars end in their 95 % bootstrap intervals; the line at 100 % is the human. Where no human scores are known, they
    are mean returns with their standard errors.

    Args:
      result: of `impala_jax.evaluate` on a suite, or what its JSON file holds.
    Raises:
      ConfigError: it is not of a suite.
    """
    if not isinstance(result, dict) or not result.get('tasks') or 'aggregates' not in result:
        raise ConfigError('these are no scores of a suite: write them with launch/evaluate.py --suite ... --json FILE')
    agents = paper_agents(result['environment'])
    human = all(scores['human_normalised'] is not None for scores in result['tasks'].values())
    key = 'human_normalised' if human else 'mean_return'
    tasks = sorted(result['tasks'], key=lambda task: result['tasks'][task][key])
    values = np.array([result['tasks'][task][key] for task in tasks])
    errors = np.zeros((2, len(tasks)))
    for i, scores in enumerate(result['tasks'][task] for task in tasks):
        if not human:
            errors[:, i] = scores['stderr']
        elif scores['human_normalised_interval'] is not None:
            low, high = scores['human_normalised_interval']
            errors[:, i] = max(0.0, values[i] - low), max(0.0, high - values[i])

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, (axes,) = _figure(1, size=(7.5, 0.19 * len(tasks) + 1.2))
    places = np.arange(len(tasks))
    axes.barh(places, values, height=0.7, color=_PALETTE[0], alpha=0.4)
    axes.errorbar(values, places, xerr=errors, fmt='none', ecolor='black', elinewidth=1.0, capsize=1.5)
    handles: list[Any] = [Patch(color=_PALETTE[0], alpha=0.4, label='this run')]
    drawn = [values]
    # Hollow but for the first, and larger and larger, so that those which coincide are all seen.
    for i, (agent, marker, color) in enumerate(zip(agents, 'osD', _PALETTE[1:], strict=False)):
        drawn.append(np.array([agent.score(task) for task in tasks]))
        style = {'marker': marker, 'color': color, 'linestyle': 'none', 'markersize': 3.5 + i}
        style['markerfacecolor'] = 'none' if i else color
        axes.plot(drawn[-1], places, **style)
        handles.append(Line2D([], [], label=agent.label, **style))
    if human:
        handles.append(axes.axvline(100, color='0.3', linewidth=1.0, linestyle='--', label='human'))
        if max(np.max(scores) for scores in drawn) > 1000:
            axes.set_xscale('symlog', linthresh=10)
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_yticks(places, [_escape(task_label(task)) for task in tasks], fontsize=7)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.margins(x=0.03)
    axes.grid(visible=False, axis='y')
    # The mean is what a few games with large scores make it, and is left to the table.
    headlines = [
        f'{AGGREGATES.get(name, "mean")}: {estimate_text(scores["value"], scores["interval"], 1 if human else 2)}'
        for name, scores in result['aggregates'].items()
        if name != 'mean'
    ]
    title = f'{result["environment"]} at {result["frames"]:,} frames\n' + '; '.join(headlines)
    _finish(axes, 'human-normalised score (%)' if human else _LABELS['episode_return'], '', _escape(title))
    _legend(figure, handles)
    return figure


def experts(table: Table, workdir: Path | str | None = None) -> Figure:
    """Experts against the agent that was trained on all tasks of a suite, with the same total of frames, a pair a task.

    As in the paper's comparison of experts and multi-task training (section 5.3.1): where the multi-task agent's bar is
    the longer one, the other tasks have helped. Bars are means over seeds, with their intervals: human-normalised, in
    percent, where human scores are known of all tasks.

    Args:
      table: of a sweep of `ablation.experts`.
      workdir: of a multi-task run apart from it, whose last evaluation is shown; None: that of the sweep.
    Raises:
      ConfigError: there are no experts, or no multi-task agent, or another one's.
    """
    finals: dict[str, dict[str, list[float]]] = {'experts': {}, 'multi-task': {}}
    whole = {name.removeprefix('final_return/') for name in table if name.startswith('final_return/')}
    for cell in _cells(table, 'final_return'):
        task = cell.fields.get('task', '')
        finals['experts'].setdefault(task, []).append(cell.final)
    for task in whole:
        finals['multi-task'][task] = [cell.final for cell in _cells(table, f'final_return/{task}')]
    if workdir is not None:
        last = (read_rows(Path(workdir) / EVALUATIONS) or [{}])[-1]
        means = {name.partition('/')[2]: value for name, value in last.items() if name.startswith('mean_return/')}
        finals['multi-task'] = {task: [value] for task, value in means.items()}
    tasks = [task for task in finals['experts'] if task in finals['multi-task']]
    if not tasks:
        where = 'this table' if workdir is None else workdir
        raise ConfigError(
            f'{where} has no agent that was trained on all tasks of experts that have ended: train it with '
            'launch/experts.py, or give the --workdir of its run'
        )
    human = all(human_normalised(task, 0.0) is not None for task in tasks)
    if human:
        for agent in finals.values():
            for task in tasks:
                agent[task] = [human_normalised(task, value) or 0.0 for value in agent[task]]
    mean = {name: [float(np.mean(agent[task])) for task in tasks] for name, agent in finals.items()}
    gains = np.subtract(mean['multi-task'], mean['experts'])
    order = np.argsort(gains, kind='stable')  # Upwards: what gains most is on top.
    tasks = [tasks[i] for i in order]

    from matplotlib.patches import Patch

    figure, (axes,) = _figure(1, size=(7.5, 0.34 * len(tasks) + 1.2))
    places, handles = np.arange(len(tasks)), []
    for offset, (name, agent) in zip((-0.19, 0.19), finals.items(), strict=True):
        values = [np.mean(agent[task]) for task in tasks]
        color = _PALETTE[0] if name == 'multi-task' else '0.6'
        axes.barh(places + offset, values, height=0.36, color=color, alpha=0.8)
        limits = np.transpose([bootstrap_interval(agent[task]) for task in tasks])  # [2, tasks]
        errors = np.nan_to_num(np.abs(limits - values))
        axes.errorbar(values, places + offset, xerr=errors, fmt='none', ecolor='black', elinewidth=1.0, capsize=1.5)
        handles.insert(0, Patch(color=color, alpha=0.8, label=name))
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_yticks(places, [_escape(task_label(task)) for task in tasks], fontsize=8)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.grid(visible=False, axis='y')
    decimals = 1 if human else 2
    means = {name: np.minimum(values, 100.0) if human else values for name, values in mean.items()}
    title = 'mean capped at 100' if human else 'mean'
    title += ': ' + ', '.join(f'{name} {np.mean(means[name]):.{decimals}f}' for name in ('multi-task', 'experts'))
    title += f'; multi-task is better on {int((gains > 0).sum())} of {len(tasks)} tasks'
    _finish(axes, 'human-normalised score (%)' if human else _LABELS['episode_return'], '', title)
    _legend(figure, handles)
    return figure


def results_table(
    table: Table,
    hue: str = 'vtrace.correction',
    panel: str | None = None,
    split: str | None = None,
    metric: str = 'final_return',
    over: Sequence[str] = ('seed',),
    markdown: bool = False,
) -> str:
    """The mean of each run's last value of a metric with its interval, as text, laid out as the paper's table 2.

    Args:
      table: of a sweep.
      hue: a field, with a row for each of its values.
      panel: a field, with a column for each of its values; or None.
      split: a field, each of whose values gets a column of its own within those of `panel`; or None.
      metric: a numeric column; higher is better.
      over: the fields to average over.
      markdown: a table of Markdown, with the best of each column bold; otherwise aligned text, the best with a star.
    Raises:
      ConfigError: an unknown column, or a field which a mean would go over and that is not in `over`.
    """
    groups = _groups(table, metric, [hue, panel, split], over)
    finals = {key: [cell.final for cell in cells] for key, cells in groups.items()}
    means = {key: float(np.mean(values)) for key, values in finals.items()}
    columns = [
        (panel_value, split_value)
        for panel_value in _values(table, panel)
        for split_value in _values(table, split)
        if any(key[1:] == (panel_value, split_value) for key in groups)
    ]
    of_column = {column: [mean for key, mean in means.items() if key[1:] == column] for column in columns}

    def heading(name: str | None, value: Any) -> str:
        return '' if name is None else value if isinstance(value, str) else f'{name}={_plain(value)}'

    def entry(key: tuple[Any, ...]) -> str:
        if key not in means:
            return '-'
        low, high = _interval(groups[key], over)
        decimals = _decimals(np.array(of_column[key[1:]]))
        text = f'{means[key]:.{decimals}f}'
        if np.isfinite(low):
            text += f' [{low:.{decimals}f}, {high:.{decimals}f}]'
        if means[key] < max(of_column[key[1:]]):
            return text
        return f'**{text}**' if markdown else f'{text}*'

    headings = [(heading(panel, a) or metric, heading(split, b)) for a, b in columns]
    if markdown:
        header = [[hue, *(', '.join(filter(None, words)) for words in headings)]]
    else:
        header = [[hue, *(word for word, _ in headings)], ['', *(word for _, word in headings)]][
            : 1 + (split is not None)
        ]
    body = [[_text(hue, value), *(entry((value, *c)) for c in columns)] for value in _values(table, hue)]
    widths = [max(map(len, texts)) for texts in zip(*header, *body, strict=True)]
    rows = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in header + body]
    rows.insert(len(header), ['-' * width for width in widths])
    if markdown:
        text = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    else:
        text = '\n'.join('  '.join(row).rstrip() for row in rows)
    counts = sorted({len(values) for values in finals.values()})
    runs = f'{counts[0]} to {counts[-1]} runs' if len(counts) > 1 else f'{counts[0]} run{"s" * (counts[0] > 1)}'
    interval = ' [95 % bootstrap interval]' if counts[-1] > 1 else ''
    mark = 'bold' if markdown else '*'
    return f'{text}\n\n{metric}, mean of {runs}{interval}; {mark}: the best of its column\n'


def save(figure: Figure, path: Path | str) -> None:
    """Writes a figure as PNG (300 dots an inch) or SVG; the same figure gives the same bytes.

    Raises:
      ConfigError: another ending, or no such directory.
    """
    check_output(path)
    import matplotlib

    svg = Path(path).suffix == '.svg'
    with matplotlib.rc_context({'svg.hashsalt': 'impala_jax'}):
        figure.savefig(path, dpi=_DPI, metadata={'Date': None} if svg else None)


def check_output(path: Path | str, option: str = '--output') -> None:
    """Raises ConfigError, which names the option, if `save` could not write there; to be asked before long work."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f'{option} {path}: the name must end in {" or ".join(FORMATS)}')
    if not path.absolute().parent.is_dir():
        raise ConfigError(f'{option} {path}: there is no directory {path.absolute().parent}')
    _require_matplotlib()


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib: pip install 'impala_jax[plot]' ({error})") from error


def _numbers(column: Sequence[str], missing: bool) -> np.ndarray | None:
    """The numbers in a column of strings, NaN for nothing if that is allowed; or None."""
    try:
        numbers = np.array([float(value) if value else math.nan for value in column])
    except ValueError:
        return None
    return numbers if missing or not np.isnan(numbers).any() else None


def _column(table: Table, name: str) -> np.ndarray:
    if name not in table:
        raise ConfigError(f'unknown column {name!r}; {closest(name, table)}')
    return table[name]


def _numeric(table: Table, name: str) -> np.ndarray:
    column = _column(table, name)
    if column.dtype.kind != 'f':
        raise ConfigError(f'the column {name!r} holds {column[0]!r}, not only numbers')
    return column


def _fields(table: Table) -> list[str]:
    """The swept fields: the columns in front of `frames`, without `cell`."""
    names = list(table)
    return [name for name in names[: names.index('frames')] if name != 'cell']


def _distinct(column: np.ndarray) -> list[Any]:
    """Numbers ascending; strings by their first row, which is the order of the sweep."""
    return np.unique(column).tolist() if column.dtype.kind == 'f' else list(dict.fromkeys(column.tolist()))


def _values(table: Table, name: str | None) -> list[Any]:
    """The values of a field, in the order in which they are shown; [None] for no field."""
    if name is None:
        return [None]
    values = _distinct(_column(table, name))
    if name == 'vtrace.correction' and set(values) <= set(_CORRECTIONS):
        values.sort(key=list(_CORRECTIONS).index)
    return values


def _cells(table: Table, metric: str) -> list[_Cell]:
    """The runs that have a value of `metric`."""
    fields, metric_column = _fields(table), _numeric(table, metric)
    known = np.flatnonzero(np.isfinite(metric_column))
    known = known[np.argsort(table['frames'][known], kind='stable')]
    _, inverse = np.unique(table['cell'][known], return_inverse=True)
    cells = []
    for rows in np.split(known[np.argsort(inverse, kind='stable')], np.cumsum(np.bincount(inverse))[:-1]):
        if len(rows):
            values = {field: table[field][rows[0]].item() for field in fields}
            cells.append(_Cell(str(table['cell'][rows[0]]), values, table['frames'][rows], metric_column[rows]))
    return cells


def _groups(
    table: Table, metric: str, names: Sequence[str | None], over: Sequence[str]
) -> dict[tuple[Any, ...], list[_Cell]]:
    """Values of the fields `names` (None for None) -> the runs with these, which differ only in the fields `over`."""
    fields = _fields(table)
    for name in [*names, *over]:
        # Without this one, 'seed' need not have been swept.
        if name is not None and name not in fields and (name != 'seed' or name in names):
            raise ConfigError(f'{name!r} is no field of this sweep; {closest(name, fields)}')
    cells = _cells(table, metric)
    if not cells:
        raise ConfigError(f'no run has a value of {metric!r} yet')
    groups: dict[tuple[Any, ...], list[_Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(name if name is None else cell.fields[name] for name in names), []).append(cell)
    for field in fields:
        if field in names or field in over:
            continue
        for group in groups.values():
            values = {cell.fields[field] for cell in group}
            if len(values) > 1:
                raise ConfigError(
                    f'{field} varies within one mean ({", ".join(map(_plain, sorted(values)))}): '
                    f'choose one with --where {field}=..., show it (as --panel), or average with --over'
                )
    return groups


def _interval(cells: Sequence[_Cell], over: Sequence[str], values: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the mean of `values` [runs, ...] of these runs, by default of their last ones.

    Only seeds are drawn: the values of the other fields in `over` were chosen.
    """
    strata = [tuple(cell.fields[name] for name in over if name != 'seed') for cell in cells]
    return bootstrap_interval([cell.final for cell in cells] if values is None else values, strata=strata)


def _align(cells: Sequence[_Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Frames [P] where all the runs are known, and their values there, [runs, P], interpolated between log points."""
    first, last = max(cell.frames[0] for cell in cells), min(cell.frames[-1] for cell in cells)
    if first > last:
        raise ConfigError(
            f'no mean can be drawn: the runs {", ".join(cell.name for cell in cells)} have no frames in common'
        )
    frames = np.unique(np.concatenate([cell.frames for cell in cells]))
    frames = frames[(frames >= first) & (frames <= last)]
    if len(frames) > _POINTS:
        frames = np.linspace(first, last, _POINTS)
    return frames, np.stack([np.interp(frames, cell.frames, cell.values) for cell in cells])


def _figure(
    num_panels: int, size: tuple[float, float] | None = None, grid: bool = True, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """An empty figure of panels of `size` (inches), `columns` a row."""
    _require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(num_panels, columns)
    rows = math.ceil(num_panels / columns)
    width, height = size or ((6.0, 3.8) if num_panels == 1 else (3.6, 2.9))
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout='constrained')
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.remove()
    for axes in panels[:num_panels]:
        axes.spines[['top', 'right']].set_visible(False)
        if grid:
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
    return figure, panels[:num_panels]


def _finish(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(x_label)
    # Panels beside each other measure the same.
    spec = axes.get_subplotspec()
    if spec is None or spec.is_first_col():
        axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11)


def _legend(figure: Figure, handles: Sequence[Any], title: str | None = None) -> None:
    """Below the panels, where it covers nothing."""
    widths = [0.65 + 0.075 * len(handle.get_label()) for handle in handles]  # inches, about
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        if sum(max(widths[i : i + rows]) for i in range(0, len(widths), rows)) < figure.get_figwidth():
            break
    figure.legend(handles=list(handles), loc='outside lower center', ncols=columns, frameon=False, title=title)


def _hue_legend(figure: Figure, hue: str | None, styles: Mapping[Any, _Style]) -> None:
    if hue is None:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_escape(_text(hue, value)), **style) for value, style in styles.items()]
    _legend(figure, handles, title=_label(hue))


def _styles(table: Table, hue: str | None) -> dict[Any, _Style]:
    """Value of `hue` -> its colour and line style, the same in all panels; corrections keep theirs in all figures."""
    values = _values(table, hue)
    if isinstance(values[0], float):
        return dict(zip(values, _sequential(len(values)), strict=True))
    if hue == 'vtrace.correction' and set(values) <= set(_CORRECTIONS):
        styles = dict(zip(_CORRECTIONS, _palette(len(_CORRECTIONS)), strict=True))
        return {value: styles[value] for value in values}
    return dict(zip(values, _palette(len(values)), strict=True))


def _palette(count: int) -> list[_Style]:
    """For what has no order; after the last colour the line style changes."""
    size, line_styles = len(_PALETTE), ('-', '--', ':', '-.')
    return [{'color': _PALETTE[i % size], 'linestyle': line_styles[i // size % 4]} for i in range(count)]


def _sequential(count: int) -> list[_Style]:
    """For numbers: from dark to light, without viridis' yellow, which is too light for lines."""
    _require_matplotlib()
    from matplotlib import colormaps

    return [{'color': colormaps['viridis'](position), 'linestyle': '-'} for position in np.linspace(0, 0.85, count)]


def _outside_theory(x: str, y: str, xs: Sequence[Any], ys: Sequence[Any]) -> np.ndarray:
    """[Y, X]: is c_bar > rho_bar there? Nowhere, if these are not the axes."""
    if {x, y} != {'vtrace.c_bar', 'vtrace.rho_bar'}:
        return np.zeros((len(ys), len(xs)), bool)
    column, row = np.asarray(xs, np.float64)[None, :], np.asarray(ys, np.float64)[:, None]
    return column > row if x == 'vtrace.c_bar' else row > column


def _matrix(
    axes: Axes,
    x: str,
    y: str,
    xs: Sequence[Any],
    ys: Sequence[Any],
    values: np.ndarray,
    halves: np.ndarray,
    limits: tuple[float, float],
) -> Any:
    """Draws values [Y, X], written into their cells with +- halves [Y, X]; hatches what is outside the theory."""
    from matplotlib.patches import Rectangle

    mesh = axes.pcolormesh(
        np.arange(len(xs)),
        np.arange(len(ys)),
        np.ma.masked_invalid(values),
        vmin=limits[0],
        vmax=limits[1],
        cmap='viridis',
    )
    outside, decimals = _outside_theory(x, y, xs, ys), _decimals(values)
    for row, column in np.argwhere(np.isfinite(values)):
        color = mesh.cmap(mesh.norm(values[row, column]))
        dark = np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.55
        ink = 'white' if dark else 'black'
        if outside[row, column]:
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, hatch=_HATCH, edgecolor=ink, alpha=0.45, linewidth=0
                )
            )
        text = f'{values[row, column]:.{decimals}f}'
        if np.isfinite(halves[row, column]):
            text += f'\n±{halves[row, column]:.{decimals}f}'
        # On a patch of the cell's own colour, so that hatching does not run through it.
        box = {'facecolor': color, 'edgecolor': 'none', 'pad': 1.0} if outside[row, column] else None
        axes.text(column, row, text, ha='center', va='center', fontsize=8, color=ink, bbox=box)
    axes.set_xticks(range(len(xs)), [_escape(_text(x, value)) for value in xs])
    axes.set_yticks(range(len(ys)), [_escape(_text(y, value)) for value in ys])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def _is_spread(values: Any, factor: float) -> bool:
    """Are all (but the infinite ones) positive, and the largest at least `factor` times the smallest?"""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return len(values) > 1 and values.min() > 0 and values.max() >= factor * values.min()


def _knob_axis(axes: Axes, values: Sequence[float]) -> Callable[[Any], np.ndarray]:
    """Sets the x axis up for a knob's ascending values; returns where on it a value lies: inf one step beyond."""
    finite = [value for value in values if math.isfinite(value)]
    logarithmic = _is_spread(finite, 10)
    if len(finite) > 1:
        beyond = finite[-1] ** 2 / finite[-2] if logarithmic else 2 * finite[-1] - finite[-2]
    else:
        beyond = finite[0] + 1 if finite else 0.0

    def position(values: Any) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return np.where(np.isinf(values), beyond, values)

    if logarithmic:
        axes.set_xscale('log')
    # A few values are named each; of many, the axis names round ones, and infinity.
    if len(values) <= 8:
        axes.set_xticks(position(values), [_text(None, value) for value in values])
        axes.set_xticks([], minor=True)
    elif len(finite) < len(values):
        axes.axvline(beyond, color='0.7', linewidth=0.8, linestyle=':')
        axes.annotate('∞', (beyond, 1), xycoords=('data', 'axes fraction'), ha='center', va='bottom')
    return position


def _scale(frames: float) -> tuple[float, str]:
    """What to divide frames by, and how to say so."""
    for scale, unit in ((1e6, ' (million)'), (1e3, ' (thousand)')):
        if frames >= scale:
            return scale, unit
    return 1.0, ''


def _decimals(values: np.ndarray) -> int:
    """As many as show two or three digits of the largest: 0.98, 12.3, 250.8."""
    largest = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    if largest == 0:
        return 1
    magnitude = math.floor(math.log10(largest))
    return 1 - magnitude if magnitude < 0 else max(1, 2 - magnitude)


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace('.', ' ').replace('_', ' '))


def _text(field: str | None, value: Any) -> str:
    """A field's value, as figures and tables show it."""
    if field == 'vtrace.correction' and isinstance(value, str):
        return _CORRECTIONS.get(value, value)
    if isinstance(value, float) and math.isinf(value):
        return '∞' if value > 0 else '-∞'
    return _plain(value)


def _plain(value: Any) -> str:
    """A value as it is written in a table's file."""
    return f'{value:.10g}' if isinstance(value, float) else str(value)


def _title(panel: str | None, value: Any) -> str:
    if panel is None:
        return ''
    text = _escape(_text(panel, value))
    return text if isinstance(value, str) else f'{_label(panel).split(" (")[0]} = {text}'


def _escape(text: str) -> str:
    """matplotlib sets what stands between dollars as mathematics."""
    return text.replace('$', r'\$')
