"""The nodes that run in processes of Ray, on this machine or another one."""

from __future__ import annotations

import socket
import threading
from typing import Any, NamedTuple

import jax

from impala_jax.actor import Actor
from impala_jax.build import make_agent
from impala_jax.config import Config
from impala_jax.environments import suites
from impala_jax.evaluation.evaluator import Evaluation, Evaluator
from impala_jax.kernels import allocator, compilation_cache
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import HostShare
from impala_jax.system.quiet import quiet_libraries
from impala_jax.types import EnvironmentSpec, PyTree, Trajectory


class Setup(NamedTuple):
    """Arguments common to all nodes."""

    config: Config
    share: HostShare
    spec: EnvironmentSpec
    version: str  # Of the code, in the learner's process (`code_version`).


class Failure(NamedTuple):
    """Result of a call that failed. Ray would wrap an exception, and cannot return every one."""

    message: str  # See `nodes.final_message`.


class RemoteActor:
    """An actor; its environments are built by the first unroll.

    Args:
      setup: Settings of the run.
      index: Index of the actor, which determines its tasks and seed.
      generation: Number of actors with this index before; they have died.
    """

    def __init__(self, setup: Setup, index: int, generation: int):
        self._setup = setup
        self._index = index
        self._generation = generation
        self._actor: Actor | None = None

    def unroll(self, version: int, params: PyTree) -> Trajectory | Failure:
        """Acts for T steps with one set of parameters.

        Args:
          version: Version of the parameters: the number of learner updates.
          params: Parameters of the agent.
        """
        try:
            if self._actor is None:
                self._actor = self._build(version)
            return self._actor.unroll(version, params)
        except BaseException as error:  # noqa: BLE001 - reported by the learner's process.
            return Failure(nodes.final_message(error))

    def _build(self, version: int) -> Actor:
        share = self._setup.share
        agent = _prepare(self._setup)
        # Episodes of a resumed run, or of an actor that replaces another, are new ones.
        path = (0, self._index, version, self._generation) if self._generation else (0, self._index, version)
        task_ids = suites.take_turns(share.environment, self._index + 1, share.actor.num_envs)[self._index]
        return nodes.build_actor(share, agent, share.node_seed(*path), task_ids)


class RemoteEvaluator:
    """An evaluator.

    Args:
      setup: Settings of the run.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._evaluator: Evaluator | None = None

    def play(self, version: int, params: PyTree) -> Evaluation | Failure:
        """See `Evaluator.play`."""
        try:
            if self._evaluator is None:
                self._evaluator = nodes.make_evaluator(self._setup.config, _prepare(self._setup), threading.Event())
            return self._evaluator.play(version, params)
        except BaseException as error:  # noqa: BLE001 - reported by the learner's process.
            return Failure(nodes.final_message(error))


def code_here() -> str:
    """Returns the version of the code on the machine that calls it."""
    return code_version()


def different_code(host: str, version: str, expected: str) -> str:
    """Returns the refusal of a machine whose code differs from the learner's."""
    return (
        f"machine {host} of the Ray cluster has impala_jax {version}, and the learner's machine {expected}; install "
        'the same code on both'
    )


def _prepare(setup: Setup) -> Any:
    """Prepares the process of a node; returns the agent."""
    if code_version() != setup.version:  # The machine joined the cluster after the run had begun.
        raise nodes.NodeFailure(f'error: {different_code(socket.gethostname(), code_version(), setup.version)}')
    jax.config.update('jax_platforms', 'cpu')
    quiet_libraries()
    allocator.configure_allocator()
    compilation_cache.enable_cache()
    return make_agent(setup.config.network, setup.spec, setup.config.popart.enabled)
