"""Construction of the parts of an experiment from its configuration."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from impala_jax import networks
from impala_jax.agent import Agent
from impala_jax.config import (
    Config,
    ConfigError,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    VTraceConfig,
    import_object,
    to_flat_dict,
)
from impala_jax.learner import Learner, OptimizerFactory, Schedule
from impala_jax.loss import ImpalaLoss, Loss
from impala_jax.optimizer import Hyperparameters, make_optimizer, scheduled
from impala_jax.training.hooks import Checkpoints, Metrics, NonFiniteUpdates, RunConfig, ScheduleJumps
from impala_jax.training.hosts import ManyHosts, OneHost
from impala_jax.training.loop import Hook, TrainingLoop
from impala_jax.types import EnvironmentSpec, PyTree


def make_agent(config: NetworkConfig, spec: EnvironmentSpec, popart: bool = False) -> Agent:
    """Builds the agent for an environment.

    Args:
      config: Configuration of the network.
      spec: Spec of the environment.
      popart: Whether the network has one normalised value per task.

    Raises:
      ConfigError: As for `networks.build`.
    """
    return Agent(networks.build(config, spec, popart), spec)


def make_loss(config: LossConfig, vtrace: VTraceConfig) -> Loss:
    """Builds the loss.

    Raises:
      ConfigError: If `loss.function` cannot be imported, or rlax for its implementation of V-trace.
    """
    if config.function is not None:
        return import_object('loss.function', config.function)
    if vtrace.implementation == 'rlax':
        try:
            importlib.import_module('rlax')
        except ImportError as error:
            raise ConfigError(
                f"vtrace.implementation 'rlax': rlax cannot be imported ({error}); use 'auto', or install rlax and "
                "start a new process (rlax does not load after Launchpad's TensorFlow)"
            ) from error
    return ImpalaLoss(config.discount, config.baseline_cost, config.entropy_cost, config.reward_clip, vtrace)


def make_optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Returns the function from hyperparameters to the optax transformation.

    Raises:
      ConfigError: If `optimizer.name` cannot be imported.
    """
    return (
        import_object('optimizer.name', config.name)
        if ':' in config.name
        else functools.partial(make_optimizer, config)
    )


def unused_options(config: Config) -> list[str]:
    """Lists options that differ from their default, and that another option makes ineffective; one line per cause."""
    optimizer = config.optimizer.name
    causes = {
        f'network.module {config.network.module!r}': ('network.',) if config.network.module else (),
        f'loss.function {config.loss.function!r}': (
            ('loss.discount', 'loss.baseline_cost', 'loss.reward_clip', 'vtrace.') if config.loss.function else ()
        ),
        f'optimizer.name {optimizer!r}': (
            *(('optimizer.decay', 'optimizer.momentum') if optimizer != 'rmsprop' else ()),
            *(('optimizer.b1', 'optimizer.b2') if optimizer != 'adam' else ()),
            *(('optimizer.max_grad_norm',) if ':' in optimizer else ()),
        ),
    }
    values, defaults = to_flat_dict(config), to_flat_dict(Config())
    lines = []
    for cause, prefixes in causes.items():
        unused = [
            f'{name} {value}'
            for name, value in values.items()
            if prefixes and name.startswith(prefixes) and value != defaults[name] and name != 'network.module'
        ]
        if unused:
            lines.append(f'not used with {cause}: {", ".join(unused)}')
    return lines


def make_hyperparameters(config: Config) -> Hyperparameters:
    """Returns the hyperparameters at the start of a run."""
    return Hyperparameters(config.optimizer.learning_rate, config.loss.entropy_cost, config.optimizer.epsilon)


def make_schedule(config: Config) -> Schedule:
    """Returns the schedule of the hyperparameters as a function of applied updates."""
    return functools.partial(
        scheduled, optimizer=config.optimizer, loss=config.loss, num_updates=config.schedule_updates
    )


def make_learner(config: Config, agent: Agent, devices: Sequence[Any] | None = None) -> Learner:
    """Builds the learner.

    Args:
      config: Configuration of the experiment.
      agent: Agent to train.
      devices: Devices of the mesh, of type `jax.Device`; None for `choose_devices`.

    Raises:
      ConfigError: If the batch does not divide over the devices, there are fewer devices than configured, or the loss
        or the optimiser cannot be imported.
    """
    devices = choose_devices(config) if devices is None else devices
    if config.learner.batch_size % len(devices):
        raise ConfigError(
            f'learner.batch_size {config.learner.batch_size} does not divide over {len(devices)} devices; '
            f'choose a multiple of {len(devices)}, or set learner.num_devices'
        )
    return Learner(
        agent,
        make_optimizer_factory(config.optimizer),
        make_loss(config.loss, config.vtrace),
        hyperparameters=make_hyperparameters(config),
        schedule=make_schedule(config),
        popart=config.popart if config.popart.enabled else None,
        devices=devices,
    )


def choose_devices(config: Config) -> list[Any]:
    """Returns `config.learner.num_devices` devices per host, or all devices, in the order of the hosts.

    Raises:
      ConfigError: If a host has fewer devices.
    """
    hosts = [[device for device in jax.devices() if device.process_index == i] for i in range(jax.process_count())]
    wanted = config.learner.num_devices
    fewest = min(hosts, key=len)
    if wanted is not None and wanted > len(fewest):
        machine = 'this machine' if len(hosts) == 1 else f'host {fewest[0].process_index}'
        raise ConfigError(
            f'learner.num_devices is {wanted}, but {machine} has {len(fewest)} {fewest[0].platform} device(s)'
        )
    return [device for devices in hosts for device in devices[:wanted]]


class Training(NamedTuple):
    """A training loop, the hooks to which a runtime adds values, and the learner."""

    loop: TrainingLoop
    metrics: Metrics
    checkpoints: Checkpoints
    learner: Learner


def make_training(
    config: Config,
    agent: Agent,
    workdir: Path,
    publish: Callable[[int, PyTree], None],
    devices: Sequence[Any] | None = None,
    attach: Sequence[Callable[[Learner, Metrics, Checkpoints], Hook]] = (),
) -> Training:
    """Builds the training loop of a run, which continues from the newest intact checkpoint in `workdir`.

    Nothing is written before the loop begins, so a runtime that cannot resume leaves the workdir unchanged. On several
    hosts, host 0 reads and writes the files of the run.

    Args:
      config: Configuration of the experiment.
      agent: Agent to train.
      workdir: Folder of the run.
      publish: Function that publishes parameters: the number of updates, and the parameters in NumPy.
      devices: Devices, as in `make_learner`.
      attach: Functions that build further hooks, called after the hook for metrics and before the one for checkpoints.

    Raises:
      ConfigError: As for `make_learner`, or if a member of a population runs on several hosts.
      CheckpointError: As for `Checkpointer`, on host 0.
    """
    num_hosts, is_primary = jax.process_count(), jax.process_index() == 0
    if config.pbt.member is not None and num_hosts > 1:
        raise ConfigError(
            f'pbt.member {config.pbt.member} on {num_hosts} hosts: members of a population train on one host each; '
            'use launch/pbt.py on each of them'
        )
    learner = make_learner(config, agent, devices)
    state = learner.init(jax.random.PRNGKey(config.seed))
    checkpoints = Checkpoints(workdir, config, state, is_primary)
    total_frames = config.total_updates * config.frames_per_update
    metrics = Metrics(
        workdir, config.logging, total_frames, config.num_fresh, agent.spec.tasks, checkpoints, is_primary
    )
    hooks: list[Hook] = [RunConfig(workdir, config), metrics]
    hooks += [make_hook(learner, metrics, checkpoints) for make_hook in attach]
    if checkpoints.restored_config is not None:
        before = make_schedule(checkpoints.restored_config)
        hooks.append(ScheduleJumps(before, learner.schedule, make_hyperparameters(config)))
    hooks += [NonFiniteUpdates(config.learner.max_nonfinite_updates), checkpoints]
    if num_hosts == 1:
        hosts = OneHost(learner)
    else:
        empty = agent.empty_trajectory(config.learner.unroll_length, config.learner.batch_size // num_hosts)
        hosts = ManyHosts(learner, config.num_fresh, empty)
    restored = checkpoints.restored_state
    state = learner.restore(state if restored is None else restored)
    loop = TrainingLoop(hosts, state, publish, config.total_updates, config.frames_per_update, hooks)
    return Training(loop, metrics, checkpoints, learner)
