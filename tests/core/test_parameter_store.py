"""One contract for every parameter store."""

import numpy as np
import pytest

from impala_jax.parameter_store import LocalParameterStore
from impala_jax.types import Closed
from tests.helpers.transport import PARAMS, in_thread, reverb_server, reverb_store


@pytest.fixture(params=['local', pytest.param('reverb', marks=pytest.mark.launchpad)])
def make_store(request):
    if request.param == 'local':
        yield LocalParameterStore
        return
    with reverb_server() as server:
        yield lambda timeout_s: reverb_store(server, timeout_s)


def test_store_serves_the_newest(make_store):
    store = make_store(20.0)
    for version in range(5):
        store.publish(version, {'a': PARAMS['a'] + version, 'b': {'c': PARAMS['b']['c'] - version}})
        got, params = store.latest()
        assert got == version
        np.testing.assert_array_equal(params['a'], PARAMS['a'] + version)
        np.testing.assert_array_equal(params['b']['c'], PARAMS['b']['c'] - version)
    store.close()
    with pytest.raises(Closed):
        store.latest()


def test_store_without_parameters_times_out_and_closes(make_store):
    with pytest.raises(TimeoutError, match='for the learner to publish'):
        make_store(0.5).latest()
    store = make_store(30.0)
    thread, errors = in_thread(store.latest)
    store.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(errors[0], Closed)
