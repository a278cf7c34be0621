"""Seals of items."""

import numpy as np
import pytest

from tests.helpers.transport import KEY

pytestmark = pytest.mark.launchpad


def test_a_seal_covers_all_that_an_item_says():
    from impala_jax.runtimes import seals

    leaves = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros([0, 2], np.int32), np.int64(7)]
    sealer = seals.Sealer(KEY, seals.TRAJECTORY)
    opener = seals.Opener(KEY, [seals.TRAJECTORY], leaves)
    columns = [np.asarray(leaf)[None] for leaf in [*leaves, sealer.seal(leaves)]]
    opened = opener.open(columns)
    assert opened.count == 0 and opened.leaves[2] == 7
    second = opener.open([*columns[:3], sealer.seal(leaves)[None]])
    assert (second.writer, second.count) == (opened.writer, 1)
    for i, column in enumerate(columns):
        for byte in range(0, column.nbytes, 5):
            changed = [c.copy() for c in columns]
            changed[i].reshape(-1).view(np.uint8)[byte] ^= 1
            with pytest.raises(seals.Refused, match='its checksum is wrong'):
                opener.open(changed)
    for purposes, key in (([seals.PARAMETERS], KEY), ([seals.TRAJECTORY], bytes(32))):
        with pytest.raises(seals.Refused):
            seals.Opener(key, purposes, leaves).open(columns)
    # The same bytes in another shape or of another type.
    for wrong in (columns[0].reshape(1, 3, 2), columns[0].view(np.int32), columns[0][:, :1], columns[0][0]):
        with pytest.raises(seals.Refused, match='its array 0 is'):
            opener.open([wrong, *columns[1:]])
