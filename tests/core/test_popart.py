"""PopArt: the statistics' numbers, outputs preserved, and the learner with one value a task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from impala_jax import build, popart
from impala_jax.build import make_agent, make_loss, make_training
from impala_jax.config import LossConfig, PopArtConfig, VTraceConfig
from impala_jax.networks import NetworkOutput
from tests.helpers.batches import NETWORK, SPEC, A, B, T, differ, host, make_batch, make_config, poison

K = 3
TASKS = SPEC._replace(tasks=('a', 'b', 'c'))
CONFIG = PopArtConfig(enabled=True, step_size=0.01)


def random_state(seed=0):
    rng = np.random.RandomState(seed)
    mean, scale = rng.randn(K).astype(np.float32), rng.uniform(0.5, 3, K).astype(np.float32)
    return popart.PopArtState(mean, scale**2 + mean**2, scale)


def one_target(state, target, task, config):
    return popart.update(state, np.full([1, 1], target), np.ones([1, 1], bool), np.array([task]), config)


def test_one_target_moves_the_statistics_as_rlax_does():
    state = random_state()
    rlax_state = rlax.PopArtState(shift=state.mean, scale=state.scale, second_moment=state.second_moment)
    expected = rlax.art(rlax_state, np.array([7.0]), np.array([1]), 0.01, CONFIG.min_scale, CONFIG.max_scale)
    new = one_target(state, 7.0, 1, CONFIG)
    np.testing.assert_allclose(new.mean, expected.shift, rtol=1e-5)
    np.testing.assert_allclose(new.second_moment, expected.second_moment, rtol=1e-5)
    np.testing.assert_allclose(new.scale, expected.scale, rtol=1e-5)
    assert new.mean[0] == state.mean[0] and new.mean[1] != state.mean[1]


def test_many_targets_move_them_as_far_as_one_after_the_other():
    """When they are equal, exactly; targets that are masked do not count, and a task without any stays."""
    state, mask = random_state(), np.ones([50, 4], bool)
    mask[10:] = False
    task = np.array([0, 0, 0, 2], np.int32)
    targets = np.where(mask, np.where(task == 0, 5.0, -2.0)[None], 1e3).astype(np.float32)
    new = popart.update(state, targets, mask, task, CONFIG)
    mean, second_moment = (np.array(x, np.float64) for x in state[:2])
    for _ in range(30):
        mean[0] += 0.01 * (5 - mean[0])
        second_moment[0] += 0.01 * (25 - second_moment[0])
    for _ in range(10):
        mean[2] += 0.01 * (-2 - mean[2])
        second_moment[2] += 0.01 * (4 - second_moment[2])
    np.testing.assert_allclose(new.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(new.second_moment, second_moment, rtol=1e-4)
    np.testing.assert_allclose(new.scale, np.sqrt(second_moment - mean**2), rtol=1e-3)


def test_the_statistics_become_those_of_the_targets():
    """However many there are in a batch: the step never overshoots."""
    config, rng, state = PopArtConfig(step_size=0.01), np.random.RandomState(0), popart.init(K)
    task = np.arange(30, dtype=np.int32) % K
    update = jax.jit(popart.update, static_argnums=4)
    for _ in range(60):
        targets = (np.array([0, 10, -300])[task] + np.array([1, 5, 100])[task] * rng.randn(100, 30)).astype(np.float32)
        state = update(state, targets, np.ones([100, 30], bool), task, config)
    np.testing.assert_allclose(state.mean, [0, 10, -300], atol=10, rtol=0.05)
    np.testing.assert_allclose(state.scale, [1, 5, 100], rtol=0.1)


def test_the_scale_has_bounds():
    state = random_state()._replace(mean=np.full(K, 2, np.float32), second_moment=np.full(K, 4, np.float32))
    small = one_target(state, 2.0, 0, PopArtConfig(min_scale=0.5))
    large = one_target(state, 1e5, 0, PopArtConfig(max_scale=9.0))
    assert small.scale[0] == 0.5 and large.scale[0] == 9.0


def test_outputs_are_preserved():
    rng = np.random.RandomState(0)
    features = rng.randn(T, B, 6).astype(np.float32)
    task = np.arange(B, dtype=np.int32) % K
    baseline = {'kernel': rng.randn(6, K).astype(np.float32), 'bias': rng.randn(K).astype(np.float32)}
    old, new = random_state(0), random_state(1)
    values = [
        popart.unnormalise(state, features @ parameters['kernel'] + parameters['bias'], task)[0]
        for state, parameters in ((old, baseline), (new, popart.preserve_outputs(baseline, old, new)))
    ]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)
    # And the parameters are those of rlax.
    states = [rlax.PopArtState(shift=s.mean, scale=s.scale, second_moment=s.second_moment) for s in (old, new)]
    expected = rlax.pop({'w': baseline['kernel'], 'b': baseline['bias']}, *states)
    got = popart.preserve_outputs(baseline, old, new)
    np.testing.assert_allclose(got['kernel'], expected['w'], rtol=1e-5)
    np.testing.assert_allclose(got['bias'], expected['b'], rtol=1e-5, atol=1e-6)


def make_learner(num_devices=1, popart_config=CONFIG, total_updates=20):
    config = dataclasses.replace(make_config(total_updates, num_devices=num_devices), popart=popart_config)
    agent = make_agent(NETWORK, TASKS, popart_config.enabled)
    return build.make_learner(config, agent, jax.devices()[:num_devices]), agent, config


def make_task_batch(seed=0):
    return make_batch(seed)._replace(task=np.arange(B, dtype=np.int32) % K)


def test_values_are_of_the_trajectorys_task():
    normalised = np.random.RandomState(0).randn(T + 1, B, K).astype(np.float32)
    task, state = np.arange(B, dtype=np.int32)[::-1] % K, random_state()
    values, scale = popart.unnormalise(state, normalised, task)
    for t in range(T + 1):
        for b in range(B):
            k = task[b]
            np.testing.assert_allclose(values[t, b], state.scale[k] * normalised[t, b, k] + state.mean[k], rtol=1e-5)
    np.testing.assert_array_equal(scale, state.scale[task])


def test_the_loss_is_that_of_normalised_targets():
    """Targets and advantages come from values and rewards as they are; both errors are divided by the scale."""
    batch, rng = make_task_batch(), np.random.RandomState(3)
    logits = rng.randn(T + 1, B, A).astype(np.float32)
    values = rng.randn(T + 1, B).astype(np.float32)
    scale = np.array([2.0, 0.5, 3.0], np.float32)[batch.task]
    config = LossConfig(reward_clip='none', entropy_cost=0.0)

    def parts(trajectory, scale):
        output = NetworkOutput(jnp.asarray(logits), jnp.asarray(values))
        return make_loss(config, VTraceConfig())(output, trajectory.experience, value_scale=scale)[1]

    plain, scaled = parts(batch, None), parts(batch, scale)
    np.testing.assert_array_equal(plain.value_targets, scaled.value_targets)
    error = np.where(plain.mask, (plain.value_targets - values[:-1]) / scale[None], 0)
    np.testing.assert_allclose(scaled.logs['baseline_loss'], 0.25 * np.sum(error**2), rtol=1e-4)
    # The policy's part, task by task.
    total = 0.0
    for b in range(B):
        alone = batch._replace(
            timesteps=jax.tree.map(lambda x, b=b: x[:, b : b + 1], batch.timesteps),
            behaviour_logits=batch.behaviour_logits[:, b : b + 1],
            task=batch.task[b : b + 1],
        )
        output = NetworkOutput(jnp.asarray(logits[:, b : b + 1]), jnp.asarray(values[:, b : b + 1]))
        total += float(make_loss(config, VTraceConfig())(output, alone.experience)[1].logs['policy_loss']) / scale[b]
    np.testing.assert_allclose(scaled.logs['policy_loss'], total, rtol=1e-4)


def values_of(agent, state, batch):
    output, _ = jax.jit(agent.unroll)(state.params, batch.timesteps, batch.initial_state)
    return np.asarray(popart.unnormalise(state.popart, output.values, batch.task)[0])


def test_an_update_that_learns_nothing_changes_no_value():
    """With a learning rate of next to 0 only the statistics move."""
    learner, agent, config = make_learner()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30))
    learner = build.make_learner(config, agent, jax.devices()[:1])
    state, batch = learner.init(jax.random.PRNGKey(0)), make_task_batch()
    before_state = host(state)
    before = values_of(agent, before_state, batch)
    for seed in range(5):
        state, _ = learner.update(state, make_task_batch(seed))
    after_state = host(state)
    assert differ(after_state.popart, before_state.popart)
    assert differ(after_state.params['params']['baseline'], before_state.params['params']['baseline'])
    np.testing.assert_allclose(values_of(agent, after_state, batch), before, rtol=1e-4, atol=1e-6)


def test_one_device_equals_eight():
    states = []
    for num_devices in (1, 8):
        learner, _, _ = make_learner(num_devices)
        state = learner.init(jax.random.PRNGKey(0))
        for seed in range(3):
            state, _ = learner.update(state, make_task_batch(seed))
        states.append(host(state))
    assert differ(states[0].popart, popart.init(K))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


def test_what_is_skipped_leaves_the_statistics():
    learner, _, _ = make_learner()
    state = learner.init(jax.random.PRNGKey(0))
    before = host(state.popart)
    state, _ = learner.update(state, poison(make_task_batch()))
    jax.tree.map(np.testing.assert_array_equal, host(state.popart), before)
    state, _ = learner.update(state, make_task_batch())
    assert differ(host(state.popart), before)


def test_the_statistics_are_in_the_checkpoint(tmp_path):
    _, agent, config = make_learner()
    loops = []
    for _ in range(2):
        loop, _, checkpoints, _ = make_training(config, agent, tmp_path, lambda *_: None, jax.devices()[:1])
        if not loops:
            for seed in range(3):
                loop.step(loop.put(make_task_batch(seed)))
            checkpoints.save(loop)
        loops.append(host(loop.state))
        loop.close()
    assert loops[1].num_updates == 3 and differ(loops[1].popart, popart.init(K))
    jax.tree.map(np.testing.assert_array_equal, *loops)


def test_without_popart_there_is_one_value_and_no_statistics():
    learner, agent, _ = make_learner(popart_config=PopArtConfig())
    state = learner.init(jax.random.PRNGKey(0))
    assert state.popart == ()
    batch = make_task_batch()
    output, _ = agent.unroll(state.params, batch.timesteps, batch.initial_state)
    assert output.values.shape == (T + 1, B)


@pytest.mark.parametrize('factor', [1.0, 1000.0])
def test_the_scale_of_rewards_does_not_matter_once_it_is_known(factor):
    """The loss of a task whose rewards, values and statistics are a thousand times larger is the same."""
    batch, rng = make_task_batch(), np.random.RandomState(4)
    logits, normalised = rng.randn(T + 1, B, A).astype(np.float32), rng.randn(T + 1, B, K).astype(np.float32)
    state = popart.PopArtState(*(np.asarray(x) for x in random_state()))

    def loss(factor):
        scaled = state._replace(mean=factor * state.mean, scale=factor * state.scale)
        values, scale = popart.unnormalise(scaled, normalised, batch.task)
        trajectory = batch._replace(timesteps=batch.timesteps._replace(reward=factor * batch.timesteps.reward))
        config = LossConfig(reward_clip='none')
        output = NetworkOutput(logits, values)
        return make_loss(config, VTraceConfig())(output, trajectory.experience, value_scale=scale)[0]

    np.testing.assert_allclose(loss(np.float32(factor)), loss(np.float32(1)), rtol=1e-4)
