"""Environments spread over worker processes, each stepping its own one after the other."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import base
from impala_jax.environments.worker import ANSWER, ERROR, LOG, Arguments
from impala_jax.rundir import plain_state
from impala_jax.system import stopping
from impala_jax.system.machine import PARENT, kill_marked, own_folder
from impala_jax.types import Closed, EnvironmentSpec, StepInfo, TimeStep

_logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0
_BUSY_TIMEOUT_S = 0.5  # A worker that owes an answer does not hear that it is to end.
_LOOK_S = 0.2  # How long a wait goes on before it looks whether the worker has died.
# Not `-m`, which would search this package before it has the parent's path.
_PROGRAM = (
    'import json, sys; sys.path[:] = json.loads(sys.argv[1]); '
    'from impala_jax.environments import worker; worker.main(int(sys.argv[2]), sys.argv[3])'
)


class _Died(base.EnvironmentFailure):
    """A worker process is gone."""


class ProcessVectorEnvironment:
    """A `VectorEnvironment` over worker processes; steps, seeds and states are those of `SerialVectorEnvironment`.

    A worker that dies is replaced, and its environments start new episodes. One that is silent for `timeout_s` is an
    error. Each has its own folder for temporary files, which is removed when the worker ends. No worker, and no process
    that its environments started, outlives this process. Once `closed()`, waits end with `Closed`.

    Raises:
      ConfigError: as `SerialVectorEnvironment`.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        num_envs: int,
        seed: int,
        *,
        processes: int,
        evaluation: bool = False,
        timeout_s: float = 300.0,
        max_episode_steps: int | None = None,
        closed: Callable[[], bool] = lambda: False,
    ):
        self.num_envs = num_envs
        self._name = config.name
        self._max_failures = config.max_failures
        bounds = np.linspace(0, num_envs, min(processes, num_envs) + 1).astype(int).tolist()
        self._slices = [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        self._workers = [
            _Worker(config, part, seed, evaluation, timeout_s, max_episode_steps, closed) for part in self._slices
        ]
        self._deaths = [0] * len(self._workers)  # since one of the worker's environments last finished an episode
        try:
            for worker in self._workers:
                worker.start()
            specs: list[EnvironmentSpec] = self._ask_all('spec')
            self.spec = specs[0]
            for part, other in zip(self._slices, specs, strict=True):
                base.require_same_spec(self._name, self.spec, part.start, other)
        except _Died as error:
            self.close()
            raise ConfigError(f'environment {self._name!r} cannot be built: {error}') from error
        except BaseException:
            self.close()
            raise

    def reset(self) -> TimeStep:
        return base.concatenate([timestep for timestep, _ in self._step_all('reset', None)])

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        results = self._step_all('step', actions)
        return base.concatenate([timestep for timestep, _ in results]), base.concatenate([info for _, info in results])

    def get_state(self) -> bytes:
        return plain_state.encode([state for states in self._ask_all('get_states') for state in states])

    def set_state(self, state: bytes) -> None:
        states = plain_state.decode(state)
        if len(states) != self.num_envs:
            raise ConfigError(f'the state is of {len(states)} environments, but there are {self.num_envs}')
        self._ask_all('set_states', [states[part] for part in self._slices])

    def render(self) -> np.ndarray:
        self._workers[0].send('render')
        return self._workers[0].receive('render')

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()

    def _ask_all(self, request: str, arguments: list[Any] | None = None) -> list[Any]:
        for i, worker in enumerate(self._workers):
            worker.send(request, arguments[i] if arguments else None)
        answers, errors = [], []
        for worker in self._workers:  # All of them, even after an error: nobody else may find these answers later.
            try:
                answers.append(worker.receive(request))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def _step_all(self, request: str, actions: np.ndarray | None) -> list[tuple[TimeStep, StepInfo]]:
        """All workers work at once; one that died is replaced, and answers with first timesteps."""
        dead = set()
        for i, worker in enumerate(self._workers):
            try:
                worker.send(request, None if actions is None else actions[worker.part])
            except _Died:
                dead.add(i)
        results = []
        for i, worker in enumerate(self._workers):
            try:
                if i in dead:
                    raise _Died(worker.obituary())
                result = worker.receive(request)
            except _Died as error:
                result = self._replace(i, error)
            if result[1].episode_ended.any():
                self._deaths[i] = 0
            results.append(result)
        return results

    def _replace(self, i: int, error: _Died) -> tuple[TimeStep, StepInfo]:
        worker = self._workers[i]
        while True:
            self._deaths[i] += 1
            if self._deaths[i] >= self._max_failures:
                raise base.EnvironmentFailure(
                    f'{error}; that was {self._deaths[i]} times without an episode finished in between'
                ) from error
            _logger.warning('%s; it is replaced', error)
            try:
                worker.start()
                worker.send('reset')
                timestep, info = worker.receive('reset')
                return timestep, info._replace(restarts=np.ones_like(info.restarts))
            except _Died as next_error:
                error = next_error


class _Worker:
    """This side of one worker process.

    Not a multiprocessing.Process: a daemonic one may have no children, and any other is joined without end when this
    program ends. Both are reaped by whichever thread starts the next one.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        part: slice,
        seed: int,
        evaluation: bool,
        timeout_s: float,
        max_episode_steps: int | None,
        closed: Callable[[], bool],
    ):
        self.part = part
        self._arguments = Arguments(
            config, part.stop - part.start, seed, evaluation, max_episode_steps, part.start, generation=0
        )
        self._timeout_s = timeout_s
        self._closed = closed
        self._asked = False  # and not answered yet
        self._ends_until = 0.0  # time.monotonic()
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __str__(self) -> str:
        name = self._arguments.config.name
        return f'worker process of environments {self.part.start} to {self.part.stop - 1} of {name!r}'

    @property
    def pid(self) -> int | None:
        """The process's id while it has not been joined."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, again if there was one, without waiting for it."""
        if self._process is not None:
            self.close()
            self.join()
        self._asked = False
        home = own_folder()
        self._folder = tempfile.TemporaryDirectory(dir=home)
        ours, theirs = socket.socketpair()
        # A worker that is stopped in the middle of a message holds nobody up for longer.
        bound = struct.pack('ll', int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, bound)
        self._connection = Connection(ours.detach())
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        try:
            with stopping.deferred():
                self._process = subprocess.Popen(  # The last argument shows in lists of processes.
                    [sys.executable, '-c', _PROGRAM, path, str(theirs.fileno()), self._folder.name, str(self)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    # For an environment that uses JAX: the accelerator is the learner's.
                    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'TMPDIR': self._folder.name, PARENT: home},
                )
        finally:
            theirs.close()
        arguments = self._arguments._replace(generation=self._starts)
        self._starts += 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # The first request reports its death.
            self._connection.send(tuple(arguments))

    def send(self, request: str, argument: Any = None) -> None:
        if self._closed():
            raise Closed
        try:
            self._asked = True
            self._connection.send((request, argument))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Died(self.obituary()) from error
        except BlockingIOError as error:
            raise self._silent(request) from error

    def receive(self, request: str) -> Any:
        """The answer to `request`.

        Raises:
          Closed: The run has ended.
          TimeoutError: There was none within `timeout_s`.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            kind, content = self._next_message(request, deadline)
            self._asked &= kind == LOG
            if kind == ANSWER:
                return content
            if kind == ERROR:
                error_type, text = content
                raise error_type(text)
            name, level, text = content
            logging.getLogger(name).log(level, '%s', text)

    def obituary(self) -> str:
        """Says that the process died, and of what."""
        assert self._process is not None
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._end()
        code = self._process.returncode or 0
        by = f' ({signal.Signals(-code).name})' if code < 0 else ''
        return f'the {self} died with exit code {code}{by}'

    def close(self) -> None:
        """Tells the process to end: its pipe ends."""
        self._ends_until = time.monotonic() + (_BUSY_TIMEOUT_S if self._asked else _CLOSE_TIMEOUT_S)
        if self._connection is not None:
            self._connection.close()

    def join(self) -> None:
        """Waits for a process that was closed, for some seconds, then kills it, with the processes that it has left."""
        if self._process is None:
            return
        while not self._has_ended() and time.monotonic() < self._ends_until:
            time.sleep(0.01)
        self._end()
        self._process = None
        if self._folder is not None:
            try:
                self._folder.cleanup()
            except OSError as error:
                _logger.warning('temporary files of the %s stay: %s', self, base.one_line(error))
            self._folder = None

    def _next_message(self, request: str, deadline: float) -> tuple[str, Any]:
        try:
            while not self._connection.poll(max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
                # Its children may hold the pipe open.
                if self._has_ended() and not self._connection.poll(0):
                    raise _Died(self.obituary())
                if self._closed():
                    raise Closed
                if time.monotonic() >= deadline:
                    raise self._silent(request)
            return self._connection.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            raise _Died(self.obituary()) from error
        except BlockingIOError as error:
            raise self._silent(request) from error

    def _silent(self, request: str) -> TimeoutError:
        return TimeoutError(
            f'waited {self._timeout_s:g} s for the {self} to answer {request!r}; raise timeout_s if it is only slow'
        )

    def _has_ended(self) -> bool:
        """Whether the process has ended. It stays a zombie, whose id nobody else gets, until `_end`."""
        assert self._process is not None
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # The program reaps all of its children itself.
            return True

    def _end(self) -> None:
        """Kills the process if it still lives, and what it has left in its session, and reaps it."""
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # It has not made its session yet.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            if self._folder is not None:
                kill_marked(f'TMPDIR={self._folder.name}')
            try:
                self._process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _logger.warning('the %s (process %d) does not end although it was killed', self, self._process.pid)
