"""Labels and number formats for figures and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CORRECTIONS = {
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


def label_of(name: str) -> str:
    """Returns the label of a field or a metric."""
    return _LABELS.get(name, name.replace('.', ' ').replace('_', ' '))


def value_text(field: str | None, value: Any) -> str:
    """Formats a field's value for figures and tables."""
    if field == 'vtrace.correction' and isinstance(value, str):
        return CORRECTIONS.get(value, value)
    if isinstance(value, float) and math.isinf(value):
        return '∞' if value > 0 else '-∞'
    return plain_text(value)


def plain_text(value: Any) -> str:
    """Formats a value as in the file of a table."""
    return f'{value:.10g}' if isinstance(value, float) else str(value)


def panel_title(panel: str | None, value: Any) -> str:
    """Returns the title of the panel for a value of the field `panel`; empty if `panel` is None."""
    if panel is None:
        return ''
    text = escape(value_text(panel, value))
    return text if isinstance(value, str) else f'{label_of(panel).split(" (")[0]} = {text}'


def escape(text: str) -> str:
    """Escapes dollar signs, which matplotlib would interpret as mathematics."""
    return text.replace('$', r'\$')


def frames_scale(frames: float) -> tuple[float, str]:
    """Returns a divisor for frames, and the unit for the axis label."""
    for scale, unit in ((1e6, ' (million)'), (1e3, ' (thousand)')):
        if frames >= scale:
            return scale, unit
    return 1.0, ''


def num_decimals(values: np.ndarray) -> int:
    """Returns the number of decimals that shows two to four digits of the largest value: 0.98, 12.3, 250.8."""
    largest = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    if largest == 0:
        return 1
    magnitude = math.floor(math.log10(largest))
    return 1 - magnitude if magnitude < 0 else max(1, 2 - magnitude)
