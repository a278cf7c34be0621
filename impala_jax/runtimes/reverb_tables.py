"""Tables of the Reverb server."""

from __future__ import annotations

from typing import Any

import reverb
from reverb.platform.checkpointers_lib import CheckpointerBase

from impala_jax.runtimes.host_share import HostShare

TRAJECTORIES = 'trajectories'
REPLAY = 'replay'
REPLAY_IN_ORDER = 'replay_in_order'
"""The items of the replay table once more, without copies, to be read out one by one: a table is only ever sampled."""
PARAMETERS = 'parameters'
SESSION = 'session'
"""What actors of other machines must know of a run, where they may join; see `reverb_actors`."""


class NoCheckpointer(CheckpointerBase):
    """Refuses to write tables to the disk, which any client may ask for, and makes no folder for them."""

    def internal_checkpointer(self) -> Any:
        return None


def tables(share: HostShare, suffix: str = '', serve_actors: bool = False) -> list[reverb.Table]:
    """The server's tables: a first-in-first-out queue of trajectories, the newest parameters only, and replay.

    A trajectory is written into queue and replay at once, and stored once.

    Args:
      share: Capacities of queue and replay.
      suffix: of the tables' names; another one at each start of a program that serves the same port. Reverb's clients
        go on by themselves with whatever server comes after the one they lost, with trajectories that may not fit
        there: the new one then has no table of that name, and refuses them.
      serve_actors: Whether actors of other machines can join; they read the session of the run.
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
    """A table that keeps its newest item only."""
    return reverb.Table(
        name,
        sampler=reverb.selectors.Lifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
