"""Figures of final values against hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from impala_jax.config import ConfigError, closest
from impala_jax.studies.plotting.figures import (
    add_caption,
    add_hue_legend,
    finish_axes,
    hue_styles,
    new_figure,
    sequential,
)
from impala_jax.studies.plotting.labels import label_of, panel_title, value_text
from impala_jax.studies.plotting.tables import (
    Table,
    caption,
    estimate,
    field_values,
    group_cells,
    numeric_column,
    statistic_function,
    swept_fields,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ranked(
    table: Table,
    metric: str = 'final_return',
    hue: str | None = 'vtrace.correction',
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
    statistic: str = 'mean',
) -> Figure:
    """Draws the last values of a metric for all sets of hyperparameters, best first, a line for each value of `hue`.

    As in the paper's figures of stability across hyperparameters, a line that stays high is robust. A set of
    hyperparameters consists of all fields except `hue`, `panel` and those in `over`, which are averaged over.

    Args:
      table: Table of a sweep.
      metric: Name of a numeric column; higher is better.
      hue: Name of a field; None for one line per panel.
      panel: Name of a field; None for one panel.
      over: Names of the fields to average over.
      statistic: Name of the statistic over runs, in `STATISTICS`.

    Returns:
      The figure.

    Raises:
      ConfigError: A column is unknown.
    """
    aggregate = statistic_function(statistic)
    others = [name for name in swept_fields(table) if name not in (hue, panel, *over)]
    groups = group_cells(table, metric, [panel, hue, *others], over)
    figure, panels = new_figure(len(field_values(table, panel)))
    styles = hue_styles(table, hue)
    for axes, panel_value in zip(panels, field_values(table, panel), strict=True):
        for hue_value, style in styles.items():
            finals = sorted(
                (
                    float(aggregate([cell.final for cell in cells]))
                    for key, cells in groups.items()
                    if key[:2] == (panel_value, hue_value)
                ),
                reverse=True,
            )
            ranks = np.arange(1, len(finals) + 1)
            axes.plot(ranks, finals, marker='o', markersize=3, label=value_text(hue, hue_value), **style)
        axes.locator_params(axis='x', integer=True)
        finish_axes(axes, 'rank of the hyperparameters', label_of(metric), panel_title(panel, panel_value))
    add_hue_legend(figure, hue, styles)
    add_caption(figure, caption(groups.values(), over, statistic))
    return figure


def sensitivity(
    table: Table,
    field: str,
    metric: str = 'final_return',
    hue: str | None = None,
    panel: str | None = None,
    over: Sequence[str] = ('seed',),
    statistic: str = 'mean',
    against: str | None = None,
) -> Figure:
    """Draws means over runs of the last value of a metric against a field, with intervals, a line for each `hue`.

    With `against`, the x axis is not the field, but what the field did: the mean of another metric over the rows of the
    runs, such as `kl_behaviour_target` for the policy lag. The field's axis is logarithmic if its values span a factor
    of ten or more, and has positions for 0 and inf.

    Args:
      table: Table of a sweep.
      field: Name of a numeric field.
      metric: Name of a numeric column.
      hue: Name of a field; None for one line per panel.
      panel: Name of a field; None for one panel.
      over: Names of the fields to average over.
      statistic: Name of the statistic over runs, in `STATISTICS`.
      against: Name of a numeric column, the x axis; None for the field.

    Returns:
      The figure.

    Raises:
      ConfigError: A column is unknown or not numeric, or runs in a mean differ in a field that is not in `over`.
    """
    numeric_column(table, field)
    groups = group_cells(table, metric, [panel, hue, field], over)
    places = {} if against is None else group_cells(table, against, [panel, hue, field], over)
    figure, panels = new_figure(len(field_values(table, panel)))
    styles = hue_styles(table, hue)
    for axes, panel_value in zip(panels, field_values(table, panel), strict=True):
        position = _knob_axis(axes, field_values(table, field)) if against is None else np.asarray
        for hue_value, style in styles.items():
            knob = [value for value in field_values(table, field) if (panel_value, hue_value, value) in groups]
            if not knob:
                continue
            runs = [groups[panel_value, hue_value, value] for value in knob]
            values, low, high = np.transpose([estimate(cells, over, statistic) for cells in runs])
            x = position(knob)
            if against is not None:
                x = np.array(
                    [np.mean([cell.values.mean() for cell in places[panel_value, hue_value, v]]) for v in knob]
                )
            axes.plot(x, values, marker='o', markersize=4, label=value_text(hue, hue_value), **style)
            axes.fill_between(x, low, high, color=style['color'], alpha=0.2, linewidth=0)
        finish_axes(axes, label_of(against or field), label_of(metric), panel_title(panel, panel_value))
        if against is not None:
            axes.set_xscale('symlog', linthresh=1e-3)
    add_hue_legend(figure, hue, styles)
    add_caption(figure, caption(groups.values(), over, statistic))
    return figure


def bias_variance(
    rows: Iterable[Mapping[str, Any]],
    x: str = 'rho_bar',
    hue: str = 'c_bar',
    bias: str = 'bias',
    variance: str = 'variance',
) -> Figure:
    """Draws squared bias and variance of value targets against a parameter, in two panels.

    An axis is logarithmic if its values are positive and span a factor of ten (x axis) or a hundred (y axis).

    Args:
      rows: Dicts with the keys below, whose values are numbers, or strings of numbers such as 'inf'.
      x: Key of the parameter on the x axis.
      hue: Key of the parameter with a line for each of its values.
      bias: Key of the SQUARED bias, which is drawn without further squaring.
      variance: Key of the variance.

    Returns:
      The figure.

    Raises:
      ConfigError: There are no rows, a row lacks a key, or a value is not a number.
    """
    numbers = []
    for row in rows:
        try:
            numbers.append([float(row[key]) for key in (x, hue, bias, variance)])
        except KeyError as error:
            raise ConfigError(f'a row has no {error}; {closest(error.args[0], row)}') from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f'a row has a value that is not a number: {dict(row)}') from error
    if not numbers:
        raise ConfigError('there are no rows to draw')
    data = np.array(numbers)  # [N, 4]
    hues = np.unique(data[:, 1]).tolist()
    styles = dict(zip(hues, sequential(len(hues)), strict=True))
    figure, panels = new_figure(2)
    for axes, column, name in zip(panels, (2, 3), ('squared bias', 'variance'), strict=True):
        position = _knob_axis(axes, np.unique(data[:, 0]).tolist())
        for i, (value, style) in enumerate(styles.items()):
            line = data[data[:, 1] == value]
            line = line[np.argsort(line[:, 0])]
            # Increasingly thinner, so that coinciding lines are visible: the bias may not depend on `hue`.
            size = np.linspace(3, 1.2, len(styles))[i]
            at, label = position(line[:, 0]), value_text(hue, value)
            axes.plot(at, line[:, column], marker='o', linewidth=size, markersize=2.5 * size, label=label, **style)
        if _is_spread(data[:, column], 100):
            axes.set_yscale('log')
        finish_axes(axes, label_of(x), '', '')
        axes.set_ylabel(f'{name} of the value targets')
    add_hue_legend(figure, hue, styles)
    return figure


def _knob_axis(axes: Axes, values: Sequence[float]) -> Callable[[Any], np.ndarray]:
    """Sets up the x axis for ascending values; returns their positions as a function, with inf one step further."""
    finite = [value for value in values if math.isfinite(value)]
    logarithmic = _is_spread(finite, 10)
    # Such as policy lags: 0 has a place of its own, one step before the others.
    after_zero = not logarithmic and bool(finite) and finite[0] == 0 and _is_spread(finite[1:], 10)
    if len(finite) > 1:
        beyond = finite[-1] ** 2 / finite[-2] if logarithmic else 2 * finite[-1] - finite[-2]
    else:
        beyond = finite[0] + 1 if finite else 0.0

    def position(values: Any) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return np.where(np.isinf(values), beyond, values)

    if logarithmic:
        axes.set_xscale('log')
    elif after_zero:
        axes.set_xscale('symlog', linthresh=finite[1])
    # With few values, each has a tick label; with many, only round numbers and infinity have one.
    if len(values) <= 8:
        axes.set_xticks(position(values), [value_text(None, value) for value in values])
        axes.set_xticks([], minor=True)
    elif len(finite) < len(values):
        axes.axvline(beyond, color='0.7', linewidth=0.8, linestyle=':')
        axes.annotate('∞', (beyond, 1), xycoords=('data', 'axes fraction'), ha='center', va='bottom')
    return position


def _is_spread(values: Any, factor: float) -> bool:
    """Whether all finite values are positive, and the largest is at least `factor` times the smallest."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return len(values) > 1 and values.min() > 0 and values.max() >= factor * values.min()
