"""A configuration survives JSON, and one that cannot work says in one line what to do."""

import dataclasses
import json
import math
import pickle

import pytest
import tyro

from impala_jax import config as config_lib
from impala_jax.build import make_hyperparameters
from impala_jax.config import (
    ActorConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    PopArtConfig,
    ReplayConfig,
    VTraceConfig,
)

OTHER = Config(
    total_frames=1000,
    seed=7,
    environment=EnvironmentConfig(name='atari/pong', preset='machado', action_repeat=2),
    network=NetworkConfig(torso='mlp', core='lstm', mlp_sizes=(3, 4, 5)),
    vtrace=VTraceConfig(rho_bar=math.inf, c_bar=math.inf, lambda_=0.9),
    optimizer=OptimizerConfig(max_grad_norm=math.inf),
    learner=LearnerConfig(num_devices=4, queue_capacity=64),
    policy_lag=2,
)


@pytest.mark.parametrize(
    ('optimizer', 'epsilon'),
    [
        (OptimizerConfig(), 0.01),
        (OptimizerConfig('adam'), 1e-8),
        (OptimizerConfig('adam', epsilon=0.01), 0.01),
        (dataclasses.replace(OptimizerConfig(), name='adam'), 1e-8),
        (dataclasses.replace(OptimizerConfig('adam'), name='rmsprop'), 0.01),
        (dataclasses.replace(OptimizerConfig(epsilon=0.01), name='adam'), 0.01),
        (pickle.loads(pickle.dumps(OptimizerConfig('adam'))), 1e-8),
    ],
)
def test_each_optimizer_has_an_epsilon_of_its_own(optimizer, epsilon):
    config = Config(optimizer=optimizer)
    assert optimizer.epsilon == epsilon
    assert config_lib.get(config, 'optimizer.epsilon') == make_hyperparameters(config).epsilon == epsilon
    written = json.loads(json.dumps(config_lib.to_dict(config)))
    assert written['optimizer']['epsilon'] == epsilon and config_lib.from_dict(written) == config


def test_epsilon_on_the_command_line():
    config = tyro.cli(Config, default=Config(), args=['--optimizer.name', 'adam'])
    assert config.optimizer == OptimizerConfig('adam', epsilon=1e-8)
    config = tyro.cli(Config, default=Config(), args=['--optimizer.name', 'adam', '--optimizer.epsilon', '0.01'])
    assert config.optimizer == OptimizerConfig('adam', epsilon=0.01)


def test_a_run_with_another_epsilon_resumes_where_it_is_stated():
    """One from when Adam, too, had .01."""
    before = config_lib.from_dict({'optimizer': {'name': 'adam', 'epsilon': 0.01}})
    assert config_lib.differences(before, Config(optimizer=OptimizerConfig('adam'))) == [
        'optimizer.epsilon: 0.01 in the checkpoint, 1e-08 now'
    ]
    assert not config_lib.differences(before, Config(optimizer=OptimizerConfig('adam', epsilon=0.01)))


@pytest.mark.parametrize('config', [Config(), OTHER])
def test_round_trip_through_json(config):
    text = json.dumps(config_lib.to_dict(config), allow_nan=False)
    assert config_lib.from_dict(json.loads(text)) == config


def test_absent_fields_take_their_defaults():
    assert config_lib.from_dict({'learner': {'batch_size': 8}}) == Config(learner=LearnerConfig(batch_size=8))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'sed': 1}, "unknown configuration field 'sed'; did you mean 'seed'"),
        ({'learner': {'batchsize': 1}}, "unknown configuration field learner.'batchsize'; did you mean 'batch_size'"),
        ({'xyzzy': 1}, "unknown configuration field 'xyzzy'; did you mean"),
    ],
)
def test_unknown_fields_are_named_with_the_closest(values, message):
    with pytest.raises(ConfigError) as error:
        config_lib.from_dict(values)
    assert message in str(error.value)


INVALID = [
    (EnvironmentConfig, {'name': ''}, 'environment.name is empty; try'),
    (EnvironmentConfig, {'max_failures': 0}, 'environment.max_failures must be positive, got 0'),
    (EnvironmentConfig, {'action_repeat': 0}, 'environment.action_repeat must be positive, got 0'),
    (EnvironmentConfig, {'processes': -1}, 'environment.processes must be 0 or more, got -1'),
    (NetworkConfig, {'torso': 'shalow'}, "unknown network.torso 'shalow'; did you mean 'shallow'"),
    (NetworkConfig, {'lstm_size': 0}, 'network.lstm_size must be positive, got 0'),
    (VTraceConfig, {'rho_bar': 0}, 'vtrace.rho_bar must be positive (inf for no truncation), got 0'),
    (VTraceConfig, {'c_bar': -1.0}, 'vtrace.c_bar must be positive (inf for no truncation), got -1.0'),
    (VTraceConfig, {'pg_rho_bar': math.nan}, 'vtrace.pg_rho_bar must be positive (inf for no truncation), got nan'),
    (VTraceConfig, {'lambda_': 1.5}, 'vtrace.lambda must lie in [0, 1], got 1.5'),
    (VTraceConfig, {'c_bar': 2.0}, 'vtrace.c_bar 2.0 is above vtrace.rho_bar 1.0, outside the theory; lower c_bar, or'),
    (LossConfig, {'discount': 1.1}, 'loss.discount must lie in [0, 1], got 1.1'),
    (LossConfig, {'baseline_cost': -1}, 'loss.baseline_cost must not be negative, got -1'),
    (LossConfig, {'entropy_cost': -1}, 'loss.entropy_cost must not be negative, got -1'),
    (NetworkConfig, {'num_word_ids': 0}, 'network.num_word_ids must be positive, got 0'),
    (PopArtConfig, {'step_size': 1.0}, 'popart.step_size must lie in (0, 1), got 1.0'),
    (PopArtConfig, {'min_scale': 0.0}, 'popart.min_scale must be positive and at most popart.max_scale, got 0.0 and'),
    (PopArtConfig, {'max_scale': 1e-5}, 'popart.min_scale must be positive and at most popart.max_scale, got 0.0001'),
    (OptimizerConfig, {'learning_rate': 0}, 'optimizer.learning_rate must be positive, got 0'),
    (OptimizerConfig, {'epsilon': 0}, 'optimizer.epsilon must be positive, got 0'),
    (OptimizerConfig, {'max_grad_norm': 0}, 'optimizer.max_grad_norm must be positive, got 0'),
    (LearnerConfig, {'batch_size': 0}, 'learner.batch_size must be positive, got 0'),
    (LearnerConfig, {'unroll_length': 0}, 'learner.unroll_length must be positive, got 0'),
    (LearnerConfig, {'max_nonfinite_updates': 0}, 'learner.max_nonfinite_updates must be positive, got 0'),
    (LearnerConfig, {'num_devices': 0}, 'learner.num_devices must be positive, got 0'),
    (LearnerConfig, {'num_devices': 5}, 'learner.batch_size 32 does not divide over 5 devices; try 35'),
    (ReplayConfig, {'fraction': 1.0}, 'replay.fraction must lie in [0, 1), got 1.0'),
    (
        VTraceConfig,
        {'implementation': 'rlax', 'c_bar': 0.5},
        "vtrace.c_bar 0.5: vtrace.implementation 'rlax' supports 1 only; use another implementation",
    ),
    (
        VTraceConfig,
        {'implementation': 'rlax', 'lambda_': 0.9},
        "vtrace.lambda 0.9: vtrace.implementation 'rlax' supports 1 only; use another implementation",
    ),
    (
        VTraceConfig,
        {'implementation': 'rlax', 'correction': 'none'},
        "vtrace.correction 'none': vtrace.implementation 'rlax' supports 'vtrace' only; use another implementation",
    ),
    (ReplayConfig, {'capacity': 0}, 'replay.capacity must be positive, got 0'),
    (ActorConfig, {'num_actors': -1}, 'actor.num_actors must be 0 or more, got -1'),
    (ActorConfig, {'inference_wait_ms': -1.0}, 'actor.inference_wait_ms must be 0 or more, got -1.0'),
    (ActorConfig, {'num_envs': 0}, 'actor.num_envs must be positive, got 0'),
    (EvaluatorConfig, {'episodes': -1}, 'evaluator.episodes must be 0 or more, got -1'),
    (EvaluatorConfig, {'num_envs': 0}, 'evaluator.num_envs must be positive, got 0'),
    (EvaluatorConfig, {'interval_s': 0}, 'evaluator.interval_s must be positive, got 0'),
    (CheckpointConfig, {'interval_s': 0}, 'checkpoint.interval_s must be positive, got 0'),
    (CheckpointConfig, {'keep': 1}, 'checkpoint.keep must be 2 or more, got 1'),
    (LoggingConfig, {'interval_s': 0}, 'logging.interval_s must be positive, got 0'),
    (LoggingConfig, {'interval_updates': 0}, 'logging.interval_updates must be positive, got 0'),
    (
        Config,
        {'learner': LearnerConfig(queue_capacity=31)},
        'learner.queue_capacity 31 is below the 32 trajectories of a batch that come from the queue',
    ),
    (
        Config,
        {'learner': LearnerConfig(queue_capacity=7), 'replay': ReplayConfig(fraction=0.75)},
        'learner.queue_capacity 7 is below the 8 trajectories of a batch that come from the queue',
    ),
    (Config, {'total_frames': 0}, 'total_frames must be positive, got 0'),
    (
        Config,
        {'actor': ActorConfig(num_actors=0)},
        'actor.num_actors is 0, and no other actors can join: raise it, or let',
    ),
    (Config, {'serve_actors': 0}, 'serve_actors must be a port from 1 to 65535, got 0'),
    (Config, {'serve_actors': 65536}, 'serve_actors must be a port from 1 to 65535, got 65536'),
    (Config, {'timeout_s': 0}, 'timeout_s must be positive, got 0'),
    (Config, {'policy_lag': -1}, 'policy_lag must be 0 or more, got -1'),
    (Config, {'seed': 2**31}, 'seed must lie in [0, 2**31), got 2147483648'),
]


@pytest.mark.parametrize(
    ('cls', 'values', 'message'), INVALID, ids=[f'{cls.__name__}-{list(values)[0]}' for cls, values, _ in INVALID]
)
def test_what_cannot_work_is_named_with_value_and_remedy(cls, values, message):
    with pytest.raises(ConfigError) as error:
        cls(**values)
    assert str(error.value).startswith(message) and '\n' not in str(error.value)


def test_what_is_allowed_on_purpose():
    assert VTraceConfig(c_bar=2.0, outside_theory=True).c_bar == 2.0
    assert NetworkConfig(torso='my_package.networks:Torso').torso == 'my_package.networks:Torso'
    assert LossConfig(discount=0.0).discount == 0.0
    assert Config(actor=ActorConfig(num_actors=0), serve_actors=5000).actor.num_actors == 0


def test_derived_values_follow_from_the_fields():
    assert EnvironmentConfig(name='atari/pong').frames_per_step == 4
    assert EnvironmentConfig(name='catch').frames_per_step == 1
    assert EnvironmentConfig(name='atari/pong', action_repeat=2).frames_per_step == 2
    config = Config(total_frames=641, learner=LearnerConfig(batch_size=32, unroll_length=20))
    assert config.frames_per_update == 640
    assert config.total_updates == 2, 'rounded up to whole updates'


def test_differences_name_only_what_changes_learning():
    assert config_lib.differences(Config(), Config()) == []
    execution = dataclasses.replace(
        Config(),
        total_frames=1,
        actor=ActorConfig(num_actors=7),
        learner=LearnerConfig(num_devices=2, queue_capacity=50),
        evaluator=EvaluatorConfig(episodes=0),
        checkpoint=CheckpointConfig(keep=9),
        logging=LoggingConfig(interval_s=9.0),
        timeout_s=1.0,
        launch_type='local_mp',
        serve_actors=5000,
    )
    assert config_lib.differences(Config(), execution) == []
    learning = dataclasses.replace(Config(), seed=1, learner=LearnerConfig(batch_size=8), policy_lag=3)
    assert config_lib.differences(Config(), learning) == [
        'learner.batch_size: 32 in the checkpoint, 8 now',
        'policy_lag: 0 in the checkpoint, 3 now',
        'seed: 0 in the checkpoint, 1 now',
    ]


def test_a_configuration_of_an_older_version_is_read_as_it_was_meant():
    """There, 'shallow' was replaced by an MLP where an observation was not an image, and bytes were divided by 255."""

    def old(torso):
        values = config_lib.to_dict(Config(network=NetworkConfig(torso)))
        del values['network']['uint8_scale']
        return values

    assert config_lib.from_dict(config_lib.upgraded(old('shallow'))).network == NetworkConfig('auto', uint8_scale=255.0)
    assert config_lib.from_dict(config_lib.upgraded(old('deep'))).network == NetworkConfig('deep', uint8_scale=255.0)
    new = config_lib.to_dict(Config(network=NetworkConfig('shallow')))
    assert config_lib.upgraded(new) == new and config_lib.upgraded({'seed': 1}) == {'seed': 1}
    for torso, resumed_by in (('shallow', 'shallow'), ('shallow', 'auto'), ('deep', 'deep'), ('mlp', 'mlp')):
        config = Config(network=NetworkConfig(resumed_by))
        known = config_lib.from_dict(config_lib.upgraded(old(torso), config))
        assert config_lib.differences(known, config) == []
    for torso, network, message in (
        ('shallow', NetworkConfig('deep'), "network.torso: 'auto' in the checkpoint, 'deep' now"),
        ('shallow', NetworkConfig(uint8_scale=10.0), 'network.uint8_scale: 255.0 in the checkpoint, 10.0 now'),
    ):
        config = Config(network=network)
        known = config_lib.from_dict(config_lib.upgraded(old(torso), config))
        assert config_lib.differences(known, config) == [message]


def test_at_most_three_names_are_suggested():
    names = [f'environment_{i}' for i in range(20)]
    for name in ('environment', 'xyzzy'):
        text = config_lib.closest(name, names)
        assert text.startswith('did you mean') and text.count("'environment_") == 3


def test_a_configuration_is_never_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_frames_count_what_is_fresh_only():
    config = Config(
        total_frames=960, learner=LearnerConfig(batch_size=8, unroll_length=10), replay=ReplayConfig(fraction=0.25)
    )
    assert (config.num_fresh, config.num_replayed, config.frames_per_update, config.total_updates) == (6, 2, 60, 16)


@pytest.mark.parametrize(
    'fraction, message',
    [(1.0, r'must lie in \[0, 1\), got 1.0'), (0.3, '0.3 of learner.batch_size 6 is not a whole number')],
)
def test_a_fraction_that_cannot_be_is_refused(fraction, message):
    with pytest.raises(ConfigError, match=message):
        Config(learner=LearnerConfig(batch_size=6), replay=ReplayConfig(fraction=fraction))
