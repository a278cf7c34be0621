"""Environments that end, hold up or fill the process that they live in; all but the last three cannot be built."""

import os
import subprocess
import sys
import time

from impala_jax.environments.catch import Catch


def exits(seed):
    sys.exit(0)


def aborts(seed):
    os.abort()


def vanishes(seed):
    os._exit(0)


def hangs(seed):
    time.sleep(600)


def interrupts(seed):
    raise KeyboardInterrupt


class Starts(Catch):
    """Has a child process, as a simulator, which ignores what a terminal sends; its id is the first pixel."""

    def __init__(self, seed, session=False):
        super().__init__(seed=seed)
        code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'
        self.simulator = subprocess.Popen([sys.executable, '-c', code], start_new_session=session)

    def _observation(self):
        board = super()._observation()
        board[0, 0] = self.simulator.pid
        return board


def starts(seed):
    return Starts(seed)


def starts_a_session(seed):
    """As launchers of game engines and browsers do: signals to the worker's group do not reach the child."""
    return Starts(seed, session=True)


class Multiprocesses(Catch):
    """Asks a multiprocessing.Process for its actions' legality."""

    def __init__(self, seed):
        import multiprocessing

        super().__init__(seed=seed)
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_echo, args=(theirs,))
        self.process.start()
        theirs.close()

    def step(self, action):
        self.pipe.send(int(action))
        return super().step(self.pipe.recv())

    def close(self):
        self.pipe.close()
        self.process.join(5)


def _echo(pipe):
    try:
        while True:
            pipe.send(pipe.recv())
    except EOFError:
        return


def multiprocesses(seed):
    return Multiprocesses(seed)


class ExitsLater(Catch):
    """Calls sys.exit at its third step."""

    num_steps = 0

    def step(self, action):
        self.num_steps += 1
        if self.num_steps == 3:
            sys.exit(0)
        return super().step(action)


def exits_later(seed):
    return ExitsLater(seed=seed)


class HangsLater(Catch):
    """Hangs in its third step."""

    num_steps = 0

    def step(self, action):
        self.num_steps += 1
        if self.num_steps == 3:
            time.sleep(600)
        return super().step(action)


def hangs_later(seed):
    return HangsLater(seed=seed)


class Endless(Catch):
    """A game without an end."""

    def step(self, action):
        timestep = super().step(action)
        if timestep.last():
            return self.reset()._replace(step_type=1, reward=timestep.reward, discount=1.0)
        return timestep


def endless(seed):
    return Endless(seed=seed)
