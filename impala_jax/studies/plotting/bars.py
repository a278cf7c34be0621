"""Bar charts of scores on the tasks of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.evaluation.scores import AGGREGATES, estimate_text, human_normalised, paper_agents, task_label
from impala_jax.rundir.files import EVALUATIONS
from impala_jax.rundir.rows import read_rows
from impala_jax.studies.plotting.figures import PALETTE, add_caption, add_legend, finish_axes, new_figure
from impala_jax.studies.plotting.labels import escape, label_of
from impala_jax.studies.plotting.tables import Table, cells_of, few_seeds_text
from impala_jax.studies.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def suite(result: Mapping[str, Any]) -> Figure:
    """Draws human-normalised scores of a suite's tasks as bars, best first, with markers for the paper's agents.

    Error bars are 95 % bootstrap intervals, and a line at 100 % shows human level. If human scores are unknown, the
    bars are mean returns with their standard errors.

    Args:
      result: Result of `impala_jax.evaluate` on a suite, or the content of its JSON file.

    Returns:
      The figure.

    Raises:
      ConfigError: The result is not from a suite.
    """
    require_suite(result)
    agents = paper_agents(result['environment'])
    human = all(scores['human_normalised'] is not None for scores in result['tasks'].values())
    key = 'human_normalised' if human else 'mean_return'
    tasks = sorted(result['tasks'], key=lambda task: result['tasks'][task][key])
    values = np.array([result['tasks'][task][key] for task in tasks])
    errors = np.transpose([_error(result['tasks'][task], human) for task in tasks])  # [2, tasks]

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, (axes,) = new_figure(1, size=(7.5, 0.19 * len(tasks) + 1.2))
    places = np.arange(len(tasks))
    axes.barh(places, values, height=0.7, color=PALETTE[0], alpha=0.4)
    axes.errorbar(values, places, xerr=errors, fmt='none', ecolor='black', elinewidth=1.0, capsize=1.5)
    handles: list[Any] = [Patch(color=PALETTE[0], alpha=0.4, label='this run')]
    drawn = [values]
    # All but the first are hollow and increasingly larger, so that coinciding markers are visible.
    for i, (agent, marker, color) in enumerate(zip(agents, 'osD', PALETTE[1:], strict=False)):
        drawn.append(np.array([agent.score(task) for task in tasks]))
        style = {'marker': marker, 'color': color, 'linestyle': 'none', 'markersize': 3.5 + i}
        style['markerfacecolor'] = 'none' if i else color
        axes.plot(drawn[-1], places, **style)
        handles.append(Line2D([], [], label=agent.label, **style))
    if human:
        handles.append(axes.axvline(100, color='0.3', linewidth=1.0, linestyle='--', label='human'))
        if max(np.max(scores) for scores in drawn) > 1000:
            axes.set_xscale('symlog', linthresh=10)
    _finish_bars(axes, tasks, fontsize=7)
    axes.margins(x=0.03)
    # The mean is dominated by a few games with large scores, so it appears only in the table.
    headlines = [
        f'{AGGREGATES.get(name, "mean")}: {estimate_text(scores["value"], scores["interval"], 1 if human else 2)}'
        for name, scores in result['aggregates'].items()
        if name != 'mean'
    ]
    title = f'{result["environment"]} at {result["frames"]:,} frames\n' + '; '.join(headlines)
    finish_axes(axes, 'human-normalised score (%)' if human else label_of('episode_return'), '', escape(title))
    add_legend(figure, handles)
    add_caption(figure, f'{few_seeds_text([1])}; intervals are over episodes')
    return figure


def require_suite(result: Any) -> None:
    """Raises ConfigError if this is not the result of `impala_jax.evaluate` on a suite."""
    if not isinstance(result, dict) or not result.get('tasks') or 'aggregates' not in result:
        raise ConfigError('these are not scores of a suite: write them with launch/evaluate.py --suite ... --json FILE')


def _error(scores: Mapping[str, Any], human: bool) -> tuple[float, float]:
    """Returns the lengths of a task's error bar below and above its value."""
    if not human:
        return scores['stderr'], scores['stderr']
    if scores['human_normalised_interval'] is None:
        return 0.0, 0.0
    low, high = scores['human_normalised_interval']
    return max(0.0, scores['human_normalised'] - low), max(0.0, high - scores['human_normalised'])


def experts(table: Table, workdir: Path | str | None = None) -> Figure:
    """Draws pairs of bars, one per task, for experts and for an agent trained on all tasks with the same total frames.

    As in the paper's comparison of experts and multi-task training (section 5.3.1), the other tasks have helped if the
    multi-task agent's bar is longer. Bars are means over seeds with their intervals, human-normalised in percent if
    human scores are known for all tasks.

    Args:
      table: Table of a sweep of `ablation.experts`.
      workdir: Folder of a separate multi-task run, whose last evaluation is shown; None for the agent of the sweep.

    Returns:
      The figure.

    Raises:
      ConfigError: There are no experts, or there is no multi-task agent that was trained on the same tasks.
    """
    finals = {'experts': _expert_returns(table), 'multi-task': _multi_task_returns(table, workdir)}
    tasks = [task for task in finals['experts'] if task in finals['multi-task']]
    if not tasks:
        where = 'this table' if workdir is None else workdir
        raise ConfigError(
            f'{where} has no agent that was trained on all tasks of the finished experts: train it with '
            'launch/experts.py, or give the --workdir of its run'
        )
    human = all(human_normalised(task, 0.0) is not None for task in tasks)
    if human:
        for agent in finals.values():
            for task in tasks:
                agent[task] = [human_normalised(task, value) or 0.0 for value in agent[task]]
    mean = {name: [float(np.mean(agent[task])) for task in tasks] for name, agent in finals.items()}
    gains = np.subtract(mean['multi-task'], mean['experts'])
    order = np.argsort(gains, kind='stable')  # ascending, so the largest gain is at the top
    tasks = [tasks[i] for i in order]

    from matplotlib.patches import Patch

    figure, (axes,) = new_figure(1, size=(7.5, 0.34 * len(tasks) + 1.2))
    places, handles = np.arange(len(tasks)), []
    for offset, (name, agent) in zip((-0.19, 0.19), finals.items(), strict=True):
        values = [np.mean(agent[task]) for task in tasks]
        color = PALETTE[0] if name == 'multi-task' else '0.6'
        axes.barh(places + offset, values, height=0.36, color=color, alpha=0.8)
        limits = np.transpose([bootstrap_interval(agent[task]) for task in tasks])  # [2, tasks]
        errors = np.nan_to_num(np.abs(limits - values))
        axes.errorbar(values, places + offset, xerr=errors, fmt='none', ecolor='black', elinewidth=1.0, capsize=1.5)
        handles.insert(0, Patch(color=color, alpha=0.8, label=name))
    _finish_bars(axes, tasks, fontsize=8)
    decimals = 1 if human else 2
    means = {name: np.minimum(values, 100.0) if human else values for name, values in mean.items()}
    title = 'mean capped at 100' if human else 'mean'
    title += ': ' + ', '.join(f'{name} {np.mean(means[name]):.{decimals}f}' for name in ('multi-task', 'experts'))
    title += f'; multi-task is better on {int((gains > 0).sum())} of {len(tasks)} tasks'
    finish_axes(axes, 'human-normalised score (%)' if human else label_of('episode_return'), '', title)
    add_legend(figure, handles)
    add_caption(figure, few_seeds_text([len(agent[task]) for agent in finals.values() for task in tasks]))
    return figure


def _expert_returns(table: Table) -> dict[str, list[float]]:
    """Returns the final returns of the experts, by task."""
    returns: dict[str, list[float]] = {}
    for cell in cells_of(table, 'final_return'):
        returns.setdefault(cell.fields.get('task', ''), []).append(cell.final)
    return returns


def _multi_task_returns(table: Table, workdir: Path | str | None) -> dict[str, list[float]]:
    """Returns the final returns of agents that were trained on all tasks, by task."""
    if workdir is not None:
        last = (read_rows(Path(workdir) / EVALUATIONS) or [{}])[-1]
        return {name.partition('/')[2]: [value] for name, value in last.items() if name.startswith('mean_return/')}
    tasks = {name.removeprefix('final_return/') for name in table if name.startswith('final_return/')}
    return {task: [cell.final for cell in cells_of(table, f'final_return/{task}')] for task in tasks}


def _finish_bars(axes: Axes, tasks: Sequence[str], fontsize: float) -> None:
    """Draws a line at 0 and labels the bars, which lie at 0, 1, 2 and so on, with the tasks."""
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_yticks(np.arange(len(tasks)), [escape(task_label(task)) for task in tasks], fontsize=fontsize)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.grid(visible=False, axis='y')
