"""Tells glibc to keep the memory that XLA's CPU backend frees.

XLA allocates and frees buffers of tens of megabytes at every call. By default glibc maps them from the kernel and gives
them back each time, so that every call faults every page in again; kept, an update takes a fifth to a third less time.
"""

from __future__ import annotations

import ctypes
import logging
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Applies to this process from now on; False where the C library is another one."""
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = all(
        mallopt(option, value)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    )
    if not kept:
        logging.getLogger(__name__).warning('glibc refused the allocator settings; updates on the CPU will be slower')
    return kept
