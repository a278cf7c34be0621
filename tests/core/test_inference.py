"""Inference on the accelerator: what is batched, how long it waits, and that each actor gets its own answer."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import networks
from impala_jax.agent import Agent, dummy_timestep
from impala_jax.build import make_agent
from impala_jax.config import ActorConfig, Config, ConfigError, NetworkConfig, VTraceConfig
from impala_jax.inference import InferenceServer
from impala_jax.types import ArraySpec, Closed, EnvironmentSpec
from tests.helpers.configs import one_device
from tests.helpers.runs import SMALL, rows_of, train

SPEC = EnvironmentSpec(ArraySpec((3,), np.dtype(np.float32)), 4)
AGENT = make_agent(NetworkConfig(torso='mlp', core='lstm', lstm_size=5, mlp_sizes=(8,)), SPEC)
STEP = jax.jit(AGENT.step)
NUM_ACTORS, NUM_ENVS, NUM_DEVICES = 3, 2, 2


def params_of(seed):
    return jax.tree.map(np.asarray, AGENT.init(jax.random.PRNGKey(seed)))


@pytest.fixture
def serve():
    """Starts servers, with parameters."""
    cleanup = []

    def start(wait_ms, num_actors=NUM_ACTORS, agent=AGENT):
        actor = ActorConfig(num_envs=NUM_ENVS, inference_wait_ms=wait_ms)
        server = InferenceServer(agent, num_actors, actor, jax.devices()[:NUM_DEVICES], seed=0, timeout_s=60.0)
        server.publish(0, params_of(0))
        server.errors = []

        def run():
            try:
                server.run()
            except Exception as error:
                server.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        cleanup.append((server, thread))
        return server

    yield start
    for server, thread in cleanup:
        server.close()
        thread.join(10)
        assert not thread.is_alive()


def inputs(i):
    """The timestep and state of actor i."""
    rng = np.random.default_rng(i)
    timestep = dummy_timestep(SPEC, NUM_ENVS)
    timestep = timestep._replace(
        observation=rng.normal(size=[NUM_ENVS, 3]).astype(np.float32), step_type=np.array([0, 1], np.int32)
    )
    return timestep, tuple(rng.normal(size=[NUM_ENVS, 5]).astype(np.float32) for _ in range(2))


def ask(server, actors):
    """The answers to actors that ask at the same time."""
    answers = {}

    def run(i):
        try:
            answers[i] = server.step(*inputs(i))
        except Exception as error:
            answers[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in actors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def assert_right(answers, params):
    """Each answer is what the agent says to that actor's question alone."""
    for i, answer in answers.items():
        expected = STEP(params, jax.random.PRNGKey(0), *inputs(i))
        assert answer.action.shape == (NUM_ENVS,) and answer.action.dtype == np.int32
        np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), answer.state, expected.state)


def test_all_actors_are_answered_by_one_call(serve):
    server = serve(wait_ms=60_000.0)
    assert server.policy().version == 0
    answers = ask(server, range(NUM_ACTORS))
    assert_right(answers, params_of(0))
    metrics = server.metrics()
    assert metrics['inference_batch_size_mean'] == 6.0
    assert metrics['inference_batch_size_histogram'] == ([2, 4, 6, 8], [0, 0, 1])
    assert server.metrics() == {}
    # The next call is made with the newest parameters.
    server.publish(7, params_of(1))
    assert server.policy().version == 7
    assert_right(ask(server, range(NUM_ACTORS)), params_of(1))


def test_a_request_waits_so_long_for_others_and_no_longer(serve):
    server = serve(wait_ms=300.0)
    ask(server, range(NUM_ACTORS))  # Compiled from here on.
    start = time.monotonic()
    assert_right(ask(server, [0, 2]), params_of(0))
    assert 0.3 <= time.monotonic() - start < 10.0
    assert server.metrics()['inference_batch_size_histogram'].counts == [0, 1, 1]


def test_only_a_few_sizes_are_compiled(serve):
    """For five actors of two environments: room for one actor, then twice as much, as often as needed."""
    traced = []

    class Traced(Agent):
        def step(self, params, key, timestep, state, **kwargs):
            traced.append(timestep.reward.shape[0])
            return super().step(params, key, timestep, state, **kwargs)

    config = NetworkConfig(torso='mlp', core='lstm', lstm_size=5, mlp_sizes=(8,))
    server = serve(wait_ms=1.0, num_actors=5, agent=Traced(networks.build(config, SPEC), SPEC))
    for number in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1):
        assert_right(ask(server, range(number)), params_of(0))
    assert traced == [2, 4, 8, 16]


def test_actions_are_drawn_anew_at_each_call(serve):
    server = serve(wait_ms=0.0)
    actions = [server.step(*inputs(0)).action.tolist() for _ in range(20)]
    assert len({tuple(action) for action in actions}) > 3


def test_close_ends_waits_and_a_failure_reaches_the_actor(serve):
    server = serve(wait_ms=60_000.0)
    thread = threading.Timer(0.3, server.close)
    thread.start()
    assert isinstance(ask(server, [0])[0], Closed)
    with pytest.raises(Closed):
        server.step(*inputs(0))
    with pytest.raises(Closed):
        server.policy()
    server = serve(wait_ms=0.0)
    timestep, state = inputs(0)
    with pytest.raises(ValueError, match='could not broadcast'):
        server.step(timestep._replace(observation=np.zeros([NUM_ENVS, 7], np.float32)), state)
    with pytest.raises(Closed):
        server.step(timestep, state)
    assert [type(error) for error in server.errors] == [ValueError]


@pytest.mark.parametrize('arguments', ['--runtime lockstep', '--runtime launchpad --launch-type local_mp'])
def test_where_actors_are_no_threads_it_is_refused(arguments, tmp_path):
    runtime, launch_type = arguments.split()[1], arguments.split()[-1]
    config = Config(actor=ActorConfig(inference='accelerator'))
    if runtime == 'launchpad':
        config = dataclasses.replace(config, launch_type=launch_type)
    with pytest.raises(ConfigError, match="actor.inference 'accelerator' requires actors that are threads"):
        impala_jax.run(config, tmp_path, runtime=runtime)


def test_a_lag_that_a_runtime_cannot_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="policy_lag 3: the runtime 'threads' cannot set the lag; use --runtime lock"):
        impala_jax.run(Config(policy_lag=3), tmp_path / 'run', runtime='threads')


def test_rlax_in_a_process_of_launchpad_is_refused(tmp_path):
    config = Config(vtrace=VTraceConfig(implementation='rlax'), launch_type='local_mp')
    with pytest.raises(ConfigError, match="vtrace.implementation 'rlax': rlax does not load in the processes"):
        impala_jax.run(config, tmp_path / 'run', runtime='launchpad')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'runtime', ['threads', pytest.param('launchpad', marks=[pytest.mark.launchpad, pytest.mark.slow])]
)
def test_a_run_counts_its_batches(runtime, tmp_path):
    often = ['--logging.interval-s', '0.05']
    stdout = train(tmp_path, '--runtime', runtime, *SMALL, *often, '--actor.inference', 'accelerator')
    assert 'Trained' in stdout
    rows = [row for row in rows_of(tmp_path) if 'inference_batch_size_histogram' in row]
    histogram = np.sum([row['inference_batch_size_histogram']['counts'] for row in rows], axis=0)
    # 40 updates of 4 trajectories of 10 steps, by 2 actors of 2 environments.
    assert histogram[0] + 2 * histogram[1] >= 40 * 4 * 10 / 2
    assert json.dumps(rows[0]['inference_batch_size_histogram']['edges']) == '[2, 4, 6]'


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['threads', pytest.param('launchpad', marks=pytest.mark.launchpad)])
def test_catch_is_solved_with_inference_on_the_accelerator(runtime, tmp_path):
    config = one_device('catch.py')
    config = dataclasses.replace(config, actor=dataclasses.replace(config.actor, inference='accelerator'))
    assert impala_jax.run(config, tmp_path, runtime=runtime).evaluation.mean >= 0.95
