"""Runs under Launchpad."""

import pytest

from tests.helpers.programs import finish
from tests.helpers.runs import SMALL, rows_of, start


@pytest.mark.launchpad
@pytest.mark.parametrize('launch_type', ['local_mt', pytest.param('local_mp', marks=pytest.mark.slow)])
def test_reverb_is_reached_beside_a_proxy(launch_type, tmp_path):
    """Nobody listens on port 9."""
    proxy = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}
    arguments = ['--runtime', 'launchpad', '--launch-type', launch_type, '--timeout-s', '60']
    code, stdout, stderr = finish(start(tmp_path, *SMALL, *arguments, environment=proxy))
    assert code == 0, stdout + stderr
    assert rows_of(tmp_path)[-1]['frames'] == 1600
