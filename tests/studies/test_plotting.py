"""What figures show is what the table holds; nothing is averaged over in silence; bad input gets one line."""

import csv
import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import impala_jax
from impala_jax.config import ConfigError
from impala_jax.studies import plotting, statistics
from impala_jax.studies.plotting import figures
from impala_jax.studies.statistics import interquartile_mean
from tests.helpers.programs import ROOT

INF = float('inf')


def write(path, fields, cells, metrics=('episode_return', 'episode_return_last_100', 'final_return')):
    """A sweep's file: `cells` are (values of the fields, rows of frames and metrics)."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['cell', *fields, 'frames', *metrics])
        for number, (values, rows) in enumerate(cells):
            # Looks like a number, as the hexadecimal name of a cell may.
            writer.writerows([[f'{number}e10', *values, *row] for row in rows])
    return path


def final(correction, replay, seed, task):
    """The final return of a cell: any two differ."""
    base = {'vtrace': 0.9, 'one_step_is': 0.7, 'epsilon_correction': 0.4, 'none': 0.1}[correction]
    return (base - 0.2 * replay + 0.02 * seed**2) * (1 if task == 'catch' else 100)


@pytest.fixture
def sweep(tmp_path):
    """Two tasks x three corrections (in no order) x two replay fractions x three seeds; three rows each."""
    cells = [
        (
            (task, correction, replay, seed),
            [
                (1000, '', '', value),
                (2000, value / 2, value / 4, value),
                (3000, value, value / 2, value),
            ],
        )
        for task, correction, replay, seed in itertools.product(
            ['catch', 'gymnasium/Acrobot-v1'], ['none', 'vtrace', 'one_step_is'], [0.0, 0.5], [0, 1, 2]
        )
        for value in [final(correction, replay, seed, task)]
    ]
    fields = ['environment.name', 'vtrace.correction', 'replay.fraction', 'seed']
    return write(tmp_path / 'results.csv', fields, cells)


@pytest.fixture
def grid(tmp_path):
    """rho_bar x c_bar, two seeds; rho_bar = .5 with c_bar = inf was not measured, and (2, 2) only once."""
    cells = [
        ((rho_bar, c_bar, seed), [(1000, '', '', rank(rho_bar) + 10 * rank(c_bar) + seed)])
        for rho_bar, c_bar, seed in itertools.product(['0.5', '2', 'inf'], ['0.5', '2', 'inf'], [0, 1])
        if (rho_bar, c_bar) != ('0.5', 'inf') and (rho_bar, c_bar, seed) != ('2', '2', 1)
    ]
    return write(tmp_path / 'grid.csv', ['vtrace.rho_bar', 'vtrace.c_bar', 'seed'], cells)


def rank(value):
    return ['0.5', '2', 'inf'].index(value)


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def band(collection):
    """x -> (lowest, highest) of what `fill_between` drew."""
    vertices = collection.get_paths()[0].vertices
    return {x: (vertices[vertices[:, 0] == x, 1].min(), vertices[vertices[:, 0] == x, 1].max()) for x in vertices[:, 0]}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# The bootstrap.


def test_only_seeds_are_drawn(sweep):
    """What is averaged over beside them, here two tasks a hundred times apart, is no noise."""
    table = plotting.select(plotting.read_table(sweep), {'vtrace.correction': 'vtrace', 'replay.fraction': 0.0})
    finals = [[final('vtrace', 0, seed, task) for seed in range(3)] for task in ('catch', 'other')]
    expected = plotting.bootstrap_interval(np.concatenate(finals), strata=[0] * 3 + [1] * 3)
    over = ('seed', 'environment.name')
    curve = band(plotting.curves(table, over=over).axes[0].collections[0])[3]
    np.testing.assert_allclose(curve, np.divide(expected, 2))  # A run's last returns there are half of its final one.
    text = plotting.results_table(table, over=over)
    assert f'[{expected[0]:.1f}, {expected[1]:.1f}]' in text, text
    figure = plotting.heatmap(table, x='replay.fraction', y='vtrace.correction', over=over)
    cell = figure.axes[0].texts[0].get_text()
    assert f'{(expected[1] - expected[0]) / 2:.1f}' in cell, cell
    line = band(plotting.sensitivity(table, 'replay.fraction', over=over).axes[0].collections[0])
    np.testing.assert_allclose(line[0], expected)


# Tables.


def test_a_table_is_read_with_its_types(sweep):
    table = plotting.read_table(sweep)
    assert table['cell'].dtype.kind == 'U' and table['cell'][3] == '1e10'
    assert table['vtrace.correction'][0] == 'none' and table['replay.fraction'].dtype == np.float64
    assert np.isnan(table['episode_return'][0]) and len(table['frames']) == 2 * 3 * 2 * 3 * 3


def test_a_field_with_gaps_is_text_and_a_metric_with_gaps_is_not(tmp_path):
    path = write(tmp_path / 'a.csv', ['network.core'], [(('',), [(1, '', '', '')]), (('2',), [(1, '', 3, '')])])
    table = plotting.read_table(path)
    assert table['network.core'].tolist() == ['', '2']
    assert np.isnan(table['episode_return_last_100'][0]) and table['episode_return_last_100'][1] == 3


def test_rows_are_selected_by_values(grid):
    table = plotting.select(plotting.read_table(grid), {'vtrace.rho_bar': 'inf', 'seed': 0})
    assert set(table['vtrace.rho_bar']) == {INF} and set(table['seed']) == {0}
    assert len(table['cell']) == 3


@pytest.mark.parametrize(
    'text, word',
    [
        ('', 'no column'),
        ('cell,seed\na,0\n', "'frames'"),
        ('cell,seed,frames\n', 'no rows'),
        ('cell,seed,frames\na,0,1\nb,0\n', 'row 3'),
        ('cell,seed,frames\na,0,many\n', "'frames'"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, text, word):
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(ConfigError, match=word) as error:
        plotting.read_table(tmp_path / 'a.csv')
    assert 'a.csv' in str(error.value) and '\n' not in str(error.value)


def test_bad_names_and_values_are_refused(sweep):
    table = plotting.read_table(sweep)
    for call, words in (
        (lambda: plotting.read_table('nowhere.csv'), ['nowhere.csv', 'No such file']),
        (lambda: plotting.curves(table, hue='loss.corection'), ["'loss.corection'", "'vtrace.correction'"]),
        (lambda: plotting.curves(table, metric='final_retrun'), ["'final_retrun'", "'final_return'"]),
        (lambda: plotting.curves(table, metric='vtrace.correction'), ["'vtrace.correction'", 'not only numbers']),
        (lambda: plotting.curves(table, hue='final_return'), ["'final_return'", 'is not a field']),
        (lambda: plotting.sensitivity(table, 'vtrace.correction'), ["'vtrace.correction'", 'not only numbers']),
        (lambda: plotting.select(table, {'loss.corr': 'vtrace'}), ["'loss.corr'", "'vtrace.correction'"]),
        (lambda: plotting.select(table, {'vtrace.correction': 'v-trace'}), ['v-trace', 'none, vtrace, one_step_is']),
        (lambda: plotting.select(table, {'seed': 'x'}), ['seed=x', '0, 1, 2']),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
        for word in words:
            assert word in str(error.value)


def test_nothing_is_averaged_over_in_silence(sweep):
    table = plotting.read_table(sweep)
    for call in (
        lambda: plotting.curves(table, hue='vtrace.correction', panel='environment.name'),
        lambda: plotting.heatmap(table, x='seed', y='vtrace.correction', panel='environment.name'),
        lambda: plotting.results_table(table, panel='environment.name'),
    ):
        with pytest.raises(ConfigError, match=r'replay.fraction varies .*\(0, 0.5\).*--where replay.fraction'):
            call()
    text = plotting.results_table(table, panel='environment.name', over=('seed', 'replay.fraction'))
    assert 'mean of 6 runs' in text


def test_runs_without_a_value_are_told(sweep):
    table = plotting.read_table(sweep)
    assert plotting.left_out(table, 'final_return') == []
    table['final_return'][table['cell'] == '2e10'] = np.nan
    assert plotting.left_out(table, 'final_return') == ['2e10']
    text = plotting.results_table(table, panel='environment.name', split='replay.fraction')
    assert 'mean of 2 to 3 runs' in text


# Figures of a sweep.


def test_curves_have_a_panel_and_a_colour_per_value(sweep):
    table = plotting.select(plotting.read_table(sweep), {'replay.fraction': 0.5})
    figure = plotting.curves(table, hue='vtrace.correction', panel='environment.name')
    assert [axes.get_title() for axes in figure.axes] == ['catch', 'gymnasium/Acrobot-v1']
    assert figure.axes[0].get_xlabel() == 'environment frames (thousand)'
    assert legend(figure) == ['V-trace', '1-step IS', 'no correction']
    for axes, task in zip(figure.axes, ['catch', 'gymnasium/Acrobot-v1'], strict=True):
        finals = np.array([final('one_step_is', 0.5, seed, task) for seed in range(3)])
        line = lines(axes)['1-step IS']
        # The first row has no value yet.
        np.testing.assert_allclose(line.get_xdata(), [2, 3])
        np.testing.assert_allclose(line.get_ydata(), [finals.mean() / 4, finals.mean() / 2])
        index = list(lines(axes)).index('1-step IS')
        np.testing.assert_allclose(band(axes.collections[index])[3], plotting.bootstrap_interval(finals / 2))
        assert to_hex(axes.collections[index].get_facecolor()[0]) == to_hex(line.get_color())
    assert [a.get_color() for a in figure.axes[0].get_lines()] == [a.get_color() for a in figure.axes[1].get_lines()]


def test_curves_of_runs_with_other_log_points_are_interpolated(tmp_path):
    """Means are where both runs are known, interpolated; never of one run only."""
    cells = [((0,), [(0, 0, 0, 1), (2, 2, 2, 1), (4, 4, 4, 1)]), ((1,), [(1, 10, 10, 1), (3, 10, 10, 1)])]
    figure = plotting.curves(plotting.read_table(write(tmp_path / 'a.csv', ['seed'], cells)))
    (line,) = figure.axes[0].get_lines()
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [5.5, 6, 6.5])
    assert figure.axes[0].get_xlabel() == 'environment frames' and not figure.legends


def test_a_correction_keeps_its_colour_in_every_figure(sweep):
    table = plotting.select(plotting.read_table(sweep), {'replay.fraction': 0, 'environment.name': 'catch'})
    every = lines(plotting.curves(table, hue='vtrace.correction').axes[0])
    one = lines(plotting.curves(plotting.select(table, {'vtrace.correction': 'none'}), hue='vtrace.correction').axes[0])
    assert one['no correction'].get_color() == every['no correction'].get_color()
    assert len({line.get_color() for line in every.values()}) == 3


def test_a_heatmap_shows_means_and_gaps(grid):
    figure = plotting.heatmap(plotting.read_table(grid))
    axes = figure.axes[0]
    drawn = axes.collections[0].get_array().reshape(3, 3)
    # Rows are rho_bar = .5, 2, inf; means are over the seeds 0 and 1.
    np.testing.assert_allclose(drawn.filled(np.nan), [[0.5, 10.5, np.nan], [1.5, 11, 21.5], [2.5, 12.5, 22.5]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ['0.5', '2', '∞']
    assert (axes.get_xlabel(), axes.get_ylabel()) == (r'$\bar{c}$', r'$\bar{\rho}$')
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[1, 0] == '10.5\n±0.5'  # x is c_bar = 2, y is rho_bar = .5
    assert texts[1, 1] == '11.0'  # One run has no interval.
    assert len(texts) == 8 and (2, 0) not in texts
    hatched = {tuple(np.add(patch.get_xy(), 0.5)) for patch in axes.patches if isinstance(patch, Rectangle)}
    assert hatched == {(1, 0), (2, 1)}
    assert 'outside the theory' in legend(figure)[0]


def test_heatmap_the_other_way_round_hatches_the_same_cells(grid):
    axes = plotting.heatmap(plotting.read_table(grid), x='vtrace.rho_bar', y='vtrace.c_bar').axes[0]
    assert {tuple(np.add(patch.get_xy(), 0.5)) for patch in axes.patches} == {(0, 1), (1, 2)}


def test_a_heatmap_stands_beside_that_of_the_theory(grid):
    values = np.array([[1.0, np.nan], [3.0, 4.0]])
    theory = plotting.Matrix('contraction', [0.5, INF], [0.5, 1], values)
    figure = plotting.heatmap(plotting.read_table(grid), theory=theory)
    measured, predicted = figure.axes[:2]
    assert (measured.get_title(), predicted.get_title()) == ('measured', 'contraction')
    drawn = predicted.collections[0].get_array().reshape(2, 2)
    np.testing.assert_array_equal(drawn.filled(np.nan), values)
    assert {tuple(np.add(patch.get_xy(), 0.5)) for patch in predicted.patches} == {(1, 1)}
    with pytest.raises(ValueError, match='theory'):
        plotting.heatmap(plotting.read_table(grid), theory=theory._replace(x=[1.0]))


def test_a_heatmap_takes_other_fields(sweep):
    table = plotting.read_table(sweep)
    figure = plotting.heatmap(table, x='replay.fraction', y='vtrace.correction', panel='environment.name')
    # Panels share a scale.
    assert figure.axes[0].collections[0].get_clim() == figure.axes[1].collections[0].get_clim()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ['V-trace', '1-step IS', 'no correction']
    assert not figure.axes[0].patches and not figure.legends


def test_settings_are_ranked(sweep):
    figure = plotting.ranked(plotting.read_table(sweep), panel='environment.name')
    line = lines(figure.axes[0])['no correction']
    sets = [np.mean([final('none', replay, seed, 'catch') for seed in range(3)]) for replay in (0, 0.5)]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2])
    np.testing.assert_allclose(line.get_ydata(), sorted(sets, reverse=True))
    # Without a correction to tell apart, each is one of the sets.
    (line,) = plotting.ranked(plotting.read_table(sweep), hue=None, panel='environment.name').axes[0].get_lines()
    assert len(line.get_ydata()) == 6 and (np.diff(line.get_ydata()) <= 0).all()


def test_sensitivity_has_a_point_per_value(tmp_path):
    rates = [1e-4, 1e-3, 1e-2]
    cells = [((rate, seed), [(1, '', '', i + seed)]) for i, rate in enumerate(rates) for seed in (0, 1)]
    table = plotting.read_table(write(tmp_path / 'a.csv', ['optimizer.learning_rate', 'seed'], cells))
    axes = plotting.sensitivity(table, 'optimizer.learning_rate').axes[0]
    assert axes.get_xscale() == 'log' and axes.get_xlabel() == 'learning rate'
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xdata(), rates)
    np.testing.assert_allclose(line.get_ydata(), [0.5, 1.5, 2.5])
    assert band(axes.collections[0])[1e-3] == (1, 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ['0.0001', '0.001', '0.01']


def test_sensitivity_against_what_the_field_did(tmp_path):
    """The x axis is the mean of the other metric over rows and seeds, in the order of the field's values."""
    lags, kl = [0, 4, 64], [0.0, 0.5, 0.2]
    cells = [
        ((lag, seed), [(1, kl[i] + seed, '', i + seed), (2, kl[i] + seed, '', i)])
        for i, lag in enumerate(lags)
        for seed in (0, 1)
    ]
    table = plotting.read_table(write(tmp_path / 'a.csv', ['policy_lag', 'seed'], cells))
    x, y = list(table)[-3], list(table)[-1]
    axes = plotting.sensitivity(table, 'policy_lag', metric=y, against=x).axes[0]
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xdata(), np.array(kl) + 0.5)
    np.testing.assert_allclose(line.get_ydata(), [0, 1, 2])
    assert axes.get_xlabel() != 'policy lag'
    axes = plotting.sensitivity(table, 'policy_lag', metric=y).axes[0]
    assert axes.get_xscale() == 'symlog' and [t.get_text() for t in axes.get_xticklabels()] == ['0', '4', '64']
    with pytest.raises(ConfigError, match='no_such'):
        plotting.sensitivity(table, 'policy_lag', metric=y, against='no_such')


def test_sensitivity_has_a_place_for_infinity(grid):
    figure = plotting.sensitivity(plotting.read_table(grid), 'vtrace.rho_bar', hue='vtrace.c_bar')
    assert legend(figure) == ['0.5', '2', '∞'] and figure.axes[0].get_xscale() == 'linear'
    line = lines(figure.axes[0])['2']
    np.testing.assert_allclose(line.get_xdata(), [0.5, 2, 3.5])
    np.testing.assert_allclose(line.get_ydata(), [10.5, 11, 12.5])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['0.5', '2', '∞']
    # c_bar = inf was not measured at rho_bar = .5.
    np.testing.assert_allclose(lines(figure.axes[0])['∞'].get_xdata(), [2, 3.5])


ROWS = [
    {'rho_bar': rho_bar, 'c_bar': c_bar, 'bias': 1 / float(rho_bar), 'var': float(rho_bar) * c_bar}
    for rho_bar in (10, 1, 0.1)
    for c_bar in (1, 2)
]


def test_bias_and_variance_have_an_axis_each():
    figure = plotting.bias_variance([*ROWS, {'rho_bar': 'inf', 'c_bar': 1, 'bias': 0, 'var': 99}], variance='var')
    bias, variance = figure.axes
    assert (bias.get_ylabel(), variance.get_ylabel()) == (
        'squared bias of the value targets',
        'variance of the value targets',
    )
    np.testing.assert_allclose(lines(bias)['1'].get_ydata(), [10, 1, 0.1, 0])
    np.testing.assert_allclose(lines(variance)['2'].get_ydata(), [0.2, 2, 20])
    np.testing.assert_allclose(lines(variance)['1'].get_xdata(), [0.1, 1, 10, 100])
    # What is zero has no logarithm.
    assert (bias.get_yscale(), variance.get_yscale()) == ('linear', 'log')


def test_bad_rows_of_bias_and_variance_are_refused():
    for rows, word in ((ROWS, "'variance'; did you mean 'var'"), ([], 'no rows'), ([{'rho_bar': 'x'}], 'not a number')):
        with pytest.raises(ConfigError, match=word):
            plotting.bias_variance(rows)


# Other statistics than the mean, and few seeds.


@pytest.fixture
def seven(tmp_path):
    """Seven seeds, the values of which are far from symmetric, with two rows each."""
    cells = [((seed, 0.5), [(1, '', value, value), (2, '', value, value)]) for seed, value in enumerate(SEVEN)]
    return plotting.read_table(write(tmp_path / 'seven.csv', ['seed', 'replay.fraction'], cells))


SEVEN = [0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 100.0]


@pytest.mark.parametrize('name, function, value', [('iqm', interquartile_mean, 3.8), ('median', np.median, 3.0)])
def test_figures_show_another_statistic(seven, name, function, value):
    low, high = plotting.bootstrap_interval(SEVEN, statistic=function)
    figure = plotting.curves(seven, statistic=name)
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), value)
    np.testing.assert_allclose(band(figure.axes[0].collections[0])[2], (low, high))
    assert figure.get_suptitle() == plotting.STATISTICS[name]
    axes = plotting.sensitivity(seven, 'replay.fraction', statistic=name).axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), value)
    np.testing.assert_allclose(band(axes.collections[0])[0.5], (low, high))
    text = plotting.heatmap(seven, x='replay.fraction', y='replay.fraction', statistic=name).axes[0].texts[0].get_text()
    assert text == f'{value:.2f}\n±{(high - low) / 2:.2f}'
    line = plotting.ranked(seven, hue=None, statistic=name).axes[0].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), value)
    text = plotting.results_table(seven, 'replay.fraction', statistic=name)
    assert f'{value:.2f} [{low:.2f}, {high:.2f}]*' in text
    assert f'final_return, {plotting.STATISTICS[name]} of 7 runs' in text and 'seeds' not in text


def test_an_unknown_statistic_is_refused(seven):
    for call in (plotting.curves, functools.partial(plotting.ranked, hue=None), plotting.heatmap):
        arguments = {'x': 'replay.fraction', 'y': 'seed'} if call is plotting.heatmap else {}
        with pytest.raises(ConfigError, match="'mode' is not a statistic; choose mean, iqm, median"):
            call(seven, statistic='mode', **arguments)


def test_a_figure_of_fewer_than_five_seeds_says_so(seven, sweep):
    assert plotting.curves(seven).get_suptitle() == ''
    for cells, caption in ((5, ''), (4, 'only 4 seeds'), (1, 'only 1 seed')):
        part = {name: column[: 2 * cells] for name, column in seven.items()}
        assert plotting.curves(part).get_suptitle() == caption
        assert plotting.sensitivity(part, 'replay.fraction', statistic='iqm').get_suptitle() == (
            f'interquartile mean; {caption}' if caption else 'interquartile mean'
        )
    # Averages over six runs, of two replay fractions with three seeds each.
    over = {'over': ('seed', 'replay.fraction'), 'panel': 'environment.name'}
    assert plotting.ranked(plotting.read_table(sweep), **over).get_suptitle() == 'only 3 seeds'
    assert plotting.results_table(plotting.read_table(sweep), **over).endswith('; only 3 seeds\n')


# Tables as text.


def test_the_table_of_results_marks_the_best(sweep):
    table = plotting.select(plotting.read_table(sweep), {'environment.name': 'catch'})
    low, high = plotting.bootstrap_interval([final('vtrace', 0, seed, 'catch') for seed in range(3)])
    best = f'0.93 [{low:.2f}, {high:.2f}]'
    text = plotting.results_table(table, panel=None, split='replay.fraction', markdown=True).splitlines()
    assert cells_of(text[0])[1:] == ['final_return, replay.fraction=0', 'final_return, replay.fraction=0.5']
    assert [cells_of(line)[0] for line in text[2:5]] == ['V-trace', '1-step IS', 'no correction']
    assert cells_of(text[2])[1] == f'**{best}**' and '**' not in text[3] + text[4]
    assert len({len(line) for line in text[:5]}) == 1

    text = plotting.results_table(table, panel='environment.name', split='replay.fraction').splitlines()
    assert text[0].split() == ['vtrace.correction', 'catch', 'catch']
    assert text[1].split() == ['replay.fraction=0', 'replay.fraction=0.5']
    assert f'{best}*' in text[3] and text[3].count('*') == 2 and '*' not in text[4] + text[5]
    assert text[0].index('catch') == text[1].index('replay') == text[3].index('0.93')
    assert text[-1] == 'final_return, mean of 3 runs [95 % bootstrap interval]; *: the best of its column; only 3 seeds'


def cells_of(line):
    return [text.strip() for text in line.strip('|').split('|')]


def test_the_table_of_results_shows_gaps_and_single_runs(grid):
    text = plotting.results_table(
        plotting.select(plotting.read_table(grid), {'seed': 0}), hue='vtrace.c_bar', panel='vtrace.rho_bar'
    ).splitlines()
    assert text[0].split() == ['vtrace.c_bar', 'vtrace.rho_bar=0.5', 'vtrace.rho_bar=2', 'vtrace.rho_bar=inf']
    assert text[4].split() == ['∞', '-', '21.0*', '22.0*']
    assert text[-1] == 'final_return, mean of 1 run; *: the best of its column; only 1 seed'


# Runs.


def run(path, task='catch', evaluations=True, returns=(-1.0, 0.5)):
    """A workdir."""
    path.mkdir(parents=True)
    (path / 'config.json').write_text(json.dumps({'config': {'environment': {'name': task}}}))
    rows = [{'frames': 1_000_000}] + [
        {'frames': (i + 2) * 1_000_000, 'episode_return_last_100': value} for i, value in enumerate(returns)
    ]
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"frames": torn')
    if evaluations:
        row = {'frames': 3_000_000, 'mean_return': 0.75, 'stderr': 0.125, 'episodes': 20}
        (path / 'evaluations.jsonl').write_text(json.dumps(row) + '\n')
    return path


def test_a_learning_curve_shows_training_and_evaluations(tmp_path):
    figure = plotting.learning_curve([run(tmp_path / 'a')])
    (axes,) = figure.axes
    line, dots = axes.get_lines()[:2]
    np.testing.assert_array_equal(line.get_xydata(), [(2, -1), (3, 0.5)])
    np.testing.assert_array_equal(dots.get_xydata(), [(3, 0.75)])
    np.testing.assert_array_equal(axes.collections[0].get_segments()[0], [(3, 0.625), (3, 0.875)])
    assert axes.get_xlabel() == 'environment frames (million)' and axes.get_title() == 'catch'
    assert legend(figure) == ['training, mean of the last 100 episodes', 'evaluation, 20 episodes, standard error']


def test_learning_curves_of_several_runs_share_a_figure(tmp_path):
    workdirs = [
        run(tmp_path / 'x' / 'a', evaluations=False),
        run(tmp_path / 'b', evaluations=False),
        run(tmp_path / 'c', 'atari/pong', evaluations=False),
    ]
    figure = plotting.learning_curve(workdirs)
    assert [axes.get_title() for axes in figure.axes] == ['catch', 'atari/pong']
    assert [list(lines(axes)) for axes in figure.axes] == [['a', 'b'], ['c']]
    assert legend(figure) == ['a', 'b', 'c']
    # Two runs of one name are told apart by their paths.
    same = [tmp_path / 'x' / 'a', run(tmp_path / 'y' / 'a', evaluations=False)]
    assert legend(plotting.learning_curve(same)) == list(map(str, same))


def test_a_learning_curve_of_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='config.json has format 3, and impala_jax .* reads formats 1 to 2'):
        newer = run(tmp_path / 'newer')
        (newer / 'config.json').write_text('{"format": 3}')
        plotting.learning_curve([newer])
    with pytest.raises(ConfigError, match='config.json; give the --workdir'):
        plotting.learning_curve([tmp_path])
    with pytest.raises(ConfigError, match='no episode has ended'):
        plotting.learning_curve([run(tmp_path / 'a', returns=())])


# Agents over the runs and tasks of a suite.


def suite_result(scores, environment='atari57', normalised=True):
    tasks = {
        task: {'mean_return': value, 'human_normalised': value if normalised else None}
        for task, value in scores.items()
    }
    return {'environment': environment, 'tasks': tasks, 'aggregates': {}}


def agents_of(scores, **kwargs):
    """Results by agent, from scores [runs, tasks] by agent; tasks are in another order in every second file."""
    return {
        name: [
            suite_result({f'task_{i}': row[i] for i in list(range(len(row)))[:: (-1) ** run]}, **kwargs)
            for run, row in enumerate(array.tolist())
        ]
        for name, array in scores.items()
    }


def test_profiles_are_drawn_with_their_intervals():
    rng = np.random.default_rng(0)
    scores = {'deep': rng.normal([10, 80, 150], 20, [5, 3]), 'shallow': rng.normal([0, 70, 120], 20, [4, 3])}
    figure = plotting.profile(agents_of(scores))
    (axes,) = figure.axes
    for i, (name, expected) in enumerate(scores.items()):
        line = lines(axes)[name]
        for tau, fraction in line.get_xydata():
            assert fraction == pytest.approx((expected > tau).mean())
        assert line.get_drawstyle() == 'steps-post' and line.get_ydata()[0] == 1
        assert set(expected.ravel()) <= set(line.get_xdata())
        low, high = statistics.stratified_interval(
            lambda drawn: statistics.performance_profile(drawn, [75.0]), expected, num_resamples=2000
        )
        tau = max(tau for tau in line.get_xdata() if tau <= 75)
        edges = axes.collections[i].get_paths()[0].vertices
        assert {low.item(), high.item()} <= set(edges[edges[:, 0] == tau, 1]), tau
    assert legend(figure) == ['deep', 'shallow', 'human'] and figure.get_suptitle() == 'as few as 4 seeds'
    assert axes.get_title() == 'atari57, 3 tasks' and axes.get_xscale() == 'linear'


def test_the_table_of_a_profile_has_the_statistics():
    rng = np.random.default_rng(0)
    scores = {'deep': rng.normal([10, 80, 150], 20, [5, 3]), 'shallow': rng.normal([0, 70, 120], 20, [5, 3])}
    rows = plotting.profile_table(agents_of(scores)).splitlines()
    assert rows[0].endswith('  P(better than deep)')

    def text(function, *arrays, decimals=1):
        low, high = statistics.stratified_interval(function, *arrays, num_resamples=2000)
        return f'{function(*arrays):.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]'

    for row, (name, array) in zip(rows[2:], scores.items(), strict=False):
        expected = [name, '5', text(interquartile_mean, array)]
        expected += [text(lambda drawn: np.median(drawn.mean(0)), array), text(np.mean, array)]
        expected += [text(lambda drawn: np.mean(np.maximum(100 - drawn, 0)), array)]
        if name == 'shallow':
            better = functools.partial(text, statistics.probability_of_improvement, decimals=2)
            expected.append(better(array, scores['deep']))
        assert [word.strip() for word in row.split('  ') if word] == expected
    assert rows[-1].endswith('[95 % bootstrap interval over runs]')


def test_a_profile_of_single_runs_and_of_returns():
    agents = agents_of({'a': np.array([[1.0, 2.0]]), 'b': np.array([[3.0, 0.5]])}, environment='two', normalised=False)
    rows = plotting.profile_table(agents).splitlines()
    assert rows[0].split() == ['agent', 'runs', *'interquartile mean median mean P(better than a)'.split()]
    assert rows[3].split() == ['b', '1', '1.75', '1.75', '1.75', '0.50']
    assert rows[-1] == 'two, 2 tasks, mean returns [95 % bootstrap interval over runs]; only 1 seed'
    figure = plotting.profile(agents)
    assert legend(figure) == ['a', 'b'] and figure.axes[0].get_xlabel() == 'return of an episode'


def test_scores_that_cannot_be_compared_are_refused():
    one = np.array([[1.0, 2.0]])
    mixed = agents_of({'a': one}) | agents_of({'b': one[:, :1]})
    for agents, words in (
        ({}, 'no scores'),
        ({'a': []}, 'no scores'),
        ({'a': [{'mean_return': 1.0}]}, 'not scores of a suite'),
        (mixed, 'b was scored on 1 tasks of atari57, and another run on 2 of atari57'),
        (agents_of({'a': one}) | agents_of({'b': one}, environment='dmlab30'), 'of dmlab30, and another run'),
    ):
        with pytest.raises(ConfigError, match=words):
            plotting.profile(agents)


# Files and the command line.


@pytest.mark.parametrize('name, start', [('a.png', b'\x89PNG'), ('a.svg', b'<?xml')])
def test_figures_are_saved_and_repeat(grid, tmp_path, monkeypatch, name, start):
    monkeypatch.setattr(figures, '_DPI', 40)
    table = plotting.read_table(grid)
    plotting.save(plotting.heatmap(table), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(start)
    plotting.save(plotting.heatmap(table), tmp_path / name)
    assert (tmp_path / name).read_bytes() == data


def test_png_has_300_dots_an_inch(grid, tmp_path):
    figure = plotting.heatmap(plotting.read_table(grid))
    plotting.save(figure, tmp_path / 'a.png')
    width = int.from_bytes((tmp_path / 'a.png').read_bytes()[16:20], 'big')
    assert width == int(300 * figure.get_figwidth())


def test_without_matplotlib_the_remedy_is_said(monkeypatch, grid, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    table = plotting.read_table(grid)
    assert 'final_return' in plotting.results_table(table, hue='vtrace.c_bar', panel='vtrace.rho_bar')
    for call in (lambda: plotting.heatmap(table), lambda: plotting.check_output(tmp_path / 'a.png')):
        with pytest.raises(ConfigError, match=r"pip install 'impala_jax\[plot\]'"):
            call()


def plot(*arguments):
    return subprocess.run(
        [sys.executable, 'launch/plot.py', *map(str, arguments)],
        **{'cwd': ROOT, 'env': os.environ | {'PYTHONPATH': str(ROOT)}, 'timeout': 100},
        **{'capture_output': True, 'text': True},
    )


def test_the_script_saves_a_figure(sweep, tmp_path):
    done = plot(
        *('curves', '--results', sweep, '--hue', 'vtrace.correction', '--panel', 'environment.name'),
        *('--where', 'replay.fraction=0.5', 'seed=0', '--output', tmp_path / 'a.svg'),
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert (tmp_path / 'a.svg').read_bytes().startswith(b'<?xml')


@pytest.fixture
def plot_here(call, monkeypatch):
    """Function that runs `impala plot` in this process, with few dots."""
    monkeypatch.setattr(figures, '_DPI', 40)
    return functools.partial(call, 'plot')


def test_every_figure_is_drawn_from_the_command_line(plot_here, sweep, grid, tmp_path):
    (tmp_path / 'rows.json').write_text(json.dumps(ROWS))
    with (tmp_path / 'rows.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    workdirs = [run(tmp_path / name) for name in 'ab']
    for number, arguments in enumerate(
        [
            ['curve', '--workdir', *workdirs],
            ['heatmap', '--results', grid],
            ['heatmap', '--results', sweep, *'--x seed --y vtrace.correction --panel environment.name'.split()]
            + ['--where', 'replay.fraction=0'],
            ['ranked', '--results', sweep, '--panel', 'environment.name', '--statistic', 'median'],
            ['sensitivity', '--results', grid, '--field', 'vtrace.rho_bar', '--hue', 'vtrace.c_bar'],
            ['bias-variance', '--rows', tmp_path / 'rows.json', '--variance', 'var'],
            ['bias-variance', '--rows', tmp_path / 'rows.csv', '--variance', 'var', '--x', 'c_bar', '--hue', 'rho_bar'],
        ]
    ):
        output = tmp_path / f'{number}.png'
        captions = ['as few as 1 seed', 'only 1 seed', 'median; only 3 seeds', 'as few as 1 seed']
        caption = f'{captions[number - 1]}\n' if 0 < number < 5 else ''
        assert plot_here(*arguments, '--output', output) == (0, f'figure: {output}\n{caption}', '')
        assert output.read_bytes().startswith(b'\x89PNG')


def test_a_profile_is_drawn_from_the_command_line(plot_here, tmp_path):
    for name, value in (('a', 1.0), ('b', 2.0), ('c', 3.0)):
        (tmp_path / name).write_text(json.dumps(suite_result({'x': value, 'y': 2 * value})))
    output = tmp_path / 'a.png'
    agents = ['--agent', 'deep', tmp_path / 'a', tmp_path / 'b', '--agent', 'shallow', tmp_path / 'c']
    status, out, reason = plot_here('profile', *agents, '--output', output)
    assert (status, reason) == (0, '') and output.read_bytes().startswith(b'\x89PNG')
    first, *table = out.splitlines()
    assert first == f'figure: {output}' and table[-1].endswith('; as few as 1 seed') and out.count('as few as') == 1
    assert [row.split()[:2] for row in table[2:4]] == [['deep', '2'], ['shallow', '1']]
    for bad, words in (
        (['--agent', 'deep'], 'NAME FILE'),
        (agents[:3] * 2, 'once per agent'),
        (['--agent', 'a', 'b'], 'b: '),
    ):
        status, out, reason = plot_here('profile', *bad, '--output', tmp_path / 'b.png')
        assert status == 1 and words in reason and len(reason.splitlines()) == 1, reason


def test_the_table_is_printed_from_the_command_line(plot_here, sweep):
    rows = [
        line.rpartition(',')[0] + ',' if line.startswith('0e10') else line for line in sweep.read_text().splitlines()
    ]
    sweep.write_text('\n'.join(rows) + '\n')
    table = ['table', '--results', sweep, '--panel', 'environment.name']
    status, out, err = plot_here(*table, '--split', 'replay.fraction', '--markdown')
    assert status == 0 and '| V-trace ' in out and out.count('**') == 2 * 4
    assert err == 'left out because they lack final_return: 0e10'
    # Nothing is left to say when the run is not among those asked for.
    assert plot_here(*table, '--where', 'replay.fraction=0.5')[2] == ''


def test_bad_command_lines_get_one_line(plot_here, sweep, tmp_path):
    curves = ['curves', '--results', sweep, '--output', tmp_path / 'a.png']
    for arguments, words in (
        ([], ['FIGURE']),
        (['curvs'], ["'curvs'", 'curves']),
        (['curves', '--results', sweep, '--output', 'a.pdf'], ['a.pdf', '.png or .svg']),
        (['curves', '--results', sweep, '--output', tmp_path / 'no' / 'a.png'], ['no directory']),
        (['curves', '--results', 'nowhere.csv', '--output', tmp_path / 'a.png'], ['nowhere.csv']),
        (['curves', '--output', tmp_path / 'a.png'], ['--results']),
        ([*curves, '--hue', 'correction'], ["'correction'", "'vtrace.correction'"]),
        ([*curves, '--where', 'seed'], ['FIELD=VALUE']),
        ([*curves, '--where', 'seed=0', 'seed=1'], ['seed=1', 'once']),
        ([*curves, '--where', 'seed=9'], ['seed=9', '0, 1, 2']),
        (['bias-variance', '--rows', sweep, '--output', tmp_path / 'a.png'], ["'rho_bar'"]),
        (['bias-variance', '--rows', tmp_path / 'no.json', '--output', tmp_path / 'a.png'], ['no.json']),
        (['curve', '--workdir', tmp_path, '--output', tmp_path / 'a.png'], ['config.json']),
    ):
        status, out, reason = plot_here(*arguments)
        assert status != 0 and out == '' and len(reason.splitlines()) == 1, (arguments, reason)
        for word in words:
            assert word in reason
        assert not (tmp_path / 'a.png').exists()


def test_the_package_does_without_matplotlib():
    assert impala_jax.plotting is plotting
    code = 'import sys; sys.modules["matplotlib"] = None; import impala_jax; impala_jax.plotting.read_table'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=100)


# A population.


def test_pbt_shows_schedules_and_copies(tmp_path):
    hyperparameters = {'learning_rate': 1e-3, 'entropy_cost': 0.01, 'epsilon': 0.1}
    first = [{'frames': 0, 'fitness': None, **hyperparameters}]
    for number, rows in enumerate(
        [
            first + [{'frames': 2000, 'fitness': 0.5, 'copied': False, **hyperparameters}],
            first
            + [
                {'frames': 2000, 'fitness': 0.1, 'copied': True, **hyperparameters, 'learning_rate': 1.2e-3},
                {'frames': 4000, 'fitness': None, 'copied': False, **hyperparameters, 'learning_rate': 1.2e-3},
            ],
        ]
    ):
        (tmp_path / f'member_0{number}').mkdir()
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        (tmp_path / f'member_0{number}' / 'pbt.jsonl').write_text(lines)
    (tmp_path / 'member_01' / 'metrics.jsonl').write_text('{"frames": 5000}\n')
    figure = plotting.pbt(tmp_path)
    fitness, learning_rate, entropy_cost, epsilon = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ['fitness', 'learning rate', 'entropy cost', 'epsilon']
    assert all(axes.get_yscale() == 'log' for axes in (learning_rate, entropy_cost, epsilon))
    drawn = [line.get_xydata().tolist() for line in learning_rate.get_lines()]
    # To where the member is now; and a dot for the copy.
    assert [[0, 1e-3], [2, 1e-3], [2, 1e-3]] in drawn
    assert [[0, 1e-3], [2, 1.2e-3], [4, 1.2e-3], [5, 1.2e-3]] in drawn
    assert [[2, 1.2e-3]] in drawn
    assert [[2, 0.5]] in [line.get_xydata().tolist() for line in fitness.get_lines()]
    assert legend(figure) == ['member 00', 'member 01', 'copies another member']
    with pytest.raises(ConfigError, match='holds no population'):
        plotting.pbt(tmp_path / 'member_00')
