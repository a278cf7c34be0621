"""A cache on disk for compiled XLA programs, so that later starts of the same program do not compile them again."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from impala_jax.system.machine import expand_home

_logger = logging.getLogger(__name__)
_MAX_BYTES = 2**30  # The least recently used programs are removed first.


def enable_cache() -> Path | None:
    """Enables JAX's compilation cache in this process, unless the user has configured or disabled it.

    Returns:
      The folder of the cache, within $XDG_CACHE_HOME/impala_jax (by default ~/.cache/impala_jax), or None if the cache
      is disabled or the folder is not writable. The folder can be deleted at any time. It must not be writable by other
      users, because JAX executes the programs in it.
    """
    config: Any = jax.config  # Type checkers do not know its attributes.
    if config.jax_compilation_cache_dir is not None:
        return Path(config.jax_compilation_cache_dir)
    if not config.jax_enable_compilation_cache:
        return None
    caches = expand_home(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    if caches is None:
        _logger.info('this user has no home directory, so compiled programs are not cached; set XDG_CACHE_HOME')
        return None
    folder = caches / 'impala_jax' / f'jax-{jax.__version__}-{_processor()}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _logger.info('%s is not writable, so compiled programs are not cached', folder)
        return None
    jax.config.update('jax_compilation_cache_max_size', _MAX_BYTES)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    jax.config.update('jax_compilation_cache_dir', str(folder))
    # JAX decides at the first compilation of a process whether to use a cache. That may have happened already.
    compilation_cache.reset_cache()
    return folder


def _processor() -> str:
    """Returns an id of the processor: machines with different instruction sets may have the same home directory."""
    description = platform.machine() + platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        description += next((line for line in lines if line.startswith(('flags', 'Features'))), '')
    return hashlib.sha256(description.encode()).hexdigest()[:12]
