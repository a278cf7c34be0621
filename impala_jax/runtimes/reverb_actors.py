"""Actors on other machines, which join a learner through its Reverb server and outlive it.

The learner announces its session in a table of that server: configuration, environment spec and code version.
`impala actors` reads the session, verifies that it matches this machine, and runs actors. The messages are Reverb's
tensors only, one of which contains JSON. Before that, both ends prove that they know a secret (`gate`), from which the
keys of all seals are derived.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import numpy as np
import reverb

from impala_jax import environments
from impala_jax.actor import run_actor
from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.config import Config, ConfigError, differences, from_dict, to_dict, to_flat_dict
from impala_jax.environments import suites
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes import nodes, seals
from impala_jax.runtimes.gate import Tunnel, WrongSecret
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.reverb_items import ServerLost
from impala_jax.runtimes.reverb_tables import PARAMETERS, SESSION, TRAJECTORIES
from impala_jax.runtimes.reverb_transport import ReverbParameterStore, ReverbTrajectoryQueue
from impala_jax.runtimes.threads import NodeThreads
from impala_jax.types import Closed, EnvironmentSpec, Trajectory

_logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5  # Longest wait for a learner's information on its tables, in seconds.
_WATCH_INTERVAL_S = 3.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
# Consecutive refusals, within 8 to 16 s; a single one may come from a connection that corrupts data.
_MAX_REFUSALS = 6
_SESSION_BYTES = 1 << 18  # JSON, padded with zeros.
_SUFFIX = re.compile(r'-[0-9a-z]{1,64}')


class Session(NamedTuple):
    """The announcement of a learner, and a connection to it."""

    tunnel: Tunnel
    client: reverb.Client
    key: bytes  # Key of the seals of trajectories and parameters.
    suffix: str  # Suffix of the tables' names.
    config: Config
    spec: str  # Text of the environment's spec.


class _NotThere(Exception):
    """No learner can be joined at the address at present; one may start later."""


def items_key(secret: bytes, suffix: str) -> bytes:
    """Derives the key of trajectories and parameters for one start of a run, with its tables' `suffix`."""
    return seals.derived_key(secret, 'items', suffix)


def announce(
    client: reverb.Client, secret: bytes, config: Config, spec: EnvironmentSpec, suffix: str
) -> ReverbParameterStore:
    """Announces a session, so that actors can join until the returned store is closed.

    Args:
      client: Client of the server with the run's tables.
      secret: Secret of the actors.
      config: Configuration of the experiment.
      spec: Spec of the environment.
      suffix: Suffix of the tables' names.

    Raises:
      ServerLost: If the session cannot be written.
    """
    session = {'code': code_version(), 'suffix': suffix, 'config': to_dict(config), 'spec': str(spec)}
    text = json.dumps(session).encode()
    store = _session_store(client, secret, config.timeout_s)
    store.publish(0, np.frombuffer(text.ljust(_SESSION_BYTES, b'\0'), np.uint8))
    return store


def _session_store(client: reverb.Client, secret: bytes, timeout_s: float) -> ReverbParameterStore:
    key = seals.derived_key(secret, 'session')
    return ReverbParameterStore(client, key, np.zeros(_SESSION_BYTES, np.uint8), timeout_s, SESSION, seals.SESSION)


def waiting_for_actors(fetch: Callable[[], Trajectory]) -> Callable[[], Trajectory]:
    """Wraps `fetch` to log its timeouts and try again, because actors on other machines may join late."""

    def wait() -> Trajectory:
        while True:
            try:
                return fetch()
            except TimeoutError as error:
                _logger.warning('%s; all actors are on other machines, and the learner keeps waiting', error)

    return wait


def run(
    address: str,
    num_actors: int,
    stop: threading.Event,
    *,
    secret: Callable[[], bytes],
    adapt: Callable[[Config], Config] = lambda config: config,
    imports: Collection[str] = (),
    wait_s: float = 3600.0,
) -> None:
    """Runs actors for the learner at `address` until `stop` is set; reconnects when the learner is lost.

    Args:
      address: HOST:PORT of a program with `config.serve_actors`.
      num_actors: Number of threads, each with its own environments.
      stop: Event that ends all threads within seconds.
      secret: Function that returns the secret; raises FileNotFoundError if it does not exist yet.
      adapt: Function from the learner's configuration to this machine's; only fields of the execution may differ.
      imports: User code, each `module:name`, that the learner's configuration may name.
      wait_s: Longest wait for a learner that cannot be reached, in seconds.

    Raises:
      ConfigError: If secret, code or environment differ from the learner's, the address is not a learner's, or the
        learner's configuration names code that is not in `imports`.
      NodeFailure: If there was no learner for `wait_s`.
      Exception: If an actor failed; the error is that of the actor.
    """
    joined_before = False
    while not stop.is_set():
        session = _find(address, secret, stop, wait_s, joined_before)
        if session is None:
            return
        try:
            joined = _join(session, address, num_actors, adapt, imports)
            joined_before = True
            joined.act(stop)
        finally:
            session.tunnel.close()
        if joined.lost is not None:
            print(f'lost the learner at {address}: {joined.lost}; looking for it again', flush=True)
        # Releases the connections: while one exists, its growing retry delay applies to new ones as well.
        del session, joined


def user_code(config: Config) -> dict[str, str]:
    """The user code, `module:name`, that actors of a configuration import, keyed by the field that names it."""
    values = to_flat_dict(config)
    fields = ('environment.name', 'network.torso', 'network.core', 'network.module')
    return {field: values[field] for field in fields if ':' in (values[field] or '')}


def _join(
    session: Session, address: str, num_actors: int, adapt: Callable[[Config], Config], imports: Collection[str]
) -> _Joined:
    """Builds the actors; raises ConfigError if they do not match the learner."""
    for option, name in user_code(session.config).items():
        if name not in imports:
            raise ConfigError(
                f'the learner at {address} uses code outside impala_jax, {name!r}, which is imported here only if it '
                f'is named; add --{option} {name} if you trust it'
            )
    config = adapt(session.config)
    changed = differences(session.config, config, 'at the learner')
    if changed:
        raise ConfigError(f'these fields can be set at the learner only: {"; ".join(changed)}')
    spec = environments.spec(config.environment, config.timeout_s)
    if str(spec) != session.spec:
        raise ConfigError(
            f'environment {config.environment.name!r} differs from that of the learner at {address}, which has '
            f'{session.spec}; here it has {spec}; install the same versions of its packages'
        )
    joined = _Joined(session, config, make_agent(config.network, spec, config.popart.enabled), num_actors)
    print(
        f'joined the learner at {address}: {config.environment.name}, {num_actors} actors with '
        f'{config.actor.num_envs} environments each',
        flush=True,
    )
    return joined


def _find(
    address: str, secret: Callable[[], bytes], stop: threading.Event, wait_s: float, joined_before: bool
) -> Session | None:
    """Requests the learner's session until it succeeds, with growing pauses; returns None when `stop` is set.

    Raises NodeFailure if there is no learner for `wait_s`, and ConfigError if it cannot be joined.
    """
    deadline = time.monotonic() + wait_s
    longest = _FIRST_WAIT_S
    num_refusals = 0
    while not stop.is_set():
        try:
            return _ask(address, secret)
        except (_NotThere, WrongSecret) as reason:
            # After a first join the secret is known to be right: another program listens there in the meantime.
            num_refusals = num_refusals + 1 if isinstance(reason, WrongSecret) and not joined_before else 0
            left = deadline - time.monotonic()
            if num_refusals == _MAX_REFUSALS or (num_refusals and left <= 0):
                raise ConfigError(
                    f'the learner at {address} cannot be joined: {reason}; give the secret it was started with'
                ) from reason
            if left <= 0:
                raise NodeFailure(f'no learner at {address} for {wait_s:g} s: {reason}') from None
            # Randomised, because thousands of actors may lose their learner at the same time.
            pause = min(random.uniform(0.5, 1.0) * longest, left)
            print(f'no learner at {address} yet: {reason}; next try in {pause:.1f} s', flush=True)
            stop.wait(pause)
            longest = min(2 * longest, _LONGEST_WAIT_S)
    return None


def _ask(address: str, secret: Callable[[], bytes]) -> Session:
    """Requests the session once; raises _NotThere, WrongSecret, or ConfigError if it cannot be joined."""
    host, _, port = address.rpartition(':')
    try:
        known = secret()
        tunnel = Tunnel(host.strip('[]'), int(port), known)
    except FileNotFoundError as error:
        raise _NotThere(f'there is no file {error.filename} with its secret') from error
    except OSError as error:
        raise _NotThere(error.strerror or str(error)) from error
    try:
        return _session(address, known, tunnel)
    except BaseException:
        tunnel.close()
        raise


def _session(address: str, secret: bytes, tunnel: Tunnel) -> Session:
    """Reads the session; raises the errors of `_ask`."""
    client = reverb.Client(tunnel.address)
    try:
        tables = client.server_info(timeout=_ANSWER_TIMEOUT_S)
    except Exception as error:  # Reverb's errors have no common base class.
        raise _NotThere(f'it does not answer ({error})') from error
    if SESSION not in tables or not tables[SESSION].current_size:
        raise _NotThere('the learner is starting')
    store = _session_store(client, secret, _ANSWER_TIMEOUT_S)
    try:
        _, text = store.latest()
    except ServerLost as error:
        raise _NotThere(str(error)) from error
    finally:
        store.close()
    try:
        session = json.loads(text.tobytes().rstrip(b'\0'))
        code, suffix, config, spec = (session[name] for name in ('code', 'suffix', 'config', 'spec'))
        fits = all(isinstance(value, str) for value in (code, suffix, spec)) and isinstance(config, dict)
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits or not _SUFFIX.fullmatch(suffix):
        raise ConfigError(f'the session of the learner at {address} cannot be read; install the same code on both')
    if code != code_version():
        raise ConfigError(
            f'the learner at {address} runs impala_jax {code}, and this machine {code_version()}; install the same '
            'code on both'
        )
    return Session(tunnel, client, items_key(secret, suffix), suffix, from_dict(config), spec)


class _Joined:
    """The actors of a joined learner, until it is lost."""

    def __init__(self, session: Session, config: Config, agent: Agent, num_actors: int):
        self.lost: str | None = None
        self._session = session
        self._share = share = host_share(config)
        self._agent = agent
        params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
        self._ends = [  # One queue and store per actor.
            (
                ReverbTrajectoryQueue(session.client, session.key, share, agent, session.suffix),
                ReverbParameterStore(session.client, session.key, params, share.timeout_s, PARAMETERS + session.suffix),
            )
            for _ in range(num_actors)
        ]
        self._closed = threading.Event()

    def act(self, stop: threading.Event) -> None:
        """Runs the actors until the learner is lost or `stop` is set; raises the error of an actor that fails."""
        # Each command starts at a random task, so that together they cover all tasks.
        first = secrets.randbelow(len(suites.tasks(self._share.environment)))
        task_ids = suites.take_turns(self._share.environment, len(self._ends), self._share.actor.num_envs, first)
        threads = NodeThreads(on_failure=self._close)
        try:
            threads.start('learner watcher', self._watch)
            for index, (queue, store) in enumerate(self._ends):
                threads.start(f'actor {index}', lambda args=(task_ids[index], queue, store): self._act(*args))
            while not (stop.is_set() or self._closed.wait(0.1)):
                pass
        finally:
            self._close()
            threads.join()

    def _act(self, task_ids: np.ndarray, queue: ReverbTrajectoryQueue, store: ReverbParameterStore) -> None:
        """Runs one actor."""
        # A random seed, so that actors differ, also from those before a reconnection.
        try:
            with contextlib.suppress(Closed):
                seed = secrets.randbits(31)
                actor = nodes.build_actor(self._share, self._agent, seed, task_ids, self._closed.is_set)
                run_actor(actor, queue, lambda: actor.policy(*store.latest()))
        except ServerLost as error:
            self._lose(str(error))

    def _watch(self) -> None:
        """Polls the learner, because an actor itself may wait for minutes before it gives up."""
        while not self._closed.wait(_WATCH_INTERVAL_S):
            try:
                tables = self._session.client.server_info(timeout=_ANSWER_TIMEOUT_S)
            except Exception as error:  # Reverb's errors have no common base class.
                self._lose(f'it does not answer ({error})')
                return
            if TRAJECTORIES + self._session.suffix not in tables:
                self._lose('it was restarted')
                return

    def _lose(self, reason: str) -> None:
        if not self._closed.is_set():
            self.lost = reason
            self._close()

    def _close(self) -> None:
        self._closed.set()
        for queue, store in self._ends:
            queue.close()
            store.close()
