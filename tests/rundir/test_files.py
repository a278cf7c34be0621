"""Files of a run folder."""

from pathlib import Path

import pytest

from impala_jax.rundir.files import errors_name


def test_a_write_to_a_full_disk_names_its_file():
    """The system's own error of a write has no name: 'which file?' would be all that a person can ask."""
    named = pytest.raises(OSError, match="No space left on device: 'results.csv'")
    with named, errors_name(Path('results.csv')), open('/dev/full', 'w') as file:
        file.write('a row')
