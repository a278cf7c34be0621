"""Tables of the Reverb server."""

from __future__ import annotations

from typing import Any

import reverb
from reverb.platform.checkpointers_lib import CheckpointerBase

from impala_jax.runtimes.host_share import HostShare

TRAJECTORIES = 'trajectories'
REPLAY = 'replay'
REPLAY_IN_ORDER = 'replay_in_order'
"""Table with the items of the replay table, not copied, from which they are read in order to save them."""
PARAMETERS = 'parameters'
SESSION = 'session'
"""Table with the session that actors on other machines need to join a run; see `reverb_actors`."""


class NoCheckpointer(CheckpointerBase):
    """Checkpointer that creates no folder, and refuses a client's request to write tables to the disk."""

    def internal_checkpointer(self) -> Any:
        """None, for which Reverb refuses checkpoints."""
        return None


def tables(share: HostShare, suffix: str = '', serve_actors: bool = False) -> list[reverb.Table]:
    """Builds the server's tables: a first-in-first-out queue of trajectories, the newest parameters, and replay.

    A trajectory is written into queue and replay at the same time, and stored once.

    Args:
      share: This host's share of the experiment, with the capacities of queue and replay.
      suffix: Suffix of the tables' names, which differs between starts at the same port. Reverb's clients reconnect by
        themselves to a new server after the loss of the old one, and their trajectories may not fit. The new server
        refuses them, because it has no table with their suffix.
      serve_actors: Whether actors on other machines can join, for which a table holds the session of the run.
    """
    replay = reverb.Table(
        REPLAY + suffix,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=share.replay_capacity,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    in_order = reverb.Table(
        REPLAY_IN_ORDER + suffix,
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=share.replay_capacity,
        max_times_sampled=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    return [
        reverb.Table.queue(TRAJECTORIES + suffix, max_size=share.queue_capacity),
        *([replay, in_order] if share.num_replayed else []),
        _newest(PARAMETERS + suffix),
        *([_newest(SESSION)] if serve_actors else []),
    ]


def _newest(name: str) -> reverb.Table:
    """A table of size 1, which holds the newest item."""
    return reverb.Table(
        name,
        sampler=reverb.selectors.Lifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
