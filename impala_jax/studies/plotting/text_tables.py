"""Tables of the final values of a sweep, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from impala_jax.studies.plotting.labels import num_decimals, plain_text, value_text
from impala_jax.studies.plotting.tables import STATISTICS, Table, estimate, few_seeds, field_values, group_cells


def results_table(
    table: Table,
    hue: str = 'vtrace.correction',
    panel: str | None = None,
    split: str | None = None,
    metric: str = 'final_return',
    over: Sequence[str] = ('seed',),
    markdown: bool = False,
    statistic: str = 'mean',
) -> str:
    """Formats the means over runs of the last value of a metric, with intervals, in the layout of the paper's table 2.

    Args:
      table: Table of a sweep.
      hue: Name of a field, with a row for each of its values.
      panel: Name of a field, with a column for each of its values; None for one column.
      split: Name of a field, whose values subdivide the columns of `panel`; None for no subdivision.
      metric: Name of a numeric column; higher is better.
      over: Names of the fields to average over.
      markdown: Whether to write Markdown, with the best entry of each column in bold, instead of aligned text, with the
        best marked by a star.
      statistic: Name of the statistic over runs, in `STATISTICS`.

    Returns:
      The table.

    Raises:
      ConfigError: A column is unknown, or runs in a mean differ in a field that is not in `over`.
    """
    groups = group_cells(table, metric, [hue, panel, split], over)
    estimates = {key: estimate(cells, over, statistic) for key, cells in groups.items()}
    values = {key: float(found.value) for key, found in estimates.items()}
    columns = [
        (panel_value, split_value)
        for panel_value in field_values(table, panel)
        for split_value in field_values(table, split)
        if any(key[1:] == (panel_value, split_value) for key in groups)
    ]
    of_column = {column: [value for key, value in values.items() if key[1:] == column] for column in columns}

    def entry(key: tuple[Any, ...]) -> str:
        if key not in values:
            return '-'
        _, low, high = estimates[key]
        decimals = num_decimals(np.array(of_column[key[1:]]))
        text = f'{values[key]:.{decimals}f}'
        if np.isfinite(low):
            text += f' [{low:.{decimals}f}, {high:.{decimals}f}]'
        if values[key] < max(of_column[key[1:]]):
            return text
        return f'**{text}**' if markdown else f'{text}*'

    headings = [(_heading(panel, a) or metric, _heading(split, b)) for a, b in columns]
    if markdown:
        header = [[hue, *(', '.join(filter(None, words)) for words in headings)]]
    else:
        header = [[hue, *(word for word, _ in headings)], ['', *(word for _, word in headings)]][
            : 1 + (split is not None)
        ]
    body = [[value_text(hue, value), *(entry((value, *c)) for c in columns)] for value in field_values(table, hue)]
    caption = _caption(
        f'{metric}, {STATISTICS[statistic]}', [len(cells) for cells in groups.values()], 'bold' if markdown else '*'
    )
    caption = '; '.join(filter(None, [caption, few_seeds(groups.values(), over)]))
    return f'{aligned(header, body, markdown)}\n\n{caption}\n'


def _caption(quantity: str, counts: list[int], mark: str) -> str:
    fewest, most = min(counts), max(counts)
    runs = f'{fewest} to {most} runs' if most > fewest else f'{fewest} run{"s" * (fewest > 1)}'
    interval = ' [95 % bootstrap interval]' if most > 1 else ''
    return f'{quantity} of {runs}{interval}; {mark}: the best of its column'


def _heading(field: str | None, value: Any) -> str:
    return '' if field is None else value if isinstance(value, str) else f'{field}={plain_text(value)}'


def aligned(header: list[list[str]], body: list[list[str]], markdown: bool) -> str:
    """Formats rows as lines of text, with a rule between header and body."""
    widths = [max(map(len, texts)) for texts in zip(*header, *body, strict=True)]
    rows = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in header + body]
    rows.insert(len(header), ['-' * width for width in widths])
    if markdown:
        return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    return '\n'.join('  '.join(row).rstrip() for row in rows)
