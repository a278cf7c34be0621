"""Environments in worker processes, each of which steps its part one after the other."""

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
_BUSY_TIMEOUT_S = 0.5  # A worker that is still computing an answer does not notice that its pipe was closed.
_POLL_INTERVAL_S = 0.2  # Time between two checks whether the worker has died.
# Not `-m`, which would import this package before the parent's path is set.
_PROGRAM = (
    'import json, sys; sys.path[:] = json.loads(sys.argv[1]); '
    'from impala_jax.environments import worker; worker.main(int(sys.argv[2]), sys.argv[3])'
)


class _Died(base.EnvironmentFailure):
    """A worker process has died."""


class ProcessVectorEnvironment:
    """A `VectorEnvironment` over worker processes, with the same steps, seeds and states as `SerialVectorEnvironment`.

    A worker that dies is replaced, and its environments start new episodes. A worker that does not answer within
    `timeout_s` is an error. Each worker has its own folder for temporary files, which is removed when the worker ends.
    Neither workers nor processes started by their environments outlive this process.

    Args:
      config: The environment's name and settings.
      num_envs: Number of environments.
      seed: Seed from which each environment's own seed is derived.
      processes: Number of worker processes.
      evaluation: Whether the environments are for evaluation, see `environments.make`.
      timeout_s: Longest wait for a worker process, in seconds.
      max_episode_steps: Number of steps after which an episode is truncated; None for no limit.
      closed: Callable that returns True when the run has ended; waits then raise `Closed`.

    Raises:
      ConfigError: An environment cannot be built, lacks discrete actions, or differs from the first one.
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
        self._deaths = [0] * len(self._workers)  # since an environment of the worker last finished an episode
        try:
            for worker in self._workers:
                worker.start()
            specs: list[EnvironmentSpec] = self._request_all('spec')
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
        """See `VectorEnvironment.reset`."""
        return base.concatenate([timestep for timestep, _ in self._step_all('reset', None)])

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """See `VectorEnvironment.step`."""
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        results = self._step_all('step', actions)
        return base.concatenate([timestep for timestep, _ in results]), base.concatenate([info for _, info in results])

    def get_state(self) -> bytes:
        """See `VectorEnvironment.get_state`."""
        return plain_state.encode([state for states in self._request_all('get_states') for state in states])

    def set_state(self, state: bytes) -> None:
        """See `VectorEnvironment.set_state`."""
        states = plain_state.decode(state)
        if len(states) != self.num_envs:
            raise ConfigError(f'the state has {len(states)} environments, but there are {self.num_envs}')
        self._request_all('set_states', [states[part] for part in self._slices])

    def render(self) -> np.ndarray:
        """See `VectorEnvironment.render`."""
        self._workers[0].send('render')
        return self._workers[0].receive('render')

    def close(self) -> None:
        """See `VectorEnvironment.close`."""
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()

    def _request_all(self, request: str, arguments: list[Any] | None = None) -> list[Any]:
        for i, worker in enumerate(self._workers):
            worker.send(request, arguments[i] if arguments else None)
        answers, errors = [], []
        for worker in self._workers:  # All of them, even after an error, so that no answer is left in a pipe.
            try:
                answers.append(worker.receive(request))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def _step_all(self, request: str, actions: np.ndarray | None) -> list[tuple[TimeStep, StepInfo]]:
        """Steps or resets all workers concurrently; a worker that died is replaced and returns FIRST timesteps."""
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
                    raise _Died(worker.describe_exit())
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
                    f'{error}; it died {self._deaths[i]} times without finishing an episode in between'
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
    """The parent's handle of one worker process.

    This is not a multiprocessing.Process: a daemonic one cannot have children, and any other is joined without a
    time-out when the program exits. Either may be reaped by any thread that starts another process.
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
        self._awaiting_answer = False
        self._exit_deadline = 0.0  # time.monotonic()
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __str__(self) -> str:
        name = self._arguments.config.name
        return f'worker process of environments {self.part.start} to {self.part.stop - 1} of {name!r}'

    @property
    def pid(self) -> int | None:
        """The process id, or None if the process was not started or has been joined."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, in place of an earlier one if there was one, without waiting for it."""
        if self._process is not None:
            self.close()
            self.join()
        self._awaiting_answer = False
        home = own_folder()
        self._folder = tempfile.TemporaryDirectory(dir=home)
        ours, theirs = socket.socketpair()
        # Time-outs for sending and receiving, in case a worker stops in the middle of a message.
        bound = struct.pack('ll', int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, bound)
        self._connection = Connection(ours.detach())
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        try:
            with stopping.deferred():
                self._process = subprocess.Popen(  # The last argument describes the process in process listings.
                    [sys.executable, '-c', _PROGRAM, path, str(theirs.fileno()), self._folder.name, str(self)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    # For environments that use JAX: the accelerator is reserved for the learner.
                    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'TMPDIR': self._folder.name, PARENT: home},
                )
        finally:
            theirs.close()
        arguments = self._arguments._replace(generation=self._starts)
        self._starts += 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # The first request reports its death.
            self._connection.send(tuple(arguments))

    def send(self, request: str, argument: Any = None) -> None:
        """Sends a request without waiting for the answer."""
        if self._closed():
            raise Closed
        try:
            self._awaiting_answer = True
            self._connection.send((request, argument))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Died(self.describe_exit()) from error
        except BlockingIOError as error:
            raise self._timeout_error(request) from error

    def receive(self, request: str) -> Any:
        """Waits for the answer to `request`.

        Raises:
          Closed: The run has ended.
          TimeoutError: The worker did not answer within `timeout_s`.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            kind, content = self._next_message(request, deadline)
            self._awaiting_answer &= kind == LOG
            if kind == ANSWER:
                return content
            if kind == ERROR:
                error_type, text = content
                raise error_type(text)
            name, level, text = content
            logging.getLogger(name).log(level, '%s', text)

    def describe_exit(self) -> str:
        """Describes how the process died."""
        assert self._process is not None
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._end()
        code = self._process.returncode or 0
        by = f' ({signal.Signals(-code).name})' if code < 0 else ''
        return f'the {self} died with exit code {code}{by}'

    def close(self) -> None:
        """Closes the pipe, which ends the process."""
        self._exit_deadline = time.monotonic() + (_BUSY_TIMEOUT_S if self._awaiting_answer else _CLOSE_TIMEOUT_S)
        if self._connection is not None:
            self._connection.close()

    def join(self) -> None:
        """Waits a few seconds for a closed process to end, then kills it together with its remaining children."""
        if self._process is None:
            return
        while not self._has_ended() and time.monotonic() < self._exit_deadline:
            time.sleep(0.01)
        self._end()
        self._process = None
        if self._folder is not None:
            try:
                self._folder.cleanup()
            except OSError as error:
                _logger.warning('temporary files of the %s cannot be removed: %s', self, base.one_line(error))
            self._folder = None

    def _next_message(self, request: str, deadline: float) -> tuple[str, Any]:
        try:
            while not self._connection.poll(max(0.0, min(_POLL_INTERVAL_S, deadline - time.monotonic()))):
                # The pipe may stay open in the worker's children.
                if self._has_ended() and not self._connection.poll(0):
                    raise _Died(self.describe_exit())
                if self._closed():
                    raise Closed
                if time.monotonic() >= deadline:
                    raise self._timeout_error(request)
            return self._connection.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            raise _Died(self.describe_exit()) from error
        except BlockingIOError as error:
            raise self._timeout_error(request) from error

    def _timeout_error(self, request: str) -> TimeoutError:
        return TimeoutError(
            f'waited {self._timeout_s:g} s for the {self} to answer {request!r}; raise timeout_s if it is only slow'
        )

    def _has_ended(self) -> bool:
        """Whether the process has ended. It stays a zombie, so that its id is not reused, until `_end`."""
        assert self._process is not None
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # The calling program has reaped the process itself.
            return True

    def _end(self) -> None:
        """Kills the process and the rest of its session, and reaps it."""
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # Its session may not exist yet.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            if self._folder is not None:
                kill_marked(f'TMPDIR={self._folder.name}')
            try:
                self._process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _logger.warning('the %s (process %d) does not end although it was killed', self, self._process.pid)
