"""Messages of C++ libraries go to a file."""

import logging
import os
import sys

from impala_jax.system.native_messages import native_messages_to


def test_warnings_are_no_native_messages(tmp_path, capfd):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with native_messages_to(tmp_path / 'native.log'):
            logging.getLogger('impala_jax').warning('a checkpoint is damaged')
            os.write(2, b'a server started\n')
        logging.getLogger('impala_jax').warning('after it')
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err.splitlines() == ['a checkpoint is damaged', 'after it']
    assert (tmp_path / 'native.log').read_text() == 'a server started\n'
