"""Start-up of a run on several hosts: initialisation, checks that all hosts run the same, and reports of failures.

After `join` this process is one of `jax.process_count()`, and everything else runs as on a single host: the learner's
mesh spans the devices of all hosts, and `host_share` returns this host's part of the rest.
"""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import socket
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from impala_jax import config as config_lib
from impala_jax.build import choose_devices
from impala_jax.config import Config, ConfigError
from impala_jax.kernels import cpu
from impala_jax.learner import HostLost
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes.channel import Channel, new_token
from impala_jax.runtimes.host_share import host, host_share
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.run import Interrupted
from impala_jax.runtimes.supervisor import is_local
from impala_jax.system.machine import connect_without_proxy

_VERSIONS_OF = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


class Host(NamedTuple):
    """Description of a host, which all hosts exchange."""

    name: str
    address: str
    port: int  # Port at which its supervisor listens.
    token: str
    num_devices: int
    versions: dict[str, str]
    config: dict[str, Any]  # Flat, keyed by field.


def join(coordinator: str | None, num_hosts: int | None, host_id: int | None, timeout_s: float) -> None:
    """Initialises `jax.distributed`; call it before anything else uses JAX.

    Args:
      coordinator: host:port of host 0; None reads it, `num_hosts` and `host_id` from the TPU's metadata.
      num_hosts: Number of hosts, or None.
      host_id: Index of this host, or None.
      timeout_s: Longest wait for all hosts, in seconds.

    Raises:
      ConfigError: If the hosts do not find each other.
    """
    connect_without_proxy(*([coordinator.rpartition(':')[0]] if coordinator else []))
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host_id,
            initialization_timeout=max(1, int(timeout_s)),
            # JAX would listen on all addresses, without authentication.
            coordinator_bind_address=coordinator if is_local(coordinator) else None,
        )
    except Exception as error:  # JAX raises ValueError, RuntimeError, and errors of the cluster's metadata service.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        if coordinator is None:
            raise ConfigError(
                f'no TPU pod was found ({cause}); give --coordinator HOST:PORT --num-hosts N --host-id I, or '
                '--simulate-hosts N to try it on this machine'
            ) from error
        raise ConfigError(
            f'host {host_id} of {num_hosts} did not find the others at {coordinator} ({cause}); start the same command '
            'on every host, with its own --host-id, and open the port'
        ) from error
    # Removes JAX's handler of SIGTERM, which would only record the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def preflight(config: Config, channel: Channel, coordinator: str | None) -> list[str]:
    """Exchanges the hosts' descriptions, checks that they agree, and connects the supervisors.

    Returns:
      The pre-flight report, one line per fact.

    Raises:
      ConfigError: On every host, if versions or configurations differ, or a batch does not divide over the devices.
    """
    own = Host(
        name=socket.gethostname(),
        address=_address(coordinator),
        port=channel.port,
        token=new_token(),
        num_devices=len(jax.local_devices()),
        versions=code_versions(),
        config=config_lib.to_flat_dict(config),
    )
    hosts = [Host(**json.loads(text)) for text in _gather(json.dumps(own._asdict()))]
    names = [host.name for host in hosts]
    channel.joined(jax.process_index(), names, (hosts[0].address, hosts[0].port), hosts[0].token)
    try:
        check_agreement(hosts)
        return report(config, hosts)
    except ConfigError:
        jax.distributed.shutdown()  # Waits for all hosts, so that each can report the error before JAX aborts it.
        raise


def check_agreement(hosts: Sequence[Host]) -> None:
    """Raises ConfigError if the versions or the configuration of a host differ from those of host 0."""
    first = hosts[0]
    for i, other in enumerate(hosts):
        for what, ours, theirs in (
            ('versions', first.versions, other.versions),
            ('configurations', first.config, other.config),
        ):
            differing = [
                f'{name} {ours.get(name)} on host 0 ({first.name}), {theirs.get(name)} on host {i} ({other.name})'
                for name in sorted(ours.keys() | theirs.keys())
                if ours.get(name) != theirs.get(name)
            ]
            if differing:
                raise ConfigError(f'the {what} of the hosts differ: {"; ".join(differing)}; make them the same')


def report(config: Config, hosts: Sequence[Host]) -> list[str]:
    """Builds the pre-flight report.

    Raises:
      ConfigError: If a batch does not divide over the devices, or the hosts' numbers of devices differ.
    """
    numbers = [host.num_devices for host in hosts]
    if config.learner.num_devices is None and len(set(numbers)) > 1:
        counts = ', '.join(f'{host.num_devices} on host {i} ({host.name})' for i, host in enumerate(hosts))
        raise ConfigError(f'the hosts have different numbers of devices: {counts}; set --learner.num-devices')
    devices = choose_devices(config)
    size = config.learner.batch_size
    if size % len(devices):
        raise ConfigError(
            f'learner.batch_size {size} does not divide over the {len(devices)} devices of {len(hosts)} hosts; choose '
            f'a multiple of {len(devices)}, such as {-(-size // len(devices)) * len(devices)}'
        )
    share = host_share(config)
    kind = f'{devices[0].platform} ({devices[0].device_kind})'
    return [
        f'Hosts       {len(hosts)}: {", ".join(host.name for host in hosts)}',
        f'Devices     {len(devices)} x {kind}, {len(devices) // len(hosts)} per host',
        f'Mesh        batch: {len(devices)}',
        f'Batch       {size} trajectories, {size // len(hosts)} per host, {size // len(devices)} per device',
        f'Actors      {share.num_actors} x {share.actor.num_envs} environments per host',
    ]


def workdir_of_host(workdir: Path) -> Path:
    """The folder for this host's files: the workdir on host 0, which writes the files of the run, else one inside."""
    index, _ = host()
    return workdir if index == 0 else workdir / 'hosts' / str(index)


def code_versions() -> dict[str, str]:
    """The versions that must agree on all hosts: Python, this package and its kernels, and the numerical packages."""
    return {
        'python': platform.python_version(),
        'impala_jax': code_version(),
        **{name: metadata.version(name) for name in _VERSIONS_OF},
        # All hosts must compile the same program, of which the kernels are a part on CPUs.
        **({'CPU kernels': cpu.REASON or 'in use'} if jax.default_backend() == 'cpu' else {}),
    }


@contextlib.contextmanager
def failures_reported(channel: Channel) -> Iterator[None]:
    """Reports an exception of the body to the supervisor, and whether its cause is on another host.

    Hosts that stop after the same update shut down together, so that each can report its reason before JAX aborts it.
    """
    try:
        yield
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        follows = (
            isinstance(error, HostLost)
            or (isinstance(error, Interrupted) and not error.signal_number)
            or (isinstance(error, NodeFailure) and isinstance(error.__cause__, HostLost))
        )
        channel.ended(reason, follows)
        if not follows and jax.distributed.is_initialized():
            jax.distributed.shutdown()  # The supervisor limits this wait.
        raise


def _address(coordinator: str | None) -> str:
    """The address at which other hosts reach this one; used for host 0 only."""
    if coordinator is not None:
        return coordinator.rpartition(':')[0]
    return socket.gethostbyname(socket.gethostname())


def _gather(text: str) -> list[str]:
    """Gathers a text from each host, in the order of the hosts."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(encoded.size)))
    padded = np.zeros([sizes.max()], np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
