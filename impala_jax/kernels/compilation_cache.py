"""Keeps what XLA has compiled on disk, so that the next start of a like program does not compile it again."""

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
_MAX_BYTES = 2**30  # The longest unused goes first.


def keep_programs() -> Path | None:
    """Applies to this process from now on; whoever set JAX's own cache, or forbade it, keeps what he set.

    Returns:
      The folder; None where there is none to write to. It is $XDG_CACHE_HOME/impala_jax (by default ~/.cache), can be
      deleted at any time, and must not be one that others write to: JAX runs what it finds there.
    """
    config: Any = jax.config  # Its values are attributes that type checkers do not know.
    if config.jax_compilation_cache_dir is not None:
        return Path(config.jax_compilation_cache_dir)
    if not config.jax_enable_compilation_cache:
        return None
    caches = expand_home(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    if caches is None:
        _logger.info('this user has no home directory: every start compiles again; set XDG_CACHE_HOME to a folder')
        return None
    folder = caches / 'impala_jax' / f'jax-{jax.__version__}-{_processor()}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _logger.info('%s cannot be written: every start compiles again', folder)
        return None
    jax.config.update('jax_compilation_cache_max_size', _MAX_BYTES)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    jax.config.update('jax_compilation_cache_dir', str(folder))
    # JAX decides at a process's first compilation whether there is a cache; it may be past that.
    compilation_cache.reset_cache()
    return folder


def _processor() -> str:
    """Tells processors apart: a home may be shared by machines of which one lacks another's instructions."""
    description = platform.machine() + platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        description += next((line for line in lines if line.startswith(('flags', 'Features'))), '')
    return hashlib.sha256(description.encode()).hexdigest()[:12]
