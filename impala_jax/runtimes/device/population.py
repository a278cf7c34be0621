"""Many runs in one compiled program: the members of a population differ in inputs of the program only."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from impala_jax import environments, vtrace
from impala_jax.actor import initial_state
from impala_jax.agent import Agent
from impala_jax.build import make_agent, make_hyperparameters, make_loss, make_optimizer_factory, make_schedule
from impala_jax.config import Config, VTraceConfig, to_flat_dict
from impala_jax.environments.functional import FunctionalEnvironment, task
from impala_jax.evaluation.evaluator import Evaluation
from impala_jax.learner import Learner
from impala_jax.loss import ImpalaLoss, VTraceInputs
from impala_jax.optimizer import Hyperparameters
from impala_jax.rundir.stats import LearnerStats
from impala_jax.runtimes.device.pace import Pace
from impala_jax.runtimes.device.program import (
    Carry,
    DeviceProgram,
    Output,
    ReplayState,
    describe_not_finite,
    empty_items,
    no_replay,
)
from impala_jax.runtimes.host_share import host_share
from impala_jax.seeds import derived_seed
from impala_jax.training.hooks import NON_FINITE_GRADIENTS, row
from impala_jax.types import Array, PyTree, TimeStep

INPUTS = (
    'seed',
    'policy_lag',
    'optimizer.learning_rate',
    'optimizer.epsilon',
    'loss.entropy_cost',
    'loss.discount',
    'vtrace.rho_bar',
    'vtrace.c_bar',
    'vtrace.pg_rho_bar',
    'vtrace.lambda_',
    'vtrace.correction',
    'vtrace.outside_theory',
)
"""Fields of a configuration in which the members of a program may differ, as named by `to_flat_dict`."""


class Member(NamedTuple):
    """Inputs of a run: scalars and random keys, or for M members arrays [M, ...]."""

    hyperparameters: Hyperparameters
    discount: Array  # float32
    vtrace: VTraceInputs
    policy_lag: Array  # int32
    params_key: Array
    actor_key: Array
    replay_key: Array
    environment_keys: Array  # One per environment.
    evaluation_key: Array


class MemberResult(NamedTuple):
    """Result of a run."""

    rows: list[dict[str, Any]]  # Rows of metrics, without times.
    evaluation: Evaluation | None  # Of the last parameters; None without an evaluator.
    problem: str  # Why the run would have ended early on its own; '' if it would not.


def program_of(config: Config) -> str:
    """Returns a name of the compiled program that runs a configuration: all fields that are no inputs."""
    fields = to_flat_dict(config)
    return json.dumps({name: value for name, value in fields.items() if name not in INPUTS}, sort_keys=True)


class Population:
    """A compiled program of several runs, whose members differ in `INPUTS` only.

    Each member makes the updates of the runtime `device` for its configuration, up to rounding.

    Args:
      config: Configuration of any member.
      num_members: Number of members, M. The result of a member depends on it by rounding.
      policy_lag: Largest lag of a member.

    Raises:
      ConfigError: As for `run`.
    """

    def __init__(self, config: Config, num_members: int, policy_lag: int):
        self._config = config
        self.num_members = num_members
        self._slots = policy_lag + 1
        self._share = share = host_share(config)
        self._spec = environments.spec(config.environment)
        self._agent: Agent = make_agent(config.network, self._spec, config.popart.enabled)
        name = config.environment.name
        self._environment = FunctionalEnvironment(task(name), name=name)
        self._evaluated = FunctionalEnvironment(task(name), config.evaluator.max_episode_steps, name=name)
        self._capacity = share.replay_capacity if config.num_replayed else 0
        self._size = min(config.logging.interval_updates, config.total_updates)
        devices = jax.local_devices()[: config.learner.num_devices]
        while num_members % len(devices):
            devices = devices[:-1]
        self._mesh = Mesh(np.array(devices), ('member',))
        self._init = self._compiled(self.init, 1)
        self._updates = self._compiled(self._update, 2, donate_argnums=0)
        self._evaluation = self._compiled(self._evaluate, 2)

    @property
    def member_bytes(self) -> int:
        """Memory that the state of a member takes, in bytes."""
        state = jax.eval_shape(self.init, self._member(self._config))
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))

    def train(
        self,
        configs: Sequence[Config],
        stop: threading.Event,
        report: Callable[[float], None] = lambda _: None,
    ) -> list[MemberResult] | None:
        """Runs all members from start to end.

        Args:
          configs: Configurations of the members; with fewer than M, the last one is run several times.
          stop: Event that ends the runs.
          report: Function that is called with the completed fraction after each call of the program.

        Returns:
          Results in the order of the configurations; None if the runs were stopped.
        """
        config = self._config
        padded = [*configs, *[configs[-1]] * (self.num_members - len(configs))]
        members: Member = jax.tree.map(lambda *leaves: np.stack(leaves), *map(self._member, padded))
        members = jax.device_put(members, NamedSharding(self._mesh, PartitionSpec('member')))
        carry = self._init(members)
        written = [_Rows(config, self._spec.tasks) for _ in configs]
        num_updates, pace = 0, Pace(config, self._size)
        while num_updates < config.total_updates:
            if stop.is_set():
                return None
            with pace.call(num_updates) as count:
                carry, output = self._updates(carry, members, np.int32(count))
                output: Output = jax.tree.map(lambda x, count=count: np.asarray(x)[:, :count], output)
            num_updates += count
            for i, rows in enumerate(written):
                rows.add(num_updates, jax.tree.map(lambda x, i=i: x[i], output))
            report(num_updates / config.total_updates)
        evaluations: list[Evaluation | None] = [None] * len(configs)
        if config.evaluator.episodes:
            returns, truncated = map(np.asarray, self._evaluation(carry.learner.params, members.evaluation_key))
            evaluations = [
                Evaluation(returns[i].astype(float).tolist(), num_truncated=int(truncated[i].sum()))
                for i in range(len(configs))
            ]
        return [
            MemberResult(own.rows, evaluation, own.problem)
            for own, evaluation in zip(written, evaluations, strict=True)
        ]

    def init(self, member: Member) -> Carry:
        """Returns the state of a run at its start, a pure function; see `Actor` and `runtimes.device`."""
        learner = self._learner(member).pure_init(member.params_key, member.hyperparameters)
        environments, timestep = self._reset(self._environment, member.environment_keys)
        actor = initial_state(self._agent, member.actor_key, timestep)
        history = jax.tree.map(lambda x: jnp.broadcast_to(x, [self._slots, *x.shape]), learner.params)
        return Carry(learner, history, jnp.int32(0), actor, environments, self._replay(member.replay_key))

    def _replay(self, key: Array) -> ReplayState:
        if not self._capacity:
            return no_replay()
        items = empty_items(self._agent, self._share.unroll_length, self._capacity, jnp)
        return ReplayState(items, jnp.int32(0), jnp.int32(0), key)

    def _update(self, carry: Carry, member: Member, num_updates: Array) -> tuple[Carry, Output]:
        program = DeviceProgram(
            self._agent,
            self._learner(member),
            self._environment,
            self._share.unroll_length,
            self._share.num_fresh,
            self._share.num_replayed,
        )
        return program.run(carry, member.hyperparameters, member.policy_lag, num_updates, self._size)

    def _learner(self, member: Member) -> Learner:
        """The learner of a member, whose constants are traced."""
        config = self._config
        loss = make_loss(config.loss, config.vtrace)
        if isinstance(loss, ImpalaLoss):
            loss = dataclasses.replace(loss, discount=member.discount, vtrace=member.vtrace)
        return Learner(
            self._agent,
            make_optimizer_factory(config.optimizer),
            loss,
            hyperparameters=make_hyperparameters(config),
            schedule=make_schedule(config),
            popart=config.popart if config.popart.enabled else None,
            devices=jax.local_devices()[:1],
        )

    def _reset(self, environment: FunctionalEnvironment, keys: Array) -> tuple[Any, TimeStep]:
        states = jax.vmap(environment.init)(keys)
        states, timestep, _ = jax.vmap(environment.step)(states, jnp.zeros(len(keys), jnp.int32))
        return states, timestep

    def _evaluate(self, params: PyTree, key: Array) -> tuple[Array, Array]:
        """Plays one episode per environment; returns and whether a limit ended them, [episodes]."""
        episodes, greedy = self._config.evaluator.episodes, self._config.evaluator.greedy
        environment_key, action_key = jax.random.split(key)
        environments, timestep = self._reset(self._evaluated, jax.random.split(environment_key, episodes))

        def step(state):
            t, environments, timestep, core, returns, truncated, done = state
            acted = self._agent.step(params, jax.random.fold_in(action_key, t), timestep, core, greedy=greedy)
            environments, timestep, info = jax.vmap(self._evaluated.step)(environments, acted.action)
            ends = info.episode_ended & ~done
            returns = jnp.where(ends, info.episode_return, returns)
            truncated |= ends & (timestep.discount > 0)
            return t + 1, environments, timestep, acted.state, returns, truncated, done | ends

        none = jnp.zeros([episodes], bool)
        core = self._agent.initial_state(episodes)
        state = (jnp.int32(0), environments, timestep, core, jnp.zeros([episodes], jnp.float32), none, none)
        *_, returns, truncated, _ = jax.lax.while_loop(lambda state: ~jnp.all(state[-1]), step, state)
        return returns, truncated

    def _member(self, config: Config) -> Member:
        share = host_share(config)
        actor_seed = share.node_seed(0, 0, 0)
        own: VTraceConfig = config.vtrace
        with jax.default_device(jax.local_devices(backend='cpu')[0]):
            seeds = [
                config.seed,
                actor_seed,
                share.node_seed(2, 0),
                derived_seed(config.seed, 1),
                *(derived_seed(actor_seed, i) for i in range(share.num_fresh)),
            ]
            params, actor, replay, evaluation, *keys = np.asarray(jax.vmap(jax.random.PRNGKey)(np.array(seeds)))
        return Member(
            hyperparameters=Hyperparameters(*map(np.float32, make_hyperparameters(config))),
            discount=np.float32(config.loss.discount),
            vtrace=VTraceInputs(
                rho_bar=np.float32(own.rho_bar),
                c_bar=np.float32(own.c_bar),
                pg_rho_bar=np.float32(own.pg_rho_bar),
                lambda_=np.float32(own.lambda_),
                correction=np.int32(vtrace.CORRECTIONS.index(own.correction)),
            ),
            policy_lag=np.int32(config.policy_lag),
            params_key=params,
            actor_key=actor,
            replay_key=replay,
            environment_keys=np.stack(keys),
            evaluation_key=evaluation,
        )

    def _compiled(self, function: Callable[..., Any], num_batched: int, **kwargs: Any) -> Callable[..., Any]:
        """Compiles a function of a member for all of them; arguments after the first `num_batched` are common."""

        def of_some(*args: Any) -> Any:
            axes = [0] * num_batched + [None] * (len(args) - num_batched)
            return jax.vmap(function, in_axes=axes)(*args)

        if self._mesh.size == 1:
            return jax.jit(of_some, **kwargs)

        def of_all(*args: Any) -> Any:
            # Not left to XLA: no device needs anything of the members of another.
            own, common = PartitionSpec('member'), PartitionSpec()
            specs = (own,) * num_batched + (common,) * (len(args) - num_batched)
            return jax.shard_map(of_some, mesh=self._mesh, in_specs=specs, out_specs=own, check_vma=False)(*args)

        return jax.jit(of_all, **kwargs)


class _Rows:
    """The rows of metrics of a member."""

    def __init__(self, config: Config, tasks: tuple[str, ...]):
        self.rows: list[dict[str, Any]] = []
        self.problem = ''
        self._config = config
        self._stats = LearnerStats(tasks)

    def add(self, num_updates: int, output: Output) -> None:
        """Adds the output [updates, ...] of the last updates, and a row if one is due after `num_updates`."""
        config, counts = self._config, output.counts
        before = num_updates - len(counts.version)
        version = np.arange(before, num_updates, dtype=np.int32)
        self.problem = self.problem or describe_not_finite(output.finite, config.environment.name, before)
        limit, in_a_row = config.learner.max_nonfinite_updates, int(output.logs['skipped_in_a_row'].max())
        if in_a_row >= limit:
            self.problem = self.problem or f'{in_a_row} {NON_FINITE_GRADIENTS}'
        self._stats.add_batches(counts, version[:, None] - counts.version, config.num_fresh)
        if num_updates % config.logging.interval_updates and num_updates < config.total_updates:
            return
        logs = {name: value[-1] for name, value in output.logs.items()}
        extra = {'replay_size': int(output.replay_size[-1])} if config.num_replayed else {}
        self.rows.append(row(num_updates * config.frames_per_update, num_updates, self._stats, extra, logs))
