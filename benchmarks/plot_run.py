"""Draws the learning curve of a run: python benchmarks/plot_run.py runs/pong docs/images/pong.png"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(workdir: Path, image: Path) -> None:
    rows = [row for row in read(workdir / 'metrics.jsonl') if 'episode_return_last_100' in row]
    name = json.loads((workdir / 'config.json').read_text())['config']['environment']['name']
    frames = np.array([row['frames'] for row in rows]) / 1e6
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, constrained_layout=True)
    axes.plot(
        frames,
        [row['episode_return_last_100'] for row in rows],
        label='training, mean of the last 100 episodes',
        lw=1.5,
    )
    evaluations = read(workdir / 'evaluations.jsonl')
    if evaluations:
        axes.errorbar(
            [row['frames'] / 1e6 for row in evaluations],
            [row['mean_return'] for row in evaluations],
            [row['stderr'] for row in evaluations],
            fmt='o',
            ms=4,
            capsize=2,
            color='black',
            label=f'evaluation, {evaluations[-1]["episodes"]} games, standard error',
        )
    axes.set_xlabel('million environment frames')
    axes.set_ylabel('return of a game')
    axes.set_title(f'{name}, {rows[-1]["wall_time_s"] / 60:.0f} min')
    axes.grid(alpha=0.3)
    axes.legend(loc='best', frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('usage: python benchmarks/plot_run.py WORKDIR IMAGE')
    main(Path(sys.argv[1]), Path(sys.argv[2]))
