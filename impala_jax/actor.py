"""The actor: steps a vector of environments with one batched inference per step, and returns trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from impala_jax import frame_stacks
from impala_jax.agent import Agent, AgentStep, dummy_timestep
from impala_jax.config import ConfigError
from impala_jax.environments import EnvironmentFailure, VectorEnvironment
from impala_jax.rundir import plain_state
from impala_jax.trajectory_queue import TrajectoryQueue
from impala_jax.types import FIRST, Array, Closed, EnvironmentSpec, FrameStacks, PyTree, StepInfo, TimeStep, Trajectory


class Policy(Protocol):
    """Chooses the actions of one unroll, from an actor's own parameters or on the accelerator."""

    @property
    def version(self) -> int:
        """Version of the parameters at the start of the unroll: the number of learner updates."""
        ...

    def step(self, key: Array, num_steps: np.int32, timestep: TimeStep, state: PyTree) -> AgentStep:
        """Acts at one timestep.

        Args:
          key: Random key of the actor.
          num_steps: Number of steps that the actor has taken; the pair of `key` and `num_steps` is never repeated.
          timestep: Timestep, NumPy arrays [N, ...].
          state: State of the core, [N, ...].

        Raises:
          Closed: If the run is ending.
          TimeoutError: If the accelerator does not answer in time.
        """
        ...


class _LocalPolicy(NamedTuple):
    """A policy that is evaluated on the CPU, in the actor's process."""

    version: int
    params: PyTree
    compiled: Callable[[PyTree, Array, np.int32, TimeStep, PyTree], AgentStep]

    def step(self, key: Array, num_steps: np.int32, timestep: TimeStep, state: PyTree) -> AgentStep:
        return self.compiled(self.params, key, num_steps, timestep, state)


class ActorState(NamedTuple):
    """Arrays from which an actor continues, besides the state of its N environments."""

    key: Array  # Key for action sampling.
    num_steps: Array  # [] int32, number of steps taken; with `key` it determines the next actions.
    timestep: TimeStep  # [N, ...], the latest.
    core: PyTree  # [N, ...], state of the core before it.
    game_version: Array  # [N] int32, version that took the first action of the current game.
    game_over: Array  # [2, N] bool, whether a game ended in each of the last two steps.


def initial_state(agent: Agent, key: Array, timestep: TimeStep) -> ActorState:
    """Returns the state before the first step, after the first timestep [N, ...]; `key` is for action sampling."""
    num_envs = timestep.step_type.shape[0]
    return ActorState(
        key=key,
        num_steps=np.int32(0),
        timestep=timestep,
        core=agent.initial_state(num_envs),
        game_version=np.zeros([num_envs], np.int32),
        game_over=np.ones([2, num_envs], bool),
    )


class Actor:
    """Steps environments with a policy, and splits the experience into trajectories.

    Args:
      agent: Agent that acts.
      environment: Vector of N environments; the caller closes it.
      unroll_length: Number of steps per trajectory, T.
      seed: Seed for action sampling.
      greedy: Whether to take the most likely action instead of sampling.
      task_ids: Task of each environment, [N] int32; by default 0 for all.
    """

    def __init__(
        self,
        agent: Agent,
        environment: VectorEnvironment,
        unroll_length: int,
        seed: int,
        *,
        greedy: bool = False,
        task_ids: np.ndarray | None = None,
    ):
        self.environment = environment
        self._task_ids = np.zeros([environment.num_envs], np.int32) if task_ids is None else task_ids
        self._unroll_length = unroll_length
        self._device = jax.local_devices(backend='cpu')[0]
        self._agent = agent
        self._params: tuple[PyTree, PyTree] | None = None  # As passed by the caller, and on the device.
        self.reset(seed)

        def step(params, key, num_steps, timestep, state):
            return agent.step(params, jax.random.fold_in(key, num_steps), timestep, state, greedy=greedy)

        self._step = jax.jit(step)

    def reset(self, seed: int) -> None:
        """Resets all environments at the next unroll, and sets the seed for action sampling."""
        with jax.default_device(self._device):
            self._key = np.asarray(jax.random.PRNGKey(seed))
        self.state: ActorState | None = None
        """State before the next unroll; None before the first one and after `reset`."""

    def begin(self) -> ActorState:
        """Resets the environments if no state is there, and returns the state.

        Raises:
          ConfigError: If the agent cannot read an observation; see `Agent.check_observation`.
        """
        if self.state is None:
            timestep = self.environment.reset()
            self._agent.check_observation(timestep.observation)
            self.state = initial_state(self._agent, self._key, timestep)
        return self.state

    def unroll(self, version: int, params: PyTree) -> Trajectory:
        """Acts for T steps with one set of parameters; see `act`.

        Args:
          version: Version of the parameters: the number of learner updates.
          params: Parameters of the agent.
        """
        return self.act(self.policy(version, params))

    def policy(self, version: int, params: PyTree) -> Policy:
        """Returns the policy of the agent with the given parameters, on the CPU."""
        if self._params is None or self._params[0] is not params:
            self._params = (params, jax.device_put(params, self._device))
        return _LocalPolicy(version, self._params[1], self._step)

    def act(self, policy: Policy) -> Trajectory:
        """Acts for T steps.

        Args:
          policy: Policy that chooses the actions.

        Returns:
          A Trajectory [T + 1, N] of NumPy arrays; its first timestep is the last one of the previous trajectory.

        Raises:
          ConfigError: If the agent cannot read an observation; see `Agent.check_observation`.
        """
        is_first = self.state is None
        before = self.begin()
        initial_state = jax.tree.map(np.asarray, before.core)
        timestep, core = before.timestep, before.core
        buffer = _Buffer(self._unroll_length, timestep, self.environment.spec)
        with jax.default_device(self._device):
            for t in range(self._unroll_length):
                acted = policy.step(before.key, np.int32(before.num_steps + t), timestep, core)
                timestep, info = self.environment.step(np.asarray(acted.action))
                self._agent.check_observation(timestep.observation)
                buffer.add(t, timestep, np.asarray(acted.logits), info)
                core = acted.state
        if is_first:
            self._agent.report_small_bytes(timestep.observation)
        info = buffer.info()
        over = np.concatenate([before.game_over, info.game_over])
        game_version = game_versions(np.int32(policy.version), buffer.step_type, over, before.game_version)
        self.state = ActorState(
            key=before.key,
            num_steps=np.int32(before.num_steps + self._unroll_length),
            timestep=jax.tree.map(np.copy, timestep),  # The environment may reuse its arrays in its next step.
            core=core,
            game_version=game_version[-1],
            game_over=over[-2:],
        )
        versions = np.full([self.environment.num_envs], policy.version, np.int32)
        return buffer.trajectory(initial_state, info, versions, self._task_ids, game_version)

    def get_state(self) -> bytes:
        """Returns the state of actor and environments, from which another actor continues bit-identically.

        Raises:
          NotImplementedError: If the environment cannot be saved.
        """
        state, environment = self.state, self.environment.get_state()
        if state is None:  # What `begin` would return, without its timestep.
            state = self._example_state()
        return plain_state.encode(
            {
                'key': np.asarray(state.key),
                'num_steps': int(state.num_steps),
                'timestep': None if self.state is None else _leaves(state.timestep),
                'core': _leaves(state.core),
                'game_version': np.asarray(state.game_version),
                'game_over': np.asarray(state.game_over),
                'environment': environment,
            }
        )

    def set_state(self, state: bytes) -> None:
        """Continues from a state returned by `get_state`.

        Raises:
          ConfigError: If the state was saved by a version whose actors or environments have another state.
        """
        own = self._example_state()
        try:
            saved = plain_state.decode(state)
            has_begun = saved['timestep'] is not None
            restored = ActorState(
                key=_like(own.key, saved['key']),
                num_steps=np.int32(saved['num_steps']),
                timestep=_like(own.timestep, saved['timestep']) if has_begun else own.timestep,
                core=_like(own.core, saved['core']),
                game_version=_like(own.game_version, saved['game_version']),
                game_over=_like(own.game_over, saved['game_over']),
            )
            self.environment.set_state(saved['environment'])
            self._key = restored.key
            self.state = restored if has_begun else None
        except (KeyError, TypeError, ValueError, EnvironmentFailure) as error:
            reason = str(error).splitlines()[-1]
            raise ConfigError(
                f'the saved state of an actor is of another version of impala_jax or of the environment ({reason}); '
                'start again with another --workdir'
            ) from error

    def _example_state(self) -> ActorState:
        """The state before the first unroll, with a timestep of zeros."""
        timestep = dummy_timestep(self.environment.spec, self.environment.num_envs)
        return initial_state(self._agent, self._key, timestep)


def game_versions(version: Any, step_type: Array, over: Array, earlier: Array, xp: Any = np) -> Array:
    """Returns `Trajectory.game_version`, [T, N] int32.

    Args:
      version: Version of the parameters of these T steps, int32.
      step_type: Step types, [T + 1, N] int32.
      over: Whether a game ended in each of these steps and of the two before them, [T + 2, N] bool.
      earlier: The result for the step before, [N] int32.
      xp: Module of the arrays, `numpy` or `jax.numpy`.
    """
    # The first action of a game is taken at a FIRST timestep, one step after the last game or right at a restart.
    begins = (step_type[:-1] == FIRST) & (over[1:-1] | over[:-2])
    return xp.where(xp.cumsum(begins, axis=0) > 0, version, earlier[None])


def _leaves(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _like(example: PyTree, saved: Any) -> PyTree:
    """Saved leaves, or a single array, in the structure of `example`; raises ValueError if they do not fit."""
    leaves, structure = jax.tree.flatten(example)
    saved = saved if isinstance(saved, list) else [saved]
    if [(leaf.shape, leaf.dtype) for leaf in saved] != [(np.shape(leaf), leaf.dtype) for leaf in leaves]:
        raise ValueError('its arrays have other shapes or dtypes')
    return jax.tree.unflatten(structure, saved)


class _Buffer:
    """The arrays of one trajectory, written row by row; they are not reused, so the trajectory owns them."""

    def __init__(self, unroll_length: int, timestep: TimeStep, spec: EnvironmentSpec):
        self._timesteps = frame_stacks.empty_timesteps(unroll_length + 1, timestep, spec)
        self._leaves = jax.tree.leaves(self._timesteps, is_leaf=lambda x: isinstance(x, FrameStacks))
        self._rows: list[tuple[np.ndarray, StepInfo]] = []
        self._write(0, timestep)

    def add(self, t: int, timestep: TimeStep, logits: np.ndarray, info: StepInfo) -> None:
        self._write(t + 1, timestep)
        self._rows.append((logits, info))

    @property
    def step_type(self) -> np.ndarray:
        return self._timesteps.step_type

    def info(self) -> StepInfo:
        return StepInfo(*(np.stack(x) for x in zip(*(info for _, info in self._rows), strict=True)))

    def trajectory(self, initial_state: PyTree, *fields: Any) -> Trajectory:
        """Builds the Trajectory; `fields` are its last fields."""
        return Trajectory(self._timesteps, np.stack([logits for logits, _ in self._rows]), initial_state, *fields)

    def _write(self, row: int, timestep: TimeStep) -> None:
        for buffer, value in zip(self._leaves, jax.tree.leaves(timestep), strict=True):
            if isinstance(buffer, FrameStacks):
                frame_stacks.write(buffer, row, timestep.step_type, value)
            else:
                buffer[row] = value


def run_actor(actor: Actor, queue: TrajectoryQueue, newest: Callable[[], Policy]) -> None:
    """Acts until the queue or the source of policies is closed; then closes the environments.

    Args:
      actor: Actor to run.
      queue: Queue for the trajectories.
      newest: Function that returns the newest policy, called before each unroll.
    """
    try:
        while True:
            queue.put(actor.act(newest()))
    except Closed:
        return
    finally:
        actor.environment.close()
