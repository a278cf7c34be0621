"""`config.json`: the configuration of a run, and the versions of its packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from pathlib import Path

from impala_jax.config import Config, ConfigError, to_dict
from impala_jax.rundir.files import RUN_CONFIG, write_atomically
from impala_jax.rundir.format import FORMAT

_VERSIONS_OF = (
    'jax jaxlib flax optax rlax chex numpy orbax-checkpoint dm-env ale-py gymnasium dm-launchpad dm-reverb '
    'tensorflow tensorflow-cpu'
).split()


def write_run_config(workdir: Path, config: Config) -> None:
    """Makes the workdir and writes `config.json`: the resolved configuration, and the versions of packages.

    Raises:
      ConfigError: If the workdir cannot be written.
    """
    versions = {'python': platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    content = json.dumps({'format': FORMAT, 'config': to_dict(config), 'versions': versions}, indent=2) + '\n'
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(workdir) / RUN_CONFIG, content)
    except OSError as error:
        raise ConfigError(
            f'cannot write to --workdir {workdir}: {error.strerror}; give a directory that can be written'
        ) from error
