"""Actors of other machines: they join a learner over its Reverb server, and outlive it.

The learner announces its session in a table of that server: its configuration, what the environment looks like, and
which code it runs. `launch/actors.py` reads it, refuses what does not fit, and then does what any actor does. Nothing
else crosses than Reverb's tensors, and JSON in one of them; both ends prove that they know a secret before that
(`gate`), and the keys of all seals are derived from it.
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
from impala_jax.runtimes.gate import Way, WrongSecret
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.reverb_items import ServerLost
from impala_jax.runtimes.reverb_tables import PARAMETERS, SESSION, TRAJECTORIES
from impala_jax.runtimes.reverb_transport import ReverbParameterStore, ReverbTrajectoryQueue
from impala_jax.runtimes.threads import NodeThreads
from impala_jax.types import Closed, EnvironmentSpec, Trajectory

_logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5  # How long a learner may take to answer a question about its tables.
_WATCH_INTERVAL_S = 3.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
_MAX_REFUSALS = 6  # In a row, within 8 to 16 s: a connection that damages what it carries looks like another secret.
_SESSION_BYTES = 1 << 18  # JSON, then zeros
_SUFFIX = re.compile(r'-[0-9a-z]{1,64}')


class Session(NamedTuple):
    """What a learner tells of itself, and a connection to it."""

    way: Way
    client: reverb.Client
    key: bytes  # of the seals of trajectories and parameters
    suffix: str  # of its tables' names
    config: Config
    spec: str  # of the environment


class _NotThere(Exception):
    """No learner can be joined there now; one may come."""


def items_key(secret: bytes, suffix: str) -> bytes:
    """The key of a start's trajectories and parameters; `suffix` is that of its tables' names."""
    return seals.derived_key(secret, 'items', suffix)


def announce(
    client: reverb.Client, secret: bytes, config: Config, spec: EnvironmentSpec, suffix: str
) -> ReverbParameterStore:
    """Lets actors join, until what it returns is closed.

    Args:
      client: of the server with the run's tables.
      secret: as the actors have it.
      config: the experiment.
      spec: of its environment.
      suffix: of the tables' names.

    Raises:
      ServerLost: it cannot be written to.
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
    """`fetch` that outlasts its time-outs, and says so: where all actors are elsewhere, they may come late."""

    def wait() -> Trajectory:
        while True:
            try:
                return fetch()
            except TimeoutError as error:
                _logger.warning('%s; all actors are on other machines, and the learner goes on waiting', error)

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
    """Acts for the learner at `address` until `stop` is set; looks for it again whenever it is lost.

    Args:
      address: HOST:PORT of a program with `config.serve_actors`.
      num_actors: threads, each with its own environments.
      stop: ends all within seconds.
      secret: gives what the learner and its actors share; FileNotFoundError where that is not there yet.
      adapt: makes the configuration to act with from the learner's; only how a run is executed may differ.
      imports: code of the user's own, each `module:name`, that the learner's configuration may name.
      wait_s: how long to look for a learner that is not there.

    Raises:
      ConfigError: the learner refuses these actors: another secret, code or environment, or something else than a
        learner; or its configuration names code that is not among `imports`.
      NodeFailure: there was no learner for `wait_s`.
      Exception: whatever ended an actor.
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
            session.way.close()
        if joined.lost is not None:
            print(f'lost the learner at {address}: {joined.lost}; looking for it again', flush=True)
        # Connections that fail wait longer and longer, also for those made later, until the last of them is gone.
        del session, joined


def code_of(config: Config) -> dict[str, str]:
    """The user's own code, `module:name`, that actors of this configuration import, by the fields that name it."""
    values = to_flat_dict(config)
    fields = ('environment.name', 'network.torso', 'network.core', 'network.module')
    return {field: values[field] for field in fields if ':' in (values[field] or '')}


def _join(
    session: Session, address: str, num_actors: int, adapt: Callable[[Config], Config], imports: Collection[str]
) -> _Joined:
    """Raises: ConfigError: these actors do not fit the learner."""
    for option, name in code_of(session.config).items():
        if name not in imports:
            raise ConfigError(
                f'the learner at {address} uses code that is not of impala_jax, {name!r}, and nobody here has said '
                f'that it may be imported; add --{option} {name} if you trust it'
            )
    config = adapt(session.config)
    changed = differences(session.config, config, 'at the learner')
    if changed:
        raise ConfigError(f'what is learned is set at the learner alone: {"; ".join(changed)}')
    spec = environments.spec(config.environment, config.timeout_s)
    if str(spec) != session.spec:
        raise ConfigError(
            f'environment {config.environment.name!r} is not the one of the learner at {address}, which has '
            f'{session.spec}; here it has {spec}; install the same versions of its packages'
        )
    joined = _Joined(session, config, make_agent(config.network, spec, config.popart.enabled), num_actors)
    print(
        f'joined the learner at {address}: {config.environment.name}, {num_actors} actors of '
        f'{config.actor.num_envs} environments',
        flush=True,
    )
    return joined


def _find(
    address: str, secret: Callable[[], bytes], stop: threading.Event, wait_s: float, joined_before: bool
) -> Session | None:
    """The learner's session, asked for again and again, ever less often; None once `stop` is set.

    Raises: NodeFailure: there was none for `wait_s`; ConfigError: what is there cannot be joined.
    """
    deadline = time.monotonic() + wait_s
    longest = _FIRST_WAIT_S
    num_refusals = 0
    while not stop.is_set():
        try:
            return _ask(address, secret)
        except (_NotThere, WrongSecret) as reason:
            # After a first join the secret was right: something else listens there while the learner is gone.
            num_refusals = num_refusals + 1 if isinstance(reason, WrongSecret) and not joined_before else 0
            left = deadline - time.monotonic()
            if num_refusals == _MAX_REFUSALS or (num_refusals and left <= 0):
                raise ConfigError(
                    f'the learner at {address} cannot be joined: {reason}; give the secret of its start'
                ) from reason
            if left <= 0:
                raise NodeFailure(f'no learner at {address} for {wait_s:g} s: {reason}') from None
            # Not all at once, after a learner that thousands have lost together.
            pause = min(random.uniform(0.5, 1.0) * longest, left)
            print(f'no learner at {address} yet: {reason}; next try in {pause:.1f} s', flush=True)
            stop.wait(pause)
            longest = min(2 * longest, _LONGEST_WAIT_S)
    return None


def _ask(address: str, secret: Callable[[], bytes]) -> Session:
    """Raises: _NotThere; WrongSecret; ConfigError: what is there cannot be joined."""
    host, _, port = address.rpartition(':')
    try:
        known = secret()
        way = Way(host.strip('[]'), int(port), known)
    except FileNotFoundError as error:
        raise _NotThere(f'there is no file {error.filename} with its secret') from error
    except OSError as error:
        raise _NotThere(error.strerror or str(error)) from error
    try:
        return _session(address, known, way)
    except BaseException:
        way.close()
        raise


def _session(address: str, secret: bytes, way: Way) -> Session:
    """Raises: as `_ask`."""
    client = reverb.Client(way.address)
    try:
        tables = client.server_info(timeout=_ANSWER_TIMEOUT_S)
    except Exception as error:  # Reverb's errors share no base class.
        raise _NotThere(f'nobody answers ({error})') from error
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
        raise ConfigError(f'what the learner at {address} tells of itself makes no sense here; install the same code')
    if code != code_version():
        raise ConfigError(
            f'the learner at {address} runs impala_jax {code}, and this machine {code_version()}; install the same '
            'code on both'
        )
    return Session(way, client, items_key(secret, suffix), suffix, from_dict(config), spec)


class _Joined:
    """A learner that was joined, for as long as it is there."""

    def __init__(self, session: Session, config: Config, agent: Agent, num_actors: int):
        self.lost: str | None = None
        self._session = session
        self._share = share = host_share(config)
        self._agent = agent
        params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
        self._ends = [  # of each actor
            (
                ReverbTrajectoryQueue(session.client, session.key, share, agent, session.suffix),
                ReverbParameterStore(session.client, session.key, params, share.timeout_s, PARAMETERS + session.suffix),
            )
            for _ in range(num_actors)
        ]
        self._closed = threading.Event()

    def act(self, stop: threading.Event) -> None:
        """Acts until the learner is lost or `stop` is set; raises whatever else ended an actor."""
        # Each command takes its turns from another task on, so that all of them together leave none out.
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
        """The life of one actor."""
        # A seed that no other actor has, nor an earlier life of this one.
        try:
            with contextlib.suppress(Closed):
                seed = secrets.randbits(31)
                actor = nodes.build_actor(self._share, self._agent, seed, task_ids, self._closed.is_set)
                run_actor(actor, queue, lambda: actor.policy(*store.latest()))
        except ServerLost as error:
            self._lose(str(error))

    def _watch(self) -> None:
        """Asks for the learner's tables every so often: an actor itself may wait for minutes before it gives up."""
        while not self._closed.wait(_WATCH_INTERVAL_S):
            try:
                tables = self._session.client.server_info(timeout=_ANSWER_TIMEOUT_S)
            except Exception as error:  # Reverb's errors share no base class.
                self._lose(f'it does not answer ({error})')
                return
            if TRAJECTORIES + self._session.suffix not in tables:
                self._lose('it was started anew')
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
