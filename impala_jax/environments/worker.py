"""The worker process of `ProcessVectorEnvironment`: builds environments and answers requests until its pipe is closed.

The process has its own session, so signals to the run's process group do not reach it, and it may start children. It
ends with the process that started it, however that process ends, and kills its own children.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import base
from impala_jax.environments.factories import environment_factory
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.system import stopping
from impala_jax.system.machine import kill_marked

LOG, ANSWER, ERROR = 'log', 'answer', 'error'
"""Kinds of messages from a worker. Their contents: (logger name, level, text); any object; (exception type, text)."""


class Arguments(NamedTuple):
    """The environments that a worker builds."""

    config: EnvironmentConfig
    num_envs: int
    seed: int
    evaluation: bool
    max_episode_steps: int | None
    first_index: int  # index of its first environment in the whole vector
    generation: int  # number of times that the worker was replaced


def main(pipe: int, folder: str) -> None:
    """Runs the worker.

    Args:
      pipe: File descriptor for requests and answers.
      folder: Folder for temporary files; removed at the end.
    """
    for number in stopping.SIGNALS:
        # Only the parent reacts to these signals. A handler is used because child programs would inherit SIG_IGN.
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    connection = Connection(pipe)
    lock = threading.Lock()

    def send(kind: str, content: Any) -> None:
        with lock:
            connection.send((kind, content))

    logging.getLogger().addHandler(_ToParent(send))
    # The parent may end at any time.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _answer_requests(connection, send)
    shutil.rmtree(folder, ignore_errors=True)  # If the parent still runs, it tries again and reports errors.
    sys.stdout.flush()
    sys.stderr.flush()
    kill_marked(f'TMPDIR={folder}')  # Processes that the environments left running; the parent may have ended.
    os.killpg(0, signal.SIGKILL)


def _answer_requests(connection: Connection, send: Any) -> None:
    arguments = Arguments(*connection.recv())
    environment: SerialVectorEnvironment | None = None
    failure: tuple[type[Exception], str] | None = None
    try:
        environment = SerialVectorEnvironment(
            environment_factory(arguments.config, arguments.evaluation),
            arguments.num_envs,
            arguments.seed,
            name=arguments.config.name,
            max_failures=arguments.config.max_failures,
            first_index=arguments.first_index,
            generation=arguments.generation,
            max_episode_steps=arguments.max_episode_steps,
        )
    except ConfigError as error:
        failure = _portable(error)
    except base.RAISED_BY_ENVIRONMENTS as error:  # The environment's module cannot be imported.
        failure = ConfigError, f'environment {arguments.config.name!r} cannot be built: {base.one_line(error)}'
    try:
        while True:
            request, argument = connection.recv()
            answer: Any = None
            if environment is not None:
                try:
                    answer = _answer(environment, request, argument)
                    failure = None
                except base.RAISED_BY_ENVIRONMENTS as error:
                    failure = _portable(error)
            if failure is None:
                send(ANSWER, answer)
            else:
                send(ERROR, failure)
    finally:
        if environment is not None:
            environment.close()


def _answer(environment: SerialVectorEnvironment, request: str, argument: Any) -> Any:
    if request == 'spec':
        return environment.spec
    if request == 'reset':
        return environment.restart()
    return getattr(environment, request)(*(() if argument is None else (argument,)))


def _portable(error: BaseException) -> tuple[type[Exception], str]:
    """Returns a type that callers know and the message: the environment's traceback and a summary as the last line."""
    if isinstance(error, (ConfigError, NotImplementedError)):
        return type(error), str(error)
    if isinstance(error, base.EnvironmentFailure):
        reason, error = str(error), error.__cause__ or error
    else:
        reason = base.one_line(error)
    if isinstance(error, base.Violation):
        return base.EnvironmentFailure, reason  # The traceback would only show this package.
    text = ''.join(traceback.format_exception(error))
    return base.EnvironmentFailure, f'in the worker process:\n{text}{reason}'


class _ToParent(logging.Handler):
    """Sends warnings to the parent, whose log the user reads."""

    def __init__(self, send: Any):
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            self._send(LOG, (record.name, record.levelno, self.format(record)))
        except (BrokenPipeError, ConnectionResetError):
            print(self.format(record), file=sys.stderr)
