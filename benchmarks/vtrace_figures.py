"""Draws the figures of docs/vtrace.md: python benchmarks/vtrace_figures.py runs/table2 runs/truncation docs/images.

The arguments are the folders of the sweeps configs/ablations/table2.py and truncation.py, and the folder for the
figures. The theoretical results are for Catch, written as an MDP.
"""

import math
import sys
from pathlib import Path

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


def main(table2: Path, truncation: Path, images: Path) -> None:
    """Draws the figures.

    Args:
      table2: Folder of the sweep table2.py.
      truncation: Folder of the sweep truncation.py.
      images: Folder for the figures.
    """
    images.mkdir(parents=True, exist_ok=True)
    table = plotting.read_table(table2 / 'results.csv')
    replayed = plotting.select(table, {'replay.fraction': '0.5'})
    plotting.save(plotting.curves(replayed, hue='vtrace.correction', panel='task'), images / 'table2.png')

    rows = trade_off()
    errors = np.sqrt([row['mse'] for row in rows]).reshape(len(LEVELS), len(LEVELS))
    theory = plotting.Matrix('theory: rms error of the value target', LEVELS, LEVELS, errors)
    grid = plotting.read_table(truncation / 'results.csv')
    plotting.save(plotting.heatmap(grid, theory=theory), images / 'truncation.png')

    # Without truncation the bias is 0 up to rounding.
    inside = [row | {'bias': np.round(row['bias_rms'] ** 2, 12)} for row in rows if row['c_bar'] <= row['rho_bar']]
    plotting.save(plotting.bias_variance(inside), images / 'bias_variance.png')
    for row in rows:
        print('  '.join(f'{name} {value:.4g}' for name, value in row.items()))


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit('usage: python benchmarks/vtrace_figures.py TABLE2_FOLDER TRUNCATION_FOLDER IMAGES_FOLDER')
    main(*map(Path, sys.argv[1:]))
