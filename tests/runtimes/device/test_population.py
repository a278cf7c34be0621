"""The members of a compiled population are the runs of their configurations."""

import threading

import jax
import numpy as np
import pytest

from impala_jax import run
from impala_jax.runtimes.device.population import Population, program_of
from tests.helpers.device_runs import small
from tests.helpers.runs import TIMES, rows_of

REPLAY = {'learner__batch_size': 8, 'replay__fraction': 0.5, 'replay__capacity': 20}
MEMBERS = [
    {},
    {'policy_lag': 5, 'seed': 1},
    {'vtrace__correction': 'none', 'policy_lag': 3, 'optimizer__learning_rate': 3e-3},
    {'vtrace__correction': 'one_step_is', 'seed': 2, 'policy_lag': 5, 'loss__entropy_cost': 0.1},
    {'vtrace__correction': 'epsilon_correction', 'policy_lag': 2, 'loss__discount': 0.9},
    {'vtrace__rho_bar': 2.0, 'vtrace__c_bar': 1.5, 'vtrace__pg_rho_bar': 3.0, 'vtrace__lambda': 0.9, 'policy_lag': 4},
    {'vtrace__rho_bar': float('inf'), 'vtrace__c_bar': float('inf'), 'optimizer__epsilon': 0.1},
    {'seed': 3, 'policy_lag': 1},
]


def train(configs, num_members=None):
    lag = max(config.policy_lag for config in configs)
    return Population(configs[0], num_members or len(configs), lag).train(configs, threading.Event())


def assert_close(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() - set(TIMES) == other.keys() - set(TIMES)
        for name in row.keys() - set(TIMES):
            if 'truncated' not in name and 'histogram' not in name:  # A ratio may fall on either side of an edge.
                np.testing.assert_allclose(row[name], other[name], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(('replay', 'compared'), [({}, (2, 3, 5)), (REPLAY, (1, 4))])
def test_each_member_is_the_run_of_its_configuration(replay, compared, tmp_path):
    configs = [small(60, **replay, **member) for member in MEMBERS]
    assert len({program_of(config) for config in configs}) == 1
    results = train(configs)
    # Every input has an effect, so no two members learn the same.
    assert len({result.rows[-1]['loss'] for result in results}) == len(MEMBERS)
    for i in compared:
        run(configs[i], tmp_path / str(i), 'device')
        assert_close(results[i].rows, rows_of(tmp_path / str(i)))


def test_what_is_no_input_makes_another_program():
    for change in ({'learner__unroll_length': 20}, {'network__core': 'lstm'}, {'total_frames': 80}):
        assert program_of(small(**change)) != program_of(small())


def test_members_are_split_over_devices_and_padded():
    assert jax.device_count() == 8
    configs = [small(40, learner__num_devices=8, learner__batch_size=8, seed=seed) for seed in range(5)]
    on_one = [small(40, learner__batch_size=8, seed=seed) for seed in range(5)]
    for result, other in zip(train(configs, num_members=8), train(on_one), strict=True):
        assert_close(result.rows, other.rows)


def test_the_evaluation_is_of_whole_episodes():
    """The delayed bandit ends after 20 steps."""
    settings = {'environment__name': 'jax/delayed_bandit', 'evaluator__episodes': 50}
    (whole,) = train([small(5, **settings)])
    assert whole.evaluation is not None
    returns = whole.evaluation.returns
    assert len(returns) == 50 and len(set(returns)) > 1 and whole.evaluation.num_truncated == 0
    (cut,) = train([small(5, **settings, evaluator__max_episode_steps=19)])
    assert cut.evaluation is not None
    assert len(cut.evaluation.returns) == 50 and cut.evaluation.num_truncated == 50


def test_a_population_that_is_stopped_has_no_result():
    stop = threading.Event()
    configs = [small(10_000)]
    reports = []

    def report(fraction):
        reports.append(fraction)
        stop.set()

    assert Population(configs[0], 1, 0).train(configs, stop, report) is None
    assert 0 < reports[-1] < 1
