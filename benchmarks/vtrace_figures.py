"""Draws the figures of docs/vtrace.md and prints its numbers: python benchmarks/vtrace_figures.py runs docs/images.

The arguments are the folder of the sweeps, each in a folder with the name of its grid in configs/ablations, and the
folder for the figures. The figures of a sweep that is missing are left out. The theoretical results are for Catch,
written as an MDP.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.studies import plotting, tabular

ROWS, COLUMNS = 10, 5
LEVELS = (1.0, 2.0, 4.0, 10.0, 100.0, math.inf)


def catch() -> tuple[tabular.MDP, np.ndarray, np.ndarray]:
    """Returns Catch as an MDP, the winning actions [S], and the distribution of initial states [S].

    A state consists of the ball's row and column and the paddle's column; the last state is absorbing.
    """
    states = [(r, b, p) for r in range(ROWS - 1) for b in range(COLUMNS) for p in range(COLUMNS)]
    index = {state: i for i, state in enumerate(states)}
    over = len(states)
    transitions, rewards = np.zeros([over + 1, 3, over + 1]), np.zeros([over + 1, 3])
    wins, start = np.ones(over + 1, int), np.zeros(over + 1)
    transitions[over, :, over] = 1
    for (row, ball, paddle), i in index.items():
        wins[i] = 1 + np.sign(ball - paddle)
        start[i] = (row == 0 and paddle == COLUMNS // 2) / COLUMNS
        for action in range(3):
            moved = min(max(paddle + action - 1, 0), COLUMNS - 1)
            last = row == ROWS - 2
            transitions[i, action, over if last else index[row + 1, ball, moved]] = 1
            rewards[i, action] = last * (1 if moved == ball else -1)
    return tabular.MDP(transitions, rewards, discount=0.99), wins, start


def trade_off() -> list[dict[str, float]]:
    """Computes `tabular.trade_off` for a policy that mostly wins, with data from an older policy with other errors."""
    mdp, wins, start = catch()
    random = np.random.RandomState(0)
    logits = 3 * np.eye(3)[wins] + random.randn(mdp.num_states, 3)
    older = logits / 2 + random.randn(mdp.num_states, 3)
    mu, pi = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (older, logits))
    visits, now = np.zeros(mdp.num_states), start
    for _ in range(ROWS - 1):
        visits += now
        now = np.einsum('x,xa,xay->y', now, mu, mdp.transitions)
    return tabular.trade_off(mdp, mu, pi, LEVELS, LEVELS, n=10, weights=visits / visits.sum())


CORRECTIONS = {
    'vtrace': 'V-trace',
    'one_step_is': '1-step IS',
    'epsilon_correction': 'ε-correction',
    'none': 'no correction',
}
# The returns of a random policy and of a perfect one.
RANGES = {'catch': (-1.0, 1.0), 'delayed_bandit': (0.0, 1.0), 'cartpole': (0.0, 500.0)}


def aggregates(table: plotting.Table) -> dict[str, list[dict[str, Any]]]:
    """Returns normalised scores of each correction: one result per seed, with a score per task."""
    results: dict[str, list[dict[str, Any]]] = {}
    finals = {
        (str(table['vtrace.correction'][i]), int(table['seed'][i]), str(table['task'][i])): table['final_return'][i]
        for i in range(len(table['cell']))
    }
    for correction, name in CORRECTIONS.items():
        for seed in sorted({key[1] for key in finals}):
            scores = {
                task: {'mean_return': (finals[correction, seed, task] - low) / (high - low), 'human_normalised': None}
                for task, (low, high) in RANGES.items()
            }
            result = {'environment': 'normalised returns', 'tasks': scores, 'aggregates': {}}
            results.setdefault(name, []).append(result)
    return results


def table2(table: plotting.Table, images: Path) -> None:
    """Draws curves and profiles of the four corrections."""
    replayed = plotting.select(table, {'replay.fraction': '0.5'})
    figure = plotting.curves(replayed, hue='vtrace.correction', panel='task', statistic='iqm')
    plotting.save(figure, images / 'table2.png')
    agents = aggregates(replayed)
    plotting.save(plotting.profile(agents), images / 'table2_profile.png')
    print(plotting.results_table(table, panel='task', split='replay.fraction', markdown=True, statistic='iqm'))
    print(plotting.profile_table(agents))


def lag(table: plotting.Table, images: Path, name: str) -> None:
    """Draws returns against the policy lag, and against what it did to the data."""
    options: dict[str, Any] = {'hue': 'vtrace.correction', 'panel': 'task', 'statistic': 'iqm'}
    for fraction, suffix in (('0', ''), ('0.5', '_replay')):
        part = plotting.select(table, {'replay.fraction': fraction})
        plotting.save(plotting.sensitivity(part, 'policy_lag', **options), images / f'{name}{suffix}.png')
        against = plotting.sensitivity(part, 'policy_lag', against='kl_behaviour_target', **options)
        plotting.save(against, images / f'{name}{suffix}_kl.png')
        for metric in ('final_return', 'kl_behaviour_target', 'effective_sample_size'):
            print(f'{name}, replay {fraction}: {metric}')
            for row in np.unique(part['policy_lag']):
                at = plotting.select(part, {'policy_lag': row})
                print(f'lag {row:g}')
                print(plotting.results_table(at, panel='task', metric=metric, statistic='iqm'))


def truncation(table: plotting.Table, images: Path) -> None:
    """Draws returns over rho_bar and c_bar, next to the theory of Catch."""
    rows = trade_off()
    errors = np.sqrt([row['mse'] for row in rows]).reshape(len(LEVELS), len(LEVELS))
    theory = plotting.Matrix('theory of catch: rms error of the value target', LEVELS, LEVELS, errors)
    for task, beside in (('catch', theory), ('cartpole', None)):
        part = plotting.select(table, {'task': task})
        figure = plotting.heatmap(part, panel='policy_lag', theory=beside, statistic='iqm')
        plotting.save(figure, images / f'truncation_{task}.png')
        finals = part['final_return'][np.unique(part['cell'], return_index=True)[1]]
        levels = part['vtrace.c_bar'][np.unique(part['cell'], return_index=True)[1]]
        for c_bar in LEVELS:
            own = finals[levels == c_bar]
            error = np.std(own, ddof=1) / math.sqrt(len(own))
            print(f'{task}, c_bar {c_bar:g}: mean {np.mean(own):.3f}, standard error {error:.3f}, {len(own)} runs')
    # Without truncation the bias is 0 up to rounding.
    inside = [row | {'bias': np.round(row['bias_rms'] ** 2, 12)} for row in rows if row['c_bar'] <= row['rho_bar']]
    plotting.save(plotting.bias_variance(inside), images / 'bias_variance.png')
    for row in rows:
        print('  '.join(f'{name} {value:.4g}' for name, value in row.items()))


def main(runs: Path, images: Path) -> None:
    """Draws the figures of the sweeps in a folder."""
    images.mkdir(parents=True, exist_ok=True)

    def print_lambda(table: plotting.Table) -> None:
        print(plotting.results_table(table, 'vtrace.lambda', panel='task', markdown=True, statistic='iqm'))

    def draw_learning_rate(table: plotting.Table) -> None:
        plotting.save(plotting.ranked(table, statistic='iqm'), images / 'ranked.png')

    draw: dict[str, Callable[[plotting.Table], None]] = {
        'table2': lambda table: table2(table, images),
        'lag': lambda table: lag(table, images, 'lag'),
        'truncation': lambda table: truncation(table, images),
        'lambda': print_lambda,
        'learning_rate': draw_learning_rate,
        'minatar': lambda table: lag(table, images, 'minatar'),
    }
    for name, function in draw.items():
        path = runs / name / 'results.csv'
        if path.exists():
            function(plotting.read_table(path))


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('usage: python benchmarks/vtrace_figures.py RUNS_FOLDER IMAGES_FOLDER')
    main(*map(Path, sys.argv[1:]))
