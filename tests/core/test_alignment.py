"""What the actor records is what the loss learns from: each transition once, with its own reward, end and bootstrap.

These are mistakes that other implementations of IMPALA made. Data comes from the real Actor, and what is learned from
it is read off the real loss (`learned`). No network is trained here.
"""

import dm_env
import jax
import numpy as np
import pytest

from impala_jax.config import (
    LossConfig,
    VTraceConfig,
)
from impala_jax.types import FIRST, LAST
from tests.helpers.counting import A, cut, make_actor, make_counting
from tests.helpers.loss_targets import Learned, assert_close, by_number, counted, learned


def test_reward_is_not_one_step_late():
    """Without a future (discount 0), the advantage of an action is the reward that this action brought."""
    environment, made = make_counting()
    actor, params = make_actor(environment)
    trajectory = actor.unroll(0, params)
    advantages = learned(trajectory, discount=0.0).advantages
    for i in range(2):
        assert_close(counted(advantages[:, i]), [reward for _, _, reward in made[i].transitions])
        # An episode's first action, too, and at its own observation.
        number = {int(count): t for t, count in enumerate(trajectory.timesteps.observation[:, i, 0])}
        for count, action, reward in made[i].transitions:
            assert trajectory.actions[number[count], i] == action
            assert_close(advantages[number[count], i], reward)


def test_no_transition_lost_or_counted_twice():
    """Over several unrolls every reward is learned from once, and every episode's return is counted once."""
    environment, made = make_counting(reward=lambda count, action: float(count))
    actor, params = make_actor(environment, unroll_length=3)
    trajectories = [actor.unroll(0, params) for _ in range(7)]
    rewards = np.concatenate([learned(trajectory, discount=0.0).advantages for trajectory in trajectories])
    info = jax.tree.map(lambda *parts: np.concatenate(parts), *(trajectory.info for trajectory in trajectories))
    for i in range(2):
        assert len(made[i].transitions) > 15
        assert_close(counted(rewards[:, i]), [reward for _, _, reward in made[i].transitions])
        ended = made[i].returns[: len(made[i].transitions) // (4 + i)]
        assert_close(info.episode_return[info.episode_ended[:, i], i], ended)
    for before, after in zip(trajectories, trajectories[1:], strict=False):
        assert before.timesteps.reward.shape == (4, 2)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[-1], b[0]), before.timesteps, after.timesteps)


def test_reset_transition_is_masked():
    """The transition into FIRST teaches nothing, whatever it holds; and it alone is left out."""
    environment, _ = make_counting()
    actor, params = make_actor(environment)
    trajectory = actor.unroll(0, params)
    into_first = trajectory.timesteps.step_type[1:] == FIRST
    assert into_first.any()
    values = by_number(trajectory)
    before = learned(trajectory, values)
    for x in before:
        np.testing.assert_array_equal(np.isnan(x), into_first)

    # Another ignored action, other logits at LAST, and a reward and discount at FIRST.
    reward, discount, action = (
        np.array(x) for x in (trajectory.timesteps.reward, trajectory.timesteps.discount, trajectory.actions)
    )
    reward[1:][into_first], discount[1:][into_first] = 99, 0.5
    previous_action = trajectory.timesteps.previous_action.copy()
    previous_action[1:][into_first] = (action[into_first] + 1) % A
    logits = trajectory.behaviour_logits.copy()
    logits[into_first] = [3, -2, 5]
    timesteps = trajectory.timesteps._replace(reward=reward, discount=discount, previous_action=previous_action)
    after = learned(trajectory._replace(timesteps=timesteps, behaviour_logits=logits), values)
    for a, b in zip(before, after, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('end', [dm_env.termination, dm_env.truncation])
def test_truncation_bootstraps_from_its_own_observation(end):
    """Of V only V(LAST) is not 0, or only V(FIRST): truncation learns from the first, termination from neither."""
    environment, _ = make_counting(num_envs=1, length=4, ends=(end,), reward=lambda count, action: 0.0)
    actor, params = make_actor(environment, unroll_length=13)
    trajectory = actor.unroll(0, params)
    step_type = trajectory.timesteps.step_type
    assert (step_type[:6, 0] == [FIRST, 1, 1, 1, LAST, FIRST]).all()
    assert (trajectory.timesteps.discount[step_type == LAST] == (end is dm_env.truncation)).all()

    at_last = np.where(step_type == LAST, 2.0, 0.0).astype(np.float32)
    targets = learned(trajectory, at_last, discount=0.5).targets[:, 0]
    steps_to_last = np.array([4, 3, 2, 1, np.nan] * 2)
    expected = 2 * 0.5**steps_to_last if end is dm_env.truncation else 0 * steps_to_last
    assert_close(targets[:10], expected)
    assert_close(targets[10:], 0)  # the last episode has no end in this unroll

    at_first = np.where(step_type == FIRST, 2.0, 0.0).astype(np.float32)
    assert_close(counted(learned(trajectory, at_first, discount=0.5).targets), 0)


def test_unroll_cut_in_two_gives_the_same_targets():
    """At an episode's end, and with one-step targets anywhere, where one cuts makes no difference; nor with the true
    values, whose temporal differences are all 0."""
    environment, _ = make_counting(num_envs=1, reward=lambda count, action: 0.1 * count)
    actor, params = make_actor(environment, unroll_length=12)
    whole = actor.unroll(0, params)
    T = len(whole.actions)
    step_type = whole.timesteps.step_type[:, 0]

    def pieces(at, values, **kwargs):
        parts = [
            learned(cut(whole, start, stop), values[start : stop + 1], **kwargs) for start, stop in ((0, at), (at, T))
        ]
        return Learned(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def assert_same(at, values, **kwargs):
        for a, b in zip(pieces(at, values, **kwargs), learned(whole, values, **kwargs), strict=True):
            assert_close(a, b)

    values = by_number(whole)
    ends = np.flatnonzero((step_type == LAST) | (step_type == FIRST))
    ends = ends[(ends > 0) & (ends < T)]
    assert ends.tolist() == [4, 5, 9, 10]
    for at in (4, 5, 9):
        assert_same(at, values)
    for at in (5, 7):
        # The target of one step; the advantage bootstraps from v, and so still sees one step beyond the cut.
        one_step = {'vtrace': VTraceConfig(lambda_=0.0)}
        assert_close(pieces(at, values, **one_step).targets, learned(whole, values, **one_step).targets)

    # The true values, backwards: what is beyond the unroll counts as it is.
    true_values = by_number(whole)
    for t in reversed(range(T)):
        if step_type[t + 1] != FIRST:
            bootstrap = 0.99 * whole.timesteps.discount[t + 1] * true_values[t + 1]
            true_values[t] = whole.timesteps.reward[t + 1] + bootstrap
    assert_close(counted(learned(whole, true_values).advantages), 0)
    for at in (3, 4, 5, 7):
        assert_same(at, true_values)

    # And the actor cuts as we do: two unrolls hold what one of twice the length does.
    environment, _ = make_counting(num_envs=1, reward=lambda count, action: 0.1 * count)
    short, _ = make_actor(environment, unroll_length=T // 2)
    for start in (0, T // 2):
        part, expected = short.unroll(0, params), cut(whole, start, start + T // 2)
        jax.tree.map(np.testing.assert_array_equal, part.timesteps, expected.timesteps)
        jax.tree.map(assert_close, part.behaviour_logits, expected.behaviour_logits)


def test_reward_is_clipped_in_the_learner_only():
    """The loss sees [-1, 1]; the trajectory and the reported returns are raw."""
    raw = [10.0, -7.0, 0.3, 0.0]
    environment, made = make_counting(num_envs=1, reward=lambda count, action: raw[count % 5 % 4], length=4)
    actor, params = make_actor(environment, unroll_length=14)
    trajectory = actor.unroll(0, params)
    expected = [reward for _, _, reward in made[0].transitions]
    assert set(expected) == set(raw)
    into = trajectory.timesteps.step_type[1:] != FIRST
    assert_close(trajectory.timesteps.reward[1:][into], expected)
    assert_close(trajectory.info.episode_return[trajectory.info.episode_ended], [sum(raw)] * 3)
    assert_close(counted(learned(trajectory, discount=0.0, reward_clip='unit').advantages), np.clip(expected, -1, 1))
    assert_close(counted(learned(trajectory, discount=0.0, reward_clip='none').advantages), expected)
    assert LossConfig().reward_clip == 'unit'
