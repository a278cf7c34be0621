"""The update: mesh, what is skipped, what is compiled."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from impala_jax import build, networks
from impala_jax.agent import Agent
from impala_jax.build import make_agent, make_learner, make_loss
from impala_jax.config import (
    Config,
    ConfigError,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    VTraceConfig,
)
from impala_jax.learner import Learner
from impala_jax.loss import ImpalaLoss
from impala_jax.types import LAST
from tests.helpers.batches import NETWORK, SPEC, T, assert_equal, differ, host, make_batch, make_config, poison
from tests.helpers.counting import SMALL, A, cut, make_actor, make_counting, make_counting_learner


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
    def test_it_compiles_once(self):
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

    def test_it_needs_no_configuration(self):
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


class TestOwnParts:
    """Losses and optimisers that return something else are refused in one line."""

    def refused(self, problem, optimizer=None, loss=None):
        agent = make_agent(NETWORK, SPEC)
        learner = Learner(agent, optimizer or optax.sgd(0.1), loss or ImpalaLoss(), devices=jax.devices()[:1])
        with pytest.raises(ConfigError) as error:
            learner.update(learner.init(jax.random.PRNGKey(0)), make_batch(0))
        assert re.fullmatch(f'the {problem}.*', str(error.value))  # In one line; JAX adds notes from Python 3.11 on.

    @pytest.mark.parametrize(
        'change, problem',
        [
            (lambda loss, details: loss, 'loss returned a value of type Array; return a scalar and LossDetails'),
            (
                lambda loss, details: (loss, details.logs),
                'loss returned a value of type tuple of Array, dict; return',
            ),
            (lambda loss, details: (loss[None], details), r'loss returned a loss of shape \[1\]; return a scalar'),
            (
                lambda loss, details: (loss, details._replace(logs={'mine': loss[None]})),
                r"loss returned the log 'mine' of shape \[1\]",
            ),
        ],
    )
    def test_losses(self, change, problem):
        self.refused(problem, loss=lambda *args, **kwargs: change(*ImpalaLoss()(*args, **kwargs)))

    @pytest.mark.parametrize('made', [None, lambda gradient: gradient])
    def test_optimisers(self, made):
        self.refused('optimiser returned a value of type .*; return an Optax transformation', lambda _: made)

    def test_an_optimiser_with_the_methods_of_a_transformation_is_one(self):
        learner = Learner(make_agent(NETWORK, SPEC), optax.MultiSteps(optax.sgd(0.1), 2), ImpalaLoss())
        state, logs = learner.update(learner.init(jax.random.PRNGKey(0)), make_batch(0))
        assert np.isfinite(logs['loss']) and int(state.num_updates) == 1


def test_options_that_another_one_replaces_are_listed():
    assert build.unused_options(Config()) == []
    config = Config(
        network=NetworkConfig(module='mine:Network', core='lstm'),
        loss=LossConfig(function='mine:loss', discount=0.5, entropy_cost=0.1),
        vtrace=VTraceConfig(rho_bar=5.0),
        optimizer=OptimizerConfig('adam', decay=0.5, b1=0.8),
    )
    assert build.unused_options(config) == [
        "not used with network.module 'mine:Network': network.core lstm",
        "not used with loss.function 'mine:loss': vtrace.rho_bar 5.0, loss.discount 0.5",
        "not used with optimizer.name 'adam': optimizer.decay 0.5",
    ]


class TestDevices:
    def test_a_batch_that_does_not_divide_is_refused(self):
        config = make_config(batch_size=6)
        with pytest.raises(ConfigError, match='batch_size 6 does not divide over 8 devices'):
            make_learner(config, make_agent(NETWORK, SPEC))
        with pytest.raises(ConfigError, match='batch_size 6 does not divide over 4 devices; try 8'):
            make_config(batch_size=6, num_devices=4)

    def test_more_devices_than_there_are_are_refused(self):
        with pytest.raises(ConfigError, match='num_devices is 16, but this machine has 8 cpu'):
            make_learner(make_config(batch_size=16, num_devices=16), make_agent(NETWORK, SPEC))


@pytest.mark.parametrize('compute_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('core', ['feedforward', 'lstm'])
def test_on_policy_ratios_are_one(core, compute_dtype):
    """The learner's unroll, on eight devices, gives the logits that each action was sampled from; over several
    unrolls, and so with states that the actor carried on."""
    environment, _ = make_counting(num_envs=8)
    network = NetworkConfig('mlp', core=core, mlp_sizes=(16,), lstm_size=8, compute_dtype=compute_dtype)
    actor, params = make_actor(environment, unroll_length=7, network=network)
    # Neither uniform nor certain, so that another temperature would show.
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda x: 0.2 * rng.randn(*x.shape).astype(np.float32), params)
    agent = make_agent(network, environment.spec)
    config = Config(network=network, learner=LearnerConfig(batch_size=8, unroll_length=7))
    learner = build.make_learner(config, agent)
    unroll = jax.jit(agent.unroll)
    for _ in range(4):
        trajectory = actor.unroll(0, params)
        batch = learner.put(trajectory.experience)
        output, _ = unroll(params, batch.timesteps, batch.initial_state)
        chosen = trajectory.actions[..., None]
        log_pi, log_mu = (
            np.take_along_axis(np.array(jax.nn.log_softmax(x)), chosen, axis=-1)
            for x in (np.array(output.logits)[:-1], trajectory.behaviour_logits)
        )
        np.testing.assert_allclose(np.exp(log_pi - log_mu), 1, atol=1e-5)
        assert log_mu.std() > 0.05
    assert actor.unroll(5, params).version.tolist() == [5] * 8


def test_entropy_has_the_right_sign():
    """Where only the entropy pulls (no reward, V = 0), a peaked policy becomes more uniform."""
    learner, actor, params = make_counting_learner(loss=LossConfig(baseline_cost=0.0), learning_rate=0.1)
    params['params']['baseline'] = jax.tree.map(jnp.zeros_like, params['params']['baseline'])
    params['params']['policy']['bias'] = jnp.array([2.0, 0.0, 0.0])
    trajectory = actor.unroll(0, params)
    trajectory = trajectory._replace(timesteps=jax.tree.map(np.array, trajectory.timesteps))
    trajectory.timesteps.reward[:] = 0
    trajectory.timesteps.observation[:] = 0
    batch = learner.put(trajectory.experience)
    state = learner.init(jax.random.PRNGKey(0))
    state = learner.restore(state._replace(params=params))
    entropies = []
    for _ in range(30):
        state, logs = learner.update(state, batch)
        entropies.append(float(logs['entropy']))
        assert float(logs['policy_loss']) == 0
    assert (np.diff(entropies) > 0).all()
    assert entropies[0] < 0.8 < entropies[-1] <= math.log(A) + 1e-5


def test_update_does_not_depend_on_the_device_count():
    """The loss is one sum over the whole batch: twice the batch is twice the loss, and any mesh does the same."""
    updated = {}
    for num_devices in (1, 8):
        learner, actor, params = make_counting_learner(devices=jax.devices()[:num_devices])
        trajectory = actor.unroll(0, params)
        state = learner.restore(learner.init(jax.random.PRNGKey(1))._replace(params=params))
        state, logs = learner.update(state, trajectory)
        updated[num_devices] = jax.tree.map(np.array, (state.params, logs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), updated[1], updated[8])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), updated[1][0], jax.tree.map(np.array, params))
    assert max(jax.tree.leaves(moved)) > 1e-3

    @jax.jit
    def total(trajectory):
        output, _ = make_agent(SMALL, actor.environment.spec).unroll(params, trajectory.timesteps, ())
        return make_loss(LossConfig(), VTraceConfig())(output, trajectory.experience)

    once, (logs, _, _) = total(trajectory)
    doubled = jax.tree.map(lambda x: np.concatenate([x, x], axis=1 if x.ndim > 1 else 0), trajectory)
    twice, (doubled_logs, _, _) = total(doubled)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    np.testing.assert_allclose(updated[8][1]['loss'], once, rtol=1e-5)
    for name in ('policy_loss', 'baseline_loss'):
        np.testing.assert_allclose(doubled_logs[name], 2 * logs[name], rtol=1e-4)
    np.testing.assert_allclose(doubled_logs['entropy'], logs['entropy'], rtol=1e-5)  # a mean, for people
    # Over time, too: the parts of an unroll that is cut at an episode's end add up.
    at = int(np.flatnonzero(trajectory.timesteps.step_type[:, 0] == LAST)[0])
    one = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x[:1], trajectory)
    parts = [total(cut(one, start, stop))[0] for start, stop in ((0, at), (at, 5))]
    np.testing.assert_allclose(sum(parts), total(one)[0], rtol=1e-4)
