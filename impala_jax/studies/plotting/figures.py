"""Common parts of all figures: panels, legends, colours and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.studies.plotting.labels import CORRECTIONS, escape, label_of, value_text
from impala_jax.studies.plotting.tables import Table, field_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ('.png', '.svg')
_DPI = 300
# Okabe and Ito (2008), also distinguishable for colour-blind readers; without yellow, which is too light for lines.
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
Style = dict[str, Any]  # `color` and `linestyle`


def save(figure: Figure, path: Path | str) -> None:
    """Writes a figure as PNG (300 dots per inch) or SVG; the same figure always gives the same bytes.

    Args:
      figure: The figure.
      path: Path of the file, with a suffix in `FORMATS`.

    Raises:
      ConfigError: The suffix is different, or the directory does not exist.
    """
    check_output(path)
    import matplotlib

    svg = Path(path).suffix == '.svg'
    with matplotlib.rc_context({'svg.hashsalt': 'impala_jax'}):
        figure.savefig(path, dpi=_DPI, metadata={'Date': None} if svg else None)


def check_output(path: Path | str, option: str = '--output') -> None:
    """Checks that `save` can write to `path`; to be called before long work.

    Args:
      path: Path of the file.
      option: Command-line option that the path is from, for error messages.

    Raises:
      ConfigError: The suffix is not in `FORMATS`, the directory does not exist, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f'{option} {path}: the name must end in {" or ".join(FORMATS)}')
    if not path.absolute().parent.is_dir():
        raise ConfigError(f'{option} {path}: there is no directory {path.absolute().parent}')
    require_matplotlib()


def require_matplotlib() -> None:
    """Raises ConfigError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib: pip install 'impala_jax[plot]' ({error})") from error


def new_figure(
    num_panels: int, size: tuple[float, float] | None = None, grid: bool = True, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """Creates an empty figure.

    Args:
      num_panels: Number of panels.
      size: Width and height of a panel, in inches; None for a default.
      grid: Whether to draw grid lines.
      columns: Largest number of panels per row.

    Returns:
      The figure and its panels.
    """
    require_matplotlib()
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


def finish_axes(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    """Sets labels and title; the y label only in the first column."""
    axes.set_xlabel(x_label)
    # Panels in a row have the same y axis.
    spec = axes.get_subplotspec()
    if spec is None or spec.is_first_col():
        axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11)


def add_caption(figure: Figure, text: str) -> None:
    """Writes a line above the panels; nothing if it is empty."""
    if text:
        figure.suptitle(text, fontsize=9, color='0.35', x=0.99, ha='right')


def add_legend(figure: Figure, handles: Sequence[Any], title: str | None = None) -> None:
    """Adds a legend below the panels, where it covers nothing."""
    widths = [0.65 + 0.075 * len(handle.get_label()) for handle in handles]  # approximate, in inches
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        if sum(max(widths[i : i + rows]) for i in range(0, len(widths), rows)) < figure.get_figwidth():
            break
    figure.legend(handles=list(handles), loc='outside lower center', ncols=columns, frameon=False, title=title)


def add_hue_legend(figure: Figure, hue: str | None, styles: Mapping[Any, Style]) -> None:
    """Adds a legend of the values of `hue`, unless it is None."""
    if hue is None:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=escape(value_text(hue, value)), **style) for value, style in styles.items()]
    add_legend(figure, handles, title=label_of(hue))


def hue_styles(table: Table, hue: str | None) -> dict[Any, Style]:
    """Returns colour and line style by value of `hue`, for all panels; corrections have the same in all figures."""
    values = field_values(table, hue)
    if isinstance(values[0], float):
        return dict(zip(values, sequential(len(values)), strict=True))
    if hue == 'vtrace.correction' and set(values) <= set(CORRECTIONS):
        styles = dict(zip(CORRECTIONS, palette(len(CORRECTIONS)), strict=True))
        return {value: styles[value] for value in values}
    return dict(zip(values, palette(len(values)), strict=True))


def palette(count: int) -> list[Style]:
    """Returns styles for unordered values; after the last colour, the line style changes."""
    size, line_styles = len(PALETTE), ('-', '--', ':', '-.')
    return [{'color': PALETTE[i % size], 'linestyle': line_styles[i // size % 4]} for i in range(count)]


def sequential(count: int) -> list[Style]:
    """Returns styles for numbers, from dark to light, without viridis' yellow, which is too light for lines."""
    require_matplotlib()
    from matplotlib import colormaps

    return [{'color': colormaps['viridis'](position), 'linestyle': '-'} for position in np.linspace(0, 0.85, count)]
