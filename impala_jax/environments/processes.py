"""Environments spread over worker processes, each stepping its own one after the other."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import base
from impala_jax.environments.factories import environment_factory
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import EnvironmentSpec, StepInfo, TimeStep

_logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0


class _Died(base.EnvironmentFailure):
    """A worker process is gone."""


class ProcessVectorEnvironment:
    """A `VectorEnvironment` over worker processes; steps, seeds and states are those of `SerialVectorEnvironment`.

    A worker that dies is replaced, and its environments begin anew; one that is silent for `timeout_s` is an error.
    Each has a folder for temporary files of its own, which goes when the worker does, however that ends.

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
    ):
        self.num_envs = num_envs
        self._name = config.name
        self._max_failures = config.max_failures
        bounds = np.linspace(0, num_envs, min(processes, num_envs) + 1).astype(int).tolist()
        self._slices = [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        self._workers = [_Worker(config, part, seed, evaluation, timeout_s) for part in self._slices]
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
        return pickle.dumps([state for states in self._ask_all('get_states') for state in states])

    def set_state(self, state: bytes) -> None:
        states = pickle.loads(state)
        if len(states) != self.num_envs:
            raise ConfigError(f'the state is of {len(states)} environments, but there are {self.num_envs}')
        self._ask_all('set_states', [states[part] for part in self._slices])

    def render(self) -> np.ndarray:
        self._workers[0].send('render')
        return self._workers[0].receive('render')

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for worker in self._workers:
            worker.join(deadline)

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
            if not np.isnan(result[1].episode_return).all():
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
    """This side of one worker process."""

    def __init__(self, config: EnvironmentConfig, part: slice, seed: int, evaluation: bool, timeout_s: float):
        self.part = part
        self._arguments = (config, part.stop - part.start, seed, evaluation, part.start)
        self._timeout_s = timeout_s
        self._starts = 0
        self._process: Any = None
        self._connection: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __str__(self) -> str:
        name = self._arguments[0].name
        return f'worker process of environments {self.part.start} to {self.part.stop - 1} of {name!r}'

    def start(self) -> None:
        """Starts the process, anew if need be, without waiting for it."""
        if self._process is not None:
            self.close()
            self.join(time.monotonic() + _CLOSE_TIMEOUT_S)
        context = multiprocessing.get_context('spawn')  # JAX and fork deadlock.
        self._connection, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix='impala_jax_')
        self._process = context.Process(
            target=_work,
            args=(theirs, self._folder.name, *self._arguments, self._starts),
            name=str(self),
            daemon=True,
        )
        self._starts += 1
        # An interrupt of the whole process group is this process's business; blocked signals are inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            with _without_main():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def send(self, request: str, argument: Any = None) -> None:
        try:
            self._connection.send((request, argument))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Died(self.obituary()) from error

    def receive(self, request: str) -> Any:
        """The answer to `request`."""
        try:
            if not self._connection.poll(self._timeout_s):
                raise TimeoutError(f'waited {self._timeout_s:g} s for the {self} to answer {request!r}')
            error_type, answer = self._connection.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            raise _Died(self.obituary()) from error
        if error_type is not None:
            raise error_type(answer)
        return answer

    def obituary(self) -> str:
        """Says that the process died, and of what."""
        self._process.join(_CLOSE_TIMEOUT_S)
        return f'the {self} died with exit code {self._process.exitcode}'

    def close(self) -> None:
        """Tells the process to end: its pipe ends."""
        if self._connection is not None:
            self._connection.close()

    def join(self, deadline: float) -> None:
        """Waits for the process until `deadline`, then kills it."""
        if self._process is None:
            return
        if self._process.pid is not None:
            self._process.join(max(0.0, deadline - time.monotonic()))
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process.close()
        self._process = None
        if self._folder is not None:
            try:
                self._folder.cleanup()
            except OSError as error:
                _logger.warning('temporary files of the %s stay: %s', self, base.one_line(error))
            self._folder = None


_main_lock = threading.Lock()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started here do not run the program's script, as spawn would have them do.

    A script in launch/ loads JAX, which no environment needs, and which is most of a worker's memory and start.
    """
    with _main_lock:
        main = sys.modules['__main__']
        sys.modules['__main__'] = types.ModuleType('__main__')
        try:
            yield
        finally:
            sys.modules['__main__'] = main


def _work(
    connection: Connection,
    folder: str,
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    evaluation: bool,
    first_index: int,
    generation: int,
) -> None:
    """The worker process: builds its environments, and answers requests until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['JAX_PLATFORMS'] = 'cpu'  # for an environment that uses JAX: the accelerator is the learner's
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    environment: SerialVectorEnvironment | None = None
    failure: tuple[type[Exception], str] | None = None
    try:
        environment = SerialVectorEnvironment(
            environment_factory(config, evaluation),
            num_envs,
            seed,
            name=config.name,
            max_failures=config.max_failures,
            first_index=first_index,
            generation=generation,
        )
    except Exception as error:
        failure = _portable(error)
    # The other side may end while this one writes or reads.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request, argument = connection.recv()
            answer: Any = None
            if environment is not None:
                try:
                    answer = _answer(environment, request, argument)
                    failure = None
                except Exception as error:
                    failure = _portable(error)
            connection.send((None, answer) if failure is None else failure)
    if environment is not None:
        environment.close()
    shutil.rmtree(folder, ignore_errors=True)  # The parent, if it still lives, tries too, and reports what stays.


def _answer(environment: SerialVectorEnvironment, request: str, argument: Any) -> Any:
    if request == 'spec':
        return environment.spec
    if request == 'reset':
        return environment.restart()
    return getattr(environment, request)(*(() if argument is None else (argument,)))


def _portable(error: Exception) -> tuple[type[Exception], str]:
    """An error's type, of those that callers know, and its message, with the traceback where that is the message."""
    if isinstance(error, (ConfigError, NotImplementedError)):
        return type(error), str(error)
    text = ''.join(traceback.format_exception(error))
    return base.EnvironmentFailure, f'{error}\n\nIn the worker process:\n{text}'
