"""Runs under Launchpad."""

import logging
import os
import sys

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


@pytest.mark.launchpad
def test_warnings_are_no_native_messages(tmp_path, capfd):
    from impala_jax.runtimes import launchpad

    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with launchpad._native_messages_to(tmp_path / 'native.log'):
            logging.getLogger('impala_jax').warning('a checkpoint is damaged')
            os.write(2, b'a server started\n')
        logging.getLogger('impala_jax').warning('after it')
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err.splitlines() == ['a checkpoint is damaged', 'after it']
    assert (tmp_path / 'native.log').read_text() == 'a server started\n'
