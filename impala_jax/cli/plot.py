"""`impala plot`: draws figures, or prints tables, of runs and sweeps."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from impala_jax.cli import command_line
from impala_jax.config import ConfigError
from impala_jax.studies import plotting


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = command_line.Parser(description='Draws a figure, or prints a table, of runs or of a sweep.')
    kinds = parser.add_subparsers(dest='kind', metavar='FIGURE', required=True)
    _add_figures_of_runs(kinds)
    _add_figures_of_sweeps(kinds)
    return parser.parse_args()


def _add_figure(kinds: Any, name: str, text: str) -> argparse.ArgumentParser:
    kind = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.')
    kind.add_argument('--output', required=True, type=Path, help=f'file to write: {" or ".join(plotting.FORMATS)}')
    return kind


def _add_figures_of_runs(kinds: Any) -> None:
    curve = _add_figure(kinds, 'curve', 'learning curves of runs')
    curve.add_argument('--workdir', required=True, nargs='+', type=Path, help='directories of the runs')

    pbt = _add_figure(kinds, 'pbt', 'fitness and hyperparameters of a population over frames')
    pbt.add_argument('--workdir', required=True, type=Path, help='directory of the population')

    bias = _add_figure(kinds, 'bias-variance', 'squared bias and variance of value targets against a parameter')
    bias.add_argument(
        '--rows', required=True, type=Path, help='JSON file with a list of objects with the keys below, or a CSV file'
    )
    bias.add_argument('--x', default='rho_bar', help='key of the parameter (default: %(default)s)')
    bias.add_argument('--hue', default='c_bar', help='key whose values get one line each (default: %(default)s)')
    bias.add_argument('--bias', default='bias', help='key of the squared bias (default: %(default)s)')
    bias.add_argument('--variance', default='variance', help='key of the variance (default: %(default)s)')

    suite = _add_figure(kinds, 'suite', "a suite's human-normalised scores next to the paper's")
    suite.add_argument('--scores', required=True, type=Path, help='file written by impala evaluate --suite ... --json')

    profile = _add_figure(kinds, 'profile', 'agents compared by their scores over the runs and tasks of a suite')
    profile.add_argument(
        '--agent',
        required=True,
        nargs='+',
        action='append',
        metavar=('NAME', 'FILE'),
        help='name of an agent, and a file per run, written by impala evaluate --suite ... --json; once per agent',
    )

    experts = _add_figure(kinds, 'experts', 'experts against the agent trained on all tasks')
    experts.add_argument('--results', required=True, type=Path, help='results.csv of impala experts')
    experts.add_argument(
        '--workdir', type=Path, help='directory of a multi-task run that replaces the one of impala experts'
    )


def _add_sweep_options(kind: argparse.ArgumentParser, metric: str) -> None:
    kind.add_argument('--results', required=True, type=Path, help="the sweep's results.csv")
    kind.add_argument('--metric', default=metric, help='column to show (default: %(default)s)')
    kind.add_argument('--panel', help='draw one panel (in a table: one column) per value of this field')
    kind.add_argument(
        '--where', nargs='+', default=[], metavar='FIELD=VALUE', help='use only the runs with these values'
    )
    kind.add_argument(
        '--over', nargs='+', default=['seed'], metavar='FIELD', help='average over these fields (default: seed)'
    )
    kind.add_argument(
        '--statistic',
        choices=plotting.STATISTICS,
        default='mean',
        help='average: mean, interquartile mean or median (default: %(default)s)',
    )


def _add_figures_of_sweeps(kinds: Any) -> None:
    curves = _add_figure(kinds, 'curves', 'a metric of a sweep over frames')
    _add_sweep_options(curves, 'episode_return_last_100')
    curves.add_argument('--hue', help='draw one line per value of this field')

    heatmap = _add_figure(kinds, 'heatmap', 'a metric of a sweep on the grid of two fields')
    _add_sweep_options(heatmap, 'final_return')
    heatmap.add_argument('--x', default='vtrace.c_bar', help='field on the x axis (default: %(default)s)')
    heatmap.add_argument('--y', default='vtrace.rho_bar', help='field on the y axis (default: %(default)s)')

    ranked = _add_figure(kinds, 'ranked', 'all sets of hyperparameters of a sweep, best first')
    _add_sweep_options(ranked, 'final_return')
    ranked.add_argument(
        '--hue', default='vtrace.correction', help='draw one line per value of this field (default: %(default)s)'
    )

    sensitivity = _add_figure(kinds, 'sensitivity', 'a metric of a sweep against a field')
    _add_sweep_options(sensitivity, 'final_return')
    sensitivity.add_argument('--field', required=True, help='numeric field on the x axis')
    sensitivity.add_argument('--hue', help='draw one line per value of this field')
    sensitivity.add_argument(
        '--against', help='column for the x axis instead of the field, such as kl_behaviour_target: its mean over runs'
    )

    text = 'print the means of a sweep with their intervals'
    table = kinds.add_parser('table', help=text, description=text[0].upper() + text[1:] + '.')
    _add_sweep_options(table, 'final_return')
    table.add_argument(
        '--hue', default='vtrace.correction', help='print one row per value of this field (default: %(default)s)'
    )
    table.add_argument('--split', help='split each column of --panel into one column per value of this field')
    table.add_argument('--markdown', action='store_true', help='print a Markdown table')


def read(option: str, path: Path) -> Any:
    """Returns the content of a JSON or CSV file; `option` is its name on the command line."""
    try:
        text = path.read_text(encoding='utf-8')
        return list(csv.DictReader(text.splitlines())) if path.suffix == '.csv' else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{option} {path}: {getattr(error, "strerror", None) or error}') from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON or CSV file."""
    rows = read('--rows', path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f'--rows {path} does not hold a list of objects')
    return rows


def read_agents(groups: list[list[str]]) -> dict[str, list[Any]]:
    """Returns the scores of each agent's runs, from the values of --agent: a name, then files."""
    agents: dict[str, list[Any]] = {}
    for name, *paths in groups:
        if not paths or name in agents:
            raise ConfigError(f'--agent {name}: write --agent NAME FILE [FILE ...], once per agent')
        agents[name] = [read('--agent', Path(path)) for path in paths]
    return agents


def plot() -> None:
    """Parses the command line, and draws the figure or prints the table."""
    arguments = vars(parse())
    kind, output = arguments.pop('kind'), arguments.pop('output', None)
    if output is not None:
        plotting.check_output(output)
    note = text = ''
    if kind == 'curve':
        figure = plotting.learning_curve(arguments['workdir'])
    elif kind == 'pbt':
        figure = plotting.pbt(arguments['workdir'])
    elif kind == 'experts':
        figure = plotting.experts(plotting.read_table(arguments['results']), arguments['workdir'])
    elif kind == 'suite':
        figure = plotting.suite(read('--scores', arguments['scores']))
    elif kind == 'profile':
        agents = read_agents(arguments['agent'])
        figure, text = plotting.profile(agents), plotting.profile_table(agents)
    elif kind == 'bias-variance':
        figure = plotting.bias_variance(read_rows(arguments.pop('rows')), **arguments)
    else:
        where: dict[str, str] = {}
        for condition in arguments.pop('where'):
            field, equals, value = condition.partition('=')
            if not equals or field in where:
                raise ConfigError(f'--where {condition}: write FIELD=VALUE, as in seed=0, once per field')
            where[field] = value
        table = plotting.select(plotting.read_table(arguments.pop('results')), where)
        missing = plotting.left_out(table, arguments['metric'])
        if missing:
            note = f'left out because they lack {arguments["metric"]}: {", ".join(missing)}'
        if kind == 'table':
            text, figure = plotting.results_table(table, **arguments), None
        else:
            figure = getattr(plotting, kind)(table, **arguments)
    if figure is not None and output is not None:
        plotting.save(figure, output)
        print(f'figure: {output}')
        if figure.get_suptitle() and not text:  # A table says it itself.
            print(figure.get_suptitle())
    print(text, end='')
    if note:
        print(note, file=sys.stderr)


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.main(plot)
