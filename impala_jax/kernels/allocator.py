"""Tells glibc to keep the memory that XLA's CPU backend frees.

XLA allocates and frees buffers of tens of megabytes at every call. By default glibc maps them from the kernel and gives
them back each time, so that every call faults every page in again. Threads make it worse: each has an arena of its own,
in which whatever is larger than 64 MiB is mapped, whatever the other settings are. One arena for all keeps it.
"""

from __future__ import annotations

import ctypes
import logging
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1  # The largest number is 2 GB, less than what an update may need.


def keep_memory() -> bool:
    """Applies to this process from now on; False where the C library is another one.

    To be called before JAX starts its threads, with its first computation: those that have an arena keep it.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = all(
        mallopt(option, value)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 2**26), (_M_ARENA_MAX, 1))
    )
    if not kept:
        logging.getLogger(__name__).warning('glibc refused the allocator settings; updates on the CPU will be slower')
    return kept
