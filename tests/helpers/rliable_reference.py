"""What rliable 1.2 computes; python -m tests.helpers.rliable_reference writes it to tests/studies/rliable.json.

rliable is not among the pins, because pandas and statsmodels come with it. With pandas 3 its
dependency arch 7.2 cannot be imported: python -m pip install rliable 'pandas<3'.
"""

import json

import numpy as np

from impala_jax.studies import statistics
from tests.helpers.programs import ROOT

PATH = ROOT / 'tests' / 'studies' / 'rliable.json'
THRESHOLDS = [-0.5, 0.0, 0.25, 0.5, 1.0, 2.0]
NUM_RESAMPLES = 60
SEED = 3
ONE = {  # Statistics of one agent.
    'iqm': statistics.interquartile_mean,
    'optimality_gap': statistics.optimality_gap,
    'profile': lambda scores: statistics.performance_profile(scores, THRESHOLDS),
    'mean': np.mean,
}


def scores(seed):
    """Two agents' scores on four tasks, [5, 4] and [3, 4], of one decimal, so that there are ties."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal([0, 0.4, 1, 3], 0.6, [5, 4]), 1), np.round(rng.normal([0, 0.5, 1, 2], 0.6, [3, 4]), 1)


def draws(*agents):
    """Which run of an agent `stratified_interval` draws for each run and task, [R, runs, tasks] for each agent."""
    found = []
    numbers = [np.tile(np.arange(len(array))[:, None], array.shape[1]) for array in agents]
    statistics.stratified_interval(
        lambda *drawn: found.append(drawn) or 0.0, *numbers, num_resamples=NUM_RESAMPLES, seed=SEED
    )
    return [np.array(drawn, int) for drawn in zip(*found, strict=True)]


def reference(agent, other):
    """What rliable computes of two agents' scores, with intervals from the draws of `stratified_interval`."""
    from rliable import library, metrics

    class Given(library.StratifiedBootstrap):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            (drawn,) = draws(*args)
            self._given = iter(drawn)

        def update_indices(self):
            return (next(self._given), *self._strata_indices)

    class GivenIndependent(library.StratifiedIndependentBootstrap):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._given = zip(*draws(*args), strict=True)

        def update_indices(self):
            pairs = zip(next(self._given), self._args_strata_indices, strict=True)
            return [(drawn, *strata) for drawn, strata in pairs], {}

    of_one = {
        'iqm': metrics.aggregate_iqm,
        'optimality_gap': metrics.aggregate_optimality_gap,
        'profile': lambda scores: library.score_distributions(scores, THRESHOLDS),
        'mean': metrics.aggregate_mean,
    }
    calls = {name: (function, Given(agent)) for name, function in of_one.items()}
    calls['improvement'] = metrics.probability_of_improvement, GivenIndependent(agent, other)
    found = {}
    for name, (function, bootstrap) in calls.items():
        value = function(*((agent, other) if name == 'improvement' else (agent,)))
        interval = bootstrap.conf_int(
            lambda *drawn, f=function: np.atleast_1d(f(*drawn)), NUM_RESAMPLES, size=0.95, method='percentile'
        )
        found[name] = {'value': np.asarray(value).tolist(), 'interval': np.squeeze(interval).tolist()}
    return found


def computed(agent, other):
    """What this package computes of the same."""
    settings = {'num_resamples': NUM_RESAMPLES, 'seed': SEED}
    found = {name: (f(agent), statistics.stratified_interval(f, agent, **settings)) for name, f in ONE.items()}
    improvement = statistics.probability_of_improvement
    found['improvement'] = (
        improvement(agent, other),
        statistics.stratified_interval(improvement, agent, other, **settings),
    )
    return {name: {'value': value, 'interval': interval} for name, (value, interval) in found.items()}


if __name__ == '__main__':
    agent, other = scores(seed=1)
    content = {
        'agent': agent.tolist(),
        'other': other.tolist(),
        'draws_of_one': draws(agent)[0].tolist(),
        'draws_of_two': [drawn.tolist() for drawn in draws(agent, other)],
        'rliable': reference(agent, other),
    }
    PATH.write_text(json.dumps(content) + '\n')
