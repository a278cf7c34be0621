"""The update: optimiser, mesh, what is skipped, what is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from impala_jax import networks
from impala_jax.agent import Agent
from impala_jax.build import make_agent, make_learner, make_training
from impala_jax.config import (
    Config,
    ConfigError,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
)
from impala_jax.learner import Learner
from impala_jax.loss import ImpalaLoss
from impala_jax.optimizer import Hyperparameters, make_optimizer, make_schedule
from impala_jax.rundir.checkpoint import steps
from impala_jax.training.hooks import NonFiniteGradients
from impala_jax.training.hosts import ManyHosts, OneHost, fresh_first
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, StepInfo, TimeStep, Trajectory

A, T, B = 3, 4, 8
SPEC = EnvironmentSpec(ArraySpec((5,), np.dtype(np.float32)), A)
NETWORK = NetworkConfig('mlp', core='lstm', lstm_size=6, mlp_sizes=(7,))


def make_config(total_updates=20, optimizer=OptimizerConfig(), network=NETWORK, **learner):  # noqa: B008 - frozen
    learner = LearnerConfig(**({'batch_size': B, 'unroll_length': T} | learner))
    return Config(total_frames=total_updates * B * T, network=network, learner=learner, optimizer=optimizer)


def make_batch(seed=0, version=0):
    rng = np.random.RandomState(seed)
    step_type = rng.choice([FIRST, MID, MID, LAST], size=(T + 1, B)).astype(np.int32)
    timesteps = TimeStep(
        step_type=step_type,
        reward=rng.randn(T + 1, B).astype(np.float32),
        discount=(step_type != LAST).astype(np.float32),
        observation=rng.randn(T + 1, B, 5).astype(np.float32),
        previous_action=rng.randint(A, size=(T + 1, B)).astype(np.int32),
    )
    return Trajectory(
        timesteps=timesteps,
        behaviour_logits=rng.randn(T, B, A).astype(np.float32),
        initial_state=tuple(rng.randn(B, 6).astype(np.float32) for _ in range(2)),
        info=StepInfo(np.zeros([T, B], np.float32), np.zeros([T, B], bool), np.zeros([T, B], np.int32)),
        version=np.full([B], version, np.int32),
        task=np.zeros([B], np.int32),
        game_version=np.full([T, B], version, np.int32),
    )


def poison(batch):
    reward = batch.timesteps.reward.copy()
    reward[2, 1] = np.nan
    step_type = batch.timesteps.step_type.copy()
    step_type[2, 1] = MID
    return batch._replace(timesteps=batch.timesteps._replace(reward=reward, step_type=step_type))


def host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), a, b)))


def optimizer_of(config, learning_rate):
    return make_optimizer(config, Hyperparameters(learning_rate, 0.0, config.epsilon))


class TestOptimizer:
    @pytest.mark.parametrize('momentum', [0.0, 0.9])
    def test_rmsprop_is_tensorflows(self, momentum):
        """ms = decay ms + (1 - decay) g^2, from 1; mom = momentum mom + lr g / sqrt(ms + eps); w = w - mom."""
        config = OptimizerConfig(epsilon=0.01, momentum=momentum, max_grad_norm=np.inf)
        optimizer = optimizer_of(config, 0.1)
        rng = np.random.RandomState(0)
        w = rng.randn(6)
        params = jnp.asarray(w, jnp.float32)
        state = optimizer.init(params)
        ms, mom = np.ones(6), np.zeros(6)
        update = jax.jit(optimizer.update)
        for _ in range(30):
            gradient = rng.randn(6) * 10.0 ** np.arange(-4, 2)
            ms = 0.99 * ms + 0.01 * gradient**2
            mom = momentum * mom + 0.1 * gradient / np.sqrt(ms + 0.01)
            w = w - mom
            updates, state = update(jnp.asarray(gradient, jnp.float32), state)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, w, rtol=1e-4, atol=1e-5)

    def test_the_first_step_is_small(self):
        """Because the accumulator starts at 1; from 0, as PyTorch has it, the step would be about 10 lr."""
        optimizer = optimizer_of(OptimizerConfig(), 1.0)
        gradient = jnp.ones(1)
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(updates, -1 / np.sqrt(1 + 0.01), rtol=1e-5)

    def test_adam(self):
        optimizer = optimizer_of(OptimizerConfig('adam', epsilon=1e-8), 0.5)
        gradient = jnp.array([3.0, -1e-3])
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(updates, [-0.5, 0.5], rtol=1e-3)

    def test_linear_schedule(self):
        schedule = make_schedule('linear', 0.5, 10)
        np.testing.assert_allclose(
            [schedule(i) for i in range(12)], [0.5 - 0.05 * min(i, 10) for i in range(12)], rtol=1e-5
        )
        constant = make_schedule('constant', 0.5, 10)
        assert {float(constant(i)) for i in (0, 5, 10, 100)} == {0.5}

    @pytest.mark.parametrize('max_grad_norm', [1.0, 5.0, 7.0, np.inf])
    def test_the_global_norm_is_clipped(self, max_grad_norm):
        config = OptimizerConfig(decay=0.0, epsilon=1e8, max_grad_norm=max_grad_norm)
        optimizer = optimizer_of(config, 1.0)
        gradient = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}  # of norm 5
        updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        factor = min(1.0, max_grad_norm / 5)
        # With an epsilon this large, RMSProp only divides by 1e4.
        np.testing.assert_allclose(updates['a'], [-3e-4 * factor], rtol=1e-4)
        np.testing.assert_allclose(updates['b'], [-4e-4 * factor], rtol=1e-4)


class CountingAgent(Agent):
    """Counts how often its unroll is traced."""

    traces = 0

    def unroll(self, params, timesteps, state):
        self.traces += 1
        return super().unroll(params, timesteps, state)


@pytest.fixture(scope='module')
def learner():
    return make_learner(make_config(num_devices=2), make_agent(NETWORK, SPEC))


class TestUpdate:
    def test_compiles_once(self):
        agent = CountingAgent(networks.build(NETWORK, SPEC), SPEC)
        learner = make_learner(make_config(num_devices=2), agent)
        state = learner.init(jax.random.PRNGKey(0))
        agent.traces = 0
        for i in range(4):
            batch = make_batch(i)
            state, _ = learner.update(state, poison(batch) if i == 2 else batch)
        # Also from a state that was saved: with the dtypes of the first one.
        state, _ = learner.update(learner.restore(host(state)), make_batch(4))
        assert agent.traces == 1

    def test_the_state_is_donated(self, learner):
        state = learner.init(jax.random.PRNGKey(0))
        saved = host(state)
        copy = learner.restore(saved)
        new, _ = learner.update(state, make_batch())
        assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
        assert not any(x.is_deleted() for x in jax.tree.leaves((new, copy)))
        assert_equal(host(copy), saved)
        assert differ(host(new.params), saved.params)

    def test_a_gradient_that_is_not_finite_is_skipped(self, learner):
        state = learner.init(jax.random.PRNGKey(0))
        state, logs = learner.update(state, make_batch(0))
        assert all(np.isfinite(value).all() for value in logs.values())
        before = host(state)
        for i in (1, 2):
            state, logs = learner.update(state, poison(make_batch(i)))
            assert_equal(host((state.params, state.opt_state)), (before.params, before.opt_state))
            assert (int(state.num_updates), int(state.skipped), int(state.skipped_in_a_row)) == (1 + i, i, i)
            assert (int(logs['skipped_updates']), int(logs['skipped_in_a_row'])) == (i, i)
            assert not np.isfinite(logs['loss'])
        state, logs = learner.update(state, make_batch(3))
        assert (int(state.num_updates), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
        assert differ(host(state.params), before.params)

        # What was skipped has left no trace: the same as if it had never been.
        other, _ = learner.update(learner.restore(before), make_batch(3))
        assert_equal(host((other.params, other.opt_state)), host((state.params, state.opt_state)))

    def test_the_learning_rate_reaches_zero(self, learner):
        state = learner.init(jax.random.PRNGKey(0))
        rates = []
        for _ in range(20):
            state, logs = learner.update(state, make_batch())
            rates.append(float(logs['learning_rate']))
        np.testing.assert_allclose(np.diff(rates), -6e-4 / 20, rtol=1e-3)
        # The first update has the full rate; the one after the last would have none.
        np.testing.assert_allclose([rates[0], rates[-1]], [6e-4, 6e-4 / 20], rtol=1e-3)
        before = host(state.params)
        state, _ = learner.update(state, make_batch())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), host(state.params), before)

    @pytest.mark.parametrize('schedule', ['constant', 'linear'])
    def test_the_entropy_cost_can_fall_too(self, schedule):
        config = make_config(optimizer=OptimizerConfig(learning_rate=1e-12))  # The entropy stays the same.
        config = dataclasses.replace(config, loss=LossConfig(entropy_cost=0.02, entropy_schedule=schedule))
        learner = make_learner(config, make_agent(NETWORK, SPEC))
        state = learner.init(jax.random.PRNGKey(0))
        costs, losses = [], []
        for _ in range(20):
            state, logs = learner.update(state, make_batch())
            costs.append(float(logs['entropy_cost']))
            losses.append(float(logs['loss'] - logs['policy_loss'] - logs['baseline_loss']) / float(logs['entropy']))
        left = 1 - np.arange(20) / 20 if schedule == 'linear' else np.ones(20)
        np.testing.assert_allclose(costs, 0.02 * left, rtol=1e-4)
        np.testing.assert_allclose(losses, losses[0] * left, rtol=1e-3)

    def test_one_device_equals_eight(self):
        """After 20 updates of a large learning rate, within what the order of a sum changes."""
        config = make_config(optimizer=OptimizerConfig(learning_rate=0.01))
        results = []
        for num_devices in (1, 8):
            learner = make_learner(config, make_agent(NETWORK, SPEC), jax.devices()[:num_devices])
            state = learner.init(jax.random.PRNGKey(0))
            start = host(state.params)
            for i in range(20):
                state, logs = learner.update(state, make_batch(i))
            assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
            results.append(host((state.params, logs)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
        assert max(np.abs(a - b).max() for a, b in _pairs(start, results[0][0])) > 0.05

    def test_each_device_has_its_part_of_the_batch(self):
        learner = make_learner(make_config(), make_agent(NETWORK, SPEC))
        batch = make_batch()
        on_mesh = learner.put(batch.experience)
        assert {shard.data.shape for shard in on_mesh.timesteps.observation.addressable_shards} == {(T + 1, 1, 5)}
        assert {shard.data.shape for shard in on_mesh.initial_state[0].addressable_shards} == {(1, 6)}
        assert_equal(host(on_mesh.timesteps), batch.timesteps)

    def test_no_observation_leaves_its_device(self, monkeypatch):
        """Devices exchange gradients, sums, and what is only counted, which has no more axes than [T, B]."""
        learner = make_learner(make_config(), make_agent(NETWORK, SPEC))
        programs, compiled = [], learner._compiled

        def update(*args):
            programs.append(compiled.lower(*args).compile().as_text())
            return compiled(*args)

        monkeypatch.setattr(learner, '_compiled', update)
        learner.update(learner.init(jax.random.PRNGKey(0)), make_batch())
        ranks = [
            shape.count(',') + 1 for shape in re.findall(r'= \w+\[([\d,]+)\]\S* all-(?:gather|to-all)', programs[0])
        ]
        assert ranks and max(ranks) <= 2, ranks

    def test_a_host_that_stops_stops_the_update(self, learner):
        """Counts and optimiser included: as if the batch had never been."""
        hosts = ManyHosts(learner, B, make_batch(7))
        update = hosts.update(learner.init(jax.random.PRNGKey(0)), hosts.put(make_batch(0)), None)
        assert update.counts is not None
        before = host(update.state)
        state = hosts.stop(update.state, None)
        assert_equal(host(state), before)
        hosts = ManyHosts(learner, B, poison(make_batch(1)))
        assert_equal(host(hosts.stop(state, None)), before)

    def test_what_is_only_counted_comes_back(self, learner):
        batch = make_batch(0, version=3)._replace(task=np.arange(B, dtype=np.int32))
        for hosts in (OneHost(learner), ManyHosts(learner, B, batch)):
            update = hosts.update(learner.init(jax.random.PRNGKey(0)), hosts.put(batch), None, waited_s=0.5)
            assert_equal(update.counts, batch.counts)
            assert update.waited_s == 0.5

    def test_one_host_updates_as_several_do(self, learner):
        states = []
        for hosts in (OneHost(learner), ManyHosts(learner, B, make_batch(7))):
            state = learner.init(jax.random.PRNGKey(0))
            for i in range(3):
                state = hosts.update(state, hosts.put(make_batch(i)), None).state
            states.append(host(state))
        assert_equal(*states)

    def test_without_a_configuration(self):
        """Any optax transformation; the loss's own entropy cost."""
        agent = make_agent(NETWORK, SPEC)
        learner = Learner(agent, optax.sgd(0.5), ImpalaLoss(entropy_cost=0.25), devices=jax.devices()[:1])
        state = learner.init(jax.random.PRNGKey(0))
        params, batch = host(state.params), make_batch()

        def loss(params):
            output, _ = agent.unroll(params, batch.timesteps, batch.initial_state)
            return ImpalaLoss(entropy_cost=0.25)(output, batch.experience)[0]

        state, logs = learner.update(state, batch)
        expected = jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(loss)(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
        np.testing.assert_allclose(logs['loss'], loss(params), rtol=1e-5)
        assert 'learning_rate' not in logs


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_what_is_new_comes_first_whichever_host_it_is_from():
    assert fresh_first(8, 4, 1).tolist() == list(range(8))
    assert fresh_first(8, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert fresh_first(8, 8, 4).tolist() == list(range(8))


class TestDevices:
    def test_a_batch_that_does_not_divide(self):
        config = make_config(batch_size=6)
        with pytest.raises(ConfigError, match='batch_size 6 does not divide over 8 devices'):
            make_learner(config, make_agent(NETWORK, SPEC))
        with pytest.raises(ConfigError, match='batch_size 6 does not divide over 4 devices; try 8'):
            make_config(batch_size=6, num_devices=4)

    def test_more_devices_than_there_are(self):
        with pytest.raises(ConfigError, match='num_devices is 16, but this machine has 8 cpu'):
            make_learner(make_config(batch_size=16, num_devices=16), make_agent(NETWORK, SPEC))


def test_the_loop_ends_after_too_many_skipped_updates(tmp_path):
    """In a row: a good update in between starts the count anew. Found one update late, so that nothing waits for it."""
    config = make_config(num_devices=1, max_nonfinite_updates=3)
    loop = make_training(config, make_agent(NETWORK, SPEC), tmp_path, lambda *_: None).loop
    try:
        before = loop.params
        for bad in (True, True, False, True, True, True):
            batch = make_batch(version=loop.num_updates)
            loop.step(loop.put(poison(batch) if bad else batch))
        assert loop.num_updates == 6
        assert differ(loop.params, before)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loop.params))
        with pytest.raises(NonFiniteGradients, match='3 updates in a row.*learning_rate'):
            loop.step(loop.put(poison(make_batch(version=loop.num_updates))))
    finally:
        loop.close()


def test_after_an_update_that_failed_the_last_checkpoint_stands(tmp_path, monkeypatch):
    """The update has taken the state with it: what is left of it must not be written over what is good."""
    update = Learner.update
    agent = make_agent(NETWORK, SPEC)
    loop, _, checkpoints = make_training(make_config(num_devices=1), agent, tmp_path, lambda *_: None)
    try:
        loop.step(loop.put(make_batch()))
        checkpoints.save(loop)
        loop.step(loop.put(make_batch()))

        def lose_device(*args, **kwargs):
            update(*args, **kwargs)
            raise RuntimeError('the device is on fire')

        monkeypatch.setattr(Learner, 'update', lose_device)
        with pytest.raises(RuntimeError, match='on fire'):
            loop.step(loop.put(make_batch()))
        loop.finish()
        assert steps(tmp_path / 'checkpoints') == [1]
    finally:
        loop.close()
