"""Heat maps over two fields of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from impala_jax.studies.plotting.figures import add_caption, add_legend, finish_axes, new_figure
from impala_jax.studies.plotting.labels import escape, label_of, num_decimals, panel_title, value_text
from impala_jax.studies.plotting.tables import Table, caption, estimate, field_values, group_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCH = '////'


class Matrix(NamedTuple):
    """A heat map to draw next to a measured one, such as the prediction of the theory."""

    title: str
    x: Sequence[float]  # [X]
    y: Sequence[float]  # [Y]
    values: np.ndarray  # [Y, X]; NaN is drawn as blank


def heatmap(
    table: Table,
    metric: str = 'final_return',
    x: str = 'vtrace.c_bar',
    y: str = 'vtrace.rho_bar',
    panel: str | None = None,
    theory: Matrix | None = None,
    over: Sequence[str] = ('seed',),
    statistic: str = 'mean',
) -> Figure:
    """Draws a heat map, over two fields, of the mean over runs of the last value of a metric.

    The cells show the mean, or another statistic, and half the width of its interval. Combinations that were not
    measured are blank. Combinations with c_bar > rho_bar, which Theorem 1 does not cover, are hatched.

    Args:
      table: Table of a sweep.
      metric: Name of a numeric column.
      x: Name of the field on the x axis.
      y: Name of the field on the y axis.
      panel: Name of a field, with a panel for each of its values; None for one panel.
      theory: Heat map to draw next to the panels, with its own colour scale.
      over: Names of the fields to average over.
      statistic: Name of the statistic over runs, in `STATISTICS`.

    Returns:
      The figure.

    Raises:
      ConfigError: A column is unknown, or runs in a mean differ in a field that is not in `over`.
      ValueError: The shape of `theory.values` does not match its labels.
    """
    if theory is not None and np.shape(theory.values) != (len(theory.y), len(theory.x)):
        raise ValueError(f'theory has values {np.shape(theory.values)} for {len(theory.y)} y and {len(theory.x)} x')
    groups = group_cells(table, metric, [panel, y, x], over)
    xs, ys, panel_values = field_values(table, x), field_values(table, y), field_values(table, panel)
    means, halves = _estimates(groups, over, statistic, panel_values, ys, xs)
    num_panels = len(panel_values) + (theory is not None)
    size = max(3.0, 0.75 * len(xs) + 0.5), max(2.6, 0.62 * len(ys) + 0.8)
    figure, panels = new_figure(num_panels, size=size, grid=False)
    limits = _limits(means)
    mesh = None
    for axes, panel_value, mean, half in zip(panels, panel_values, means, halves, strict=False):
        mesh = _matrix(axes, x, y, xs, ys, mean, half, limits)
        finish_axes(axes, label_of(x), label_of(y), panel_title(panel, panel_value) or ('measured' if theory else ''))
    # On two lines, so that it fits next to a grid of three rows.
    label = label_of(metric) + ('\n(± half of its 95 % interval)' if np.isfinite(halves).any() else '')
    assert mesh is not None
    figure.colorbar(mesh, ax=panels[: len(panel_values)], label=label)
    is_hatched = (_outside_theory(x, y, xs, ys) & np.isfinite(means).any(axis=0)).any()
    if theory is not None:
        axes, values = panels[-1], np.asarray(theory.values, np.float64)
        mesh = _matrix(axes, x, y, theory.x, theory.y, values, np.full_like(values, np.nan), _limits(values))
        finish_axes(axes, label_of(x), label_of(y), theory.title)
        figure.colorbar(mesh, ax=axes)
        is_hatched |= (_outside_theory(x, y, theory.x, theory.y) & np.isfinite(values)).any()
    if is_hatched:
        _add_hatch_legend(figure)
    add_caption(figure, caption(groups.values(), over, statistic))
    return figure


def _estimates(
    groups: dict[Any, Any], over: Sequence[str], statistic: str, *axes: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the statistic of groups and half the widths of their intervals, on the grid of the values in `axes`."""
    means = np.full([len(values) for values in axes], np.nan)
    halves = np.full_like(means, np.nan)
    for key, cells in groups.items():
        index = tuple(values.index(value) for values, value in zip(axes, key, strict=True))
        value, low, high = estimate(cells, over, statistic)
        means[index], halves[index] = value, (high - low) / 2
    return means, halves


def _add_hatch_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    label = rf'{label_of("c_bar")} > {label_of("rho_bar")}: outside the theory'
    add_legend(figure, [Patch(facecolor='none', edgecolor='0.35', hatch=_HATCH, linewidth=0, label=label)])


def _outside_theory(x: str, y: str, xs: Sequence[Any], ys: Sequence[Any]) -> np.ndarray:
    """Returns the mask of c_bar > rho_bar, [Y, X]; all False if these are not the axes."""
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
    """Draws values [Y, X] and writes them into the cells with +- halves [Y, X]; hatches cells outside the theory."""
    from matplotlib.patches import Rectangle

    mesh = axes.pcolormesh(
        np.arange(len(xs)),
        np.arange(len(ys)),
        np.ma.masked_invalid(values),
        vmin=limits[0],
        vmax=limits[1],
        cmap='viridis',
    )
    outside, decimals = _outside_theory(x, y, xs, ys), num_decimals(values)
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
        # On a patch in the cell's colour, so that hatching does not cross the text.
        box = {'facecolor': color, 'edgecolor': 'none', 'pad': 1.0} if outside[row, column] else None
        axes.text(column, row, text, ha='center', va='center', fontsize=8, color=ink, bbox=box)
    axes.set_xticks(range(len(xs)), [escape(value_text(x, value)) for value in xs])
    axes.set_yticks(range(len(ys)), [escape(value_text(y, value)) for value in ys])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
