"""Starting up as one host of several: who is there, whether all are about to run the same, and how one ends.

After `join` the process is one of `jax.process_count()`, and everything else runs as on a single host: the learner's
mesh spans the devices of all hosts, and `host_share` is this host's share of the rest.
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
    """What a host tells the others when they meet."""

    name: str
    address: str  # of the machine
    port: int  # where its supervisor listens
    token: str
    num_devices: int
    versions: dict[str, str]
    config: dict[str, Any]  # flat


def join(coordinator: str | None, num_hosts: int | None, host_id: int | None, timeout_s: float) -> None:
    """Makes this process one of several, before anything else uses JAX.

    Args:
      coordinator: host:port of the first host; None, as the two others: what the TPU's metadata says.
      num_hosts: how many there are.
      host_id: which of them this is.
      timeout_s: how long all may take to be there.

    Raises:
      ConfigError: the hosts do not find each other.
    """
    connect_without_proxy(*([coordinator.rpartition(':')[0]] if coordinator else []))
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host_id,
            initialization_timeout=max(1, int(timeout_s)),
            # JAX's own choice is all addresses, where nobody has to say who he is.
            coordinator_bind_address=coordinator if is_local(coordinator) else None,
        )
    except Exception as error:  # JAX raises ValueError, RuntimeError and errors of what tells it of the cluster.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        if coordinator is None:
            raise ConfigError(
                f'no TPU pod is found here ({cause}); give --coordinator HOST:PORT --num-hosts N --host-id I, or '
                '--simulate-hosts N to try it on this machine'
            ) from error
        raise ConfigError(
            f'host {host_id} of {num_hosts} did not meet the others at {coordinator} ({cause}); start the same command '
            'on every host, with its own --host-id, and open the port'
        ) from error
    # JAX has taken SIGTERM for itself, and would only note it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def meet(config: Config, channel: Channel, coordinator: str | None) -> list[str]:
    """Hosts tell each other what they are about to run; returns the pre-flight report, a line a fact.

    The supervisor hears from it where the others are.

    Raises:
      ConfigError: the hosts differ in what they run, or a batch does not divide over their devices; on every host.
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
        jax.distributed.shutdown()  # All refuse, and wait here, so that none ends the others before they have said why.
        raise


def check_agreement(hosts: Sequence[Host]) -> None:
    """Raises ConfigError if a host would run another program, or another experiment, than the first."""
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
    """The pre-flight report.

    Raises:
      ConfigError: a batch that the devices do not divide, or hosts with different numbers of devices.
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
    """Where this host keeps its files: the first one, which keeps those of the run, in the workdir itself."""
    index, _ = host()
    return workdir if index == 0 else workdir / 'hosts' / str(index)


def code_versions() -> dict[str, str]:
    """What must be the same on all hosts: Python, the packages that compute, this one, and its kernels."""
    return {
        'python': platform.python_version(),
        'impala_jax': code_version(),
        **{name: metadata.version(name) for name in _VERSIONS_OF},
        # All hosts must compile the same program, and the kernels are a part of it on CPUs.
        **({'CPU kernels': cpu.REASON or 'in use'} if jax.default_backend() == 'cpu' else {}),
    }


@contextlib.contextmanager
def told(channel: Channel) -> Iterator[None]:
    """Tells the supervisor why what is inside fails, and whether that began on another host.

    Hosts that stopped in step leave together: none takes the others with it before they have said why.
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
            jax.distributed.shutdown()  # For as long as the supervisor lets it.
        raise


def _address(coordinator: str | None) -> str:
    """Where other hosts reach this one; asked of the first host only."""
    if coordinator is not None:
        return coordinator.rpartition(':')[0]
    return socket.gethostbyname(socket.gethostname())


def _gather(text: str) -> list[str]:
    """The texts of all hosts, in the order of the hosts."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(encoded.size)))
    padded = np.zeros([sizes.max()], np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
