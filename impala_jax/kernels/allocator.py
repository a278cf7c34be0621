"""glibc settings that let freed memory of XLA's CPU backend be reused instead of returned to the kernel.

XLA allocates and frees buffers of tens of megabytes in every call. By default glibc maps them from the kernel and
returns them each time, so every call causes a page fault for every page. Threads make it worse: each has its own arena,
in which allocations above 64 MiB are mapped regardless of the other settings. A single arena for all threads avoids
this.
"""

from __future__ import annotations

import ctypes
import logging
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1  # A limit instead would be at most 2 GB, less than an update may need.


def configure_allocator() -> bool:
    """Configures the allocator of this process.

    It must be called before the first computation, when JAX starts its threads, because threads that already have an
    arena keep using it.

    Returns:
      Whether the settings were applied; False if the C library is not glibc.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = all(
        mallopt(option, value)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 2**26), (_M_ARENA_MAX, 1))
    )
    if not accepted:
        logging.getLogger(__name__).warning('glibc refused the allocator settings; updates on the CPU will be slower')
    return accepted
