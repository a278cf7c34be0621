"""The compiled program makes the updates of lockstep, and its runs are those of every runtime."""

import jax
import numpy as np
import pytest

from impala_jax import ConfigError, config, run
from impala_jax.environments import EnvironmentFailure
from impala_jax.rundir import checkpoint
from impala_jax.training.hooks import NonFiniteGradients
from tests.helpers.device_runs import small
from tests.helpers.runs import assert_same, files, learned, rows_of

# So that runs of any length are compiled once.
SAME_PROGRAM = {'optimizer__schedule_frames': 4000, 'optimizer__schedule': 'constant'}


def result(workdir):
    rows, state = learned(workdir)
    return rows, state['learner']


def assert_close(a, b):
    """Asserts that two runs agree up to rounding."""
    for row, other in zip(a[0], b[0], strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, dict):
                assert sum(value['counts']) == sum(other[name]['counts'])
            elif 'truncated' not in name:  # A ratio may fall on either side of an edge.
                np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-4, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a[1], b[1])


@pytest.mark.parametrize('core', ['feedforward', 'lstm'])
@pytest.mark.parametrize('lag', [0, 5])
def test_the_program_makes_the_updates_of_lockstep(core, lag, tmp_path):
    settings = small(network__core=core, policy_lag=lag)
    for runtime in ('lockstep', 'device'):
        run(settings, tmp_path / runtime, runtime)
    assert_close(result(tmp_path / 'device'), result(tmp_path / 'lockstep'))


def test_either_runtime_continues_the_run_of_the_other(tmp_path):
    """With the same environments, actions and old parameters, and in rows that do not show the change."""
    settings = {'policy_lag': 3, 'network__core': 'lstm', **SAME_PROGRAM}
    run(small(**settings), tmp_path / 'whole', 'lockstep')
    for part, runtime in ((25, 'device'), (50, 'lockstep'), (100, 'device')):
        run(small(part, **settings), tmp_path / 'parts', runtime)
    whole, parts = result(tmp_path / 'whole'), result(tmp_path / 'parts')
    extra = {1000}  # A run writes a row when its budget is spent.
    kept = [row for row in parts[0] if row['frames'] not in extra]
    by_frames = {row['frames']: row for row in kept}
    assert [row['frames'] for row in whole[0]] == sorted(by_frames)
    assert_close((whole[0][-1:], whole[1]), (kept[-1:], parts[1]))


@pytest.mark.parametrize('replay', [0, 0.5])
def test_a_run_resumes_bit_for_bit(replay, tmp_path):
    settings = {'policy_lag': 3, 'replay__fraction': replay, 'replay__capacity': 9, **SAME_PROGRAM}
    settings['learner__batch_size'] = 8 if replay else 4
    run(small(**settings), tmp_path / 'whole', 'device')
    for part in (50, 100):
        run(small(part, **settings), tmp_path / 'parts', 'device')
    assert_same(learned(tmp_path / 'whole'), learned(tmp_path / 'parts'))
    if replay:
        assert rows_of(tmp_path / 'whole')[-1]['replay_size'] == 9


@pytest.mark.parametrize('lag', [1, 8, 64])
def test_the_lag_of_every_transition_is_exact(lag, tmp_path):
    run(small(80, policy_lag=lag), tmp_path, 'device')
    rows = rows_of(tmp_path)
    late = [row for row in rows if row['learner_steps'] >= lag + 10]
    assert late and all((row['policy_lag_min'], row['policy_lag_max']) == (lag, lag) for row in late)
    # Before, the initial parameters act.
    assert rows[0]['policy_lag_min'] == 0 and rows[0]['policy_lag_max'] == min(lag, 9)


def test_replayed_trajectories_are_those_that_were_new(tmp_path):
    run(small(replay__fraction=0.5, learner__batch_size=8, replay__capacity=40), tmp_path, 'device')
    row = rows_of(tmp_path)[-1]
    # Uniform over the last 10 updates, the present one included.
    assert row['replay_size'] == 40 and 3.5 < row['replay_lag_mean'] < 5.5
    assert row['policy_lag_max'] == 0 and len(row['policy_lag_histogram']['edges']) == 6  # 0, 1, 2 to 3, ..., 8 to 15.
    saved = checkpoint.restore(tmp_path, {'runtime': None}).state['runtime']['replay']
    assert saved['counts'].tolist() == [400, 100]


@pytest.mark.parametrize('replay', [0, 0.5])
def test_one_device_equals_eight(replay, tmp_path):
    assert jax.device_count() == 8
    settings = {'learner__batch_size': 16, 'replay__fraction': replay, 'replay__capacity': 50, 'policy_lag': 2}
    settings |= {'network__core': 'lstm'}
    for devices in (1, 8):
        run(small(**settings, learner__num_devices=devices), tmp_path / str(devices), 'device')
    assert_close(result(tmp_path / '1'), result(tmp_path / '8'))


def test_the_memory_task_is_learned_with_old_parameters(tmp_path):
    """An agent without memory, and one whose states were lost between updates, would stay near the return of chance."""
    settings = config.replace(
        small(),
        {
            'environment.name': 'jax/catch_memory',
            'network.core': 'lstm',
            'network.lstm_size': 32,
            'network.mlp_sizes': (64,),
            'learner.batch_size': 32,
            'optimizer.name': 'adam',
            'optimizer.learning_rate': 3e-3,
            'optimizer.epsilon': 1e-8,
            'policy_lag': 2,
            'total_frames': 600_000,
            'evaluator.episodes': 200,
        },
    )
    assert run(settings, tmp_path, 'device').evaluation.mean > 0.9


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'environment__name': 'catch'},
            "'catch': the runtime 'device' .* use --environment.name jax/catch, or another",
        ),
        ({'environment__name': 'gymnasium/Acrobot-v1'}, 'this one has no twin in JAX'),
        ({'actor__inference': 'accelerator'}, "actor.inference 'accelerator' requires"),
        ({'learner__batch_size': 16, 'replay__fraction': 0.75, 'learner__num_devices': 8}, 'the 4 new trajectories'),
    ],
)
def test_what_the_program_cannot_do_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        run(small(**changes), tmp_path / 'run', 'device')
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_a_run_that_fails_saves_what_it_has_learned(tmp_path):
    """The same command then repeats no update."""
    diverging = {'optimizer__name': 'adam', 'optimizer__epsilon': 1e-8, 'optimizer__learning_rate': 1e30}
    with pytest.raises(NonFiniteGradients, match='10 updates in a row'):
        run(small(**diverging), tmp_path, 'device')
    saved = checkpoint.restore(tmp_path, {'learner': None})
    assert saved.step >= 10 and int(saved.state['learner']['skipped']) >= 10


def test_a_value_that_is_not_finite_ends_the_run(tmp_path):
    name = 'jax/tests.environments.test_functional:nan'
    with pytest.raises(
        EnvironmentFailure, match=f"'{name}' returned a value of the reward that is not finite, for upd"
    ):
        run(small(environment__name=name), tmp_path, 'device')


def test_a_state_that_exceeds_the_memory_is_refused(tmp_path):
    settings = {'learner__batch_size': 8, 'replay__fraction': 0.5, 'replay__capacity': 10**9}
    with pytest.raises(ConfigError, match=r'takes \d+.* GiB, and this machine has .* lower replay.capacity 1000000000'):
        run(small(**settings), tmp_path, 'device')


def test_environments_of_another_number_are_refused(tmp_path):
    run(small(10, actor__num_actors=2, actor__num_envs=2), tmp_path, 'lockstep')
    before = files(tmp_path)
    with pytest.raises(ConfigError, match='actor.num_actors 2 with actor.num_envs 2, and this run 1 with 4'):
        run(small(20), tmp_path, 'device')
    assert files(tmp_path) == before
