"""One host and several: what they exchange, and that they update alike."""

import jax
import numpy as np
import pytest

from impala_jax.build import make_agent, make_learner
from impala_jax.training.hosts import ManyHosts, OneHost, fresh_first
from tests.helpers.batches import NETWORK, SPEC, B, assert_equal, host, make_batch, make_config, poison


@pytest.fixture(scope='module')
def learner():
    return make_learner(make_config(num_devices=2), make_agent(NETWORK, SPEC))


def test_a_host_that_stops_stops_the_update(learner):
    """Counts and optimiser included: as if the batch had never been."""
    hosts = ManyHosts(learner, B, make_batch(7))
    update = hosts.update(learner.init(jax.random.PRNGKey(0)), hosts.put(make_batch(0)), None)
    assert update.counts is not None
    before = host(update.state)
    state = hosts.stop(update.state, None)
    assert_equal(host(state), before)
    hosts = ManyHosts(learner, B, poison(make_batch(1)))
    assert_equal(host(hosts.stop(state, None)), before)


def test_what_is_only_counted_comes_back(learner):
    batch = make_batch(0, version=3)._replace(task=np.arange(B, dtype=np.int32))
    for hosts in (OneHost(learner), ManyHosts(learner, B, batch)):
        update = hosts.update(learner.init(jax.random.PRNGKey(0)), hosts.put(batch), None, waited_s=0.5)
        assert_equal(update.counts, batch.counts)
        assert update.waited_s == 0.5


def test_one_host_updates_as_several_do(learner):
    states = []
    for hosts in (OneHost(learner), ManyHosts(learner, B, make_batch(7))):
        state = learner.init(jax.random.PRNGKey(0))
        for i in range(3):
            state = hosts.update(state, hosts.put(make_batch(i)), None).state
        states.append(host(state))
    assert_equal(*states)


def test_what_is_new_comes_first_whichever_host_it_is_from():
    assert fresh_first(8, 4, 1).tolist() == list(range(8))
    assert fresh_first(8, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert fresh_first(8, 8, 4).tolist() == list(range(8))
