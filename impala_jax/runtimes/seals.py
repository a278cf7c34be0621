"""Keyed checksums of the items in a Reverb server, which has no authentication.

An item is a list of arrays, the last of which is its seal: the item's purpose, its writer, its number among the items
of this writer, and an HMAC-SHA256 of these and the arrays. Without the key it is impossible to forge an item, or to use
one for another purpose.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_logger = logging.getLogger(__name__)

KEY_BYTES = 32
# Purposes of items, one byte each.
TRAJECTORY, REPLAYED, PARAMETERS, SESSION = b'T', b'R', b'P', b'S'

_WRITER_BYTES, _COUNT_BYTES, _DIGEST_BYTES = 16, 8, 32
_HEADER_BYTES = 1 + _WRITER_BYTES + _COUNT_BYTES


class Refused(Exception):
    """An item that was not written with the key, or for another purpose; the message is the reason."""


class Opened(NamedTuple):
    """A verified item."""

    leaves: list[np.ndarray]
    writer: bytes
    count: int  # Number of items that its writer had sealed before.
    seal: bytes


def new_key() -> bytes:
    """Returns a random key for one start of a run."""
    return secrets.token_bytes(KEY_BYTES)


def derived_key(secret: bytes, *path: str) -> bytes:
    """Derives a key from a secret; each path gives another key."""
    return hmac.digest(secret, '/'.join(path).encode(), 'sha256')


class Sealer:
    """Seals the items of one writer.

    Args:
      key: Key of the run, [32] bytes.
      purpose: One of this module's purposes.
    """

    def __init__(self, key: bytes, purpose: bytes):
        self._key = key
        self._start = purpose + secrets.token_bytes(_WRITER_BYTES)
        self._counts = itertools.count()

    def seal(self, leaves: Sequence[Any]) -> np.ndarray:
        """Returns the seal of the writer's next item, [57] uint8."""
        header = self._start + next(self._counts).to_bytes(_COUNT_BYTES, 'little')
        return np.frombuffer(header + _digest(self._key, header, leaves), np.uint8)


class Opener:
    """Verifies items read by Reverb's client.

    Args:
      key: Key of the run, [32] bytes.
      purposes: Accepted purposes.
      leaves: Arrays with the shapes and dtypes of an item.
    """

    def __init__(self, key: bytes, purposes: Sequence[bytes], leaves: Sequence[Any]):
        self._key = key
        self._purposes = purposes
        self._expected = [(np.dtype(leaf.dtype), (1, *leaf.shape)) for leaf in leaves]
        self._expected.append((np.dtype(np.uint8), (1, _HEADER_BYTES + _DIGEST_BYTES)))

    def open(self, columns: Sequence[np.ndarray]) -> Opened:
        """Verifies the item with these columns, each [1, ...].

        Raises:
          Refused: If shapes or dtypes differ, or no `Sealer` with the key and an accepted purpose has sealed the item.
        """
        if len(columns) != len(self._expected):
            raise Refused(f'it has {len(columns)} arrays instead of {len(self._expected)}')
        for i, (column, (dtype, shape)) in enumerate(zip(columns, self._expected, strict=True)):
            if column.dtype != dtype or column.shape != shape:
                raise Refused(f'its array {i} is {column.dtype}{list(column.shape)} instead of {dtype}{list(shape)}')
        *leaves, seal = (column[0] for column in columns)
        seal = seal.tobytes()
        header, digest = seal[:_HEADER_BYTES], seal[_HEADER_BYTES:]
        if not hmac.compare_digest(_digest(self._key, header, leaves), digest):
            raise Refused('its checksum is wrong')
        if header[:1] not in self._purposes:
            raise Refused('it was written for another purpose')
        count = int.from_bytes(header[1 + _WRITER_BYTES :], 'little')
        return Opened(leaves, header[1 : 1 + _WRITER_BYTES], count, seal)


class Refusals:
    """Counts the refused items of a table, and logs a warning whenever the count reaches a power of two.

    Args:
      table: Name of the table.
    """

    def __init__(self, table: str):
        self.count = 0
        self._table = table

    def add(self, reason: Exception | str) -> None:
        """Counts a refused item."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            _logger.warning(
                'an item in the Reverb table %s was refused: %s; no part of this run has written it (%d so far)',
                self._table,
                ' '.join(str(reason).split())[:200],
                self.count,
            )


def _digest(key: bytes, header: bytes, leaves: Sequence[Any]) -> bytes:
    code = hmac.new(key, header, 'sha256')
    for leaf in leaves:
        array = np.asarray(leaf)
        code.update(f'{array.dtype.str}{array.shape}'.encode())  # They determine how many bytes follow.
        code.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return code.digest()
