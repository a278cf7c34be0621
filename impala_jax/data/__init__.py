"""Reference scores, and the paper's results for each task.

| file | content | source |
|---|---|---|
| `atari57_scores.csv` | random and human scores of the 57 games | Wang et al. (2016), as in the paper's section 5.3.3 |
| `dmlab30_scores.csv` | DMLab-30 levels (training, test), random and human scores | the authors' released code |
| `dmlab30_table_b1.csv` | scores of the experts and of deep IMPALA with PBT | the paper, table B.1, as printed |
| `impala_table_c1.csv` | scores of ACKTR, Reactor and IMPALA | the paper, table C.1 |
"""

from __future__ import annotations

import csv
import importlib.resources


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of one of the files above, as dicts from column name to text."""
    with (importlib.resources.files('impala_jax.data') / name).open(encoding='utf-8') as lines:
        return list(csv.DictReader(lines))


def dmlab30_levels() -> dict[str, str]:
    """Returns the test level of each DMLab-30 training level, in the order of the suite; most are the same level."""
    return {row['level_train']: row['level_test'] for row in rows('dmlab30_scores.csv')}
