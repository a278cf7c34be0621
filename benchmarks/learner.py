"""Throughput of learner updates, compared with the same network in plain flax layers, and in PyTorch.

    python benchmarks/learner.py [--torso shallow deep] [--unroll 20] [--batch 32] [--repeats 5]
                                 [--against plain torch torch-as-it-comes] [--trace DIR] [--json FILE]

An update consists of V-trace, loss, gradient, clipping and RMSProp on uint8 frames of B trajectories of T transitions
that are already in the device's memory (stacks of 84x84x4; for `ours` single frames, which it stacks itself). `ours`
and `plain` start from the same parameters, and their losses must agree. `steps/s` counts T x B steps per update, as
median and range. `of the limit` is relative to all FLOPs of the forward and backward pass at the peak of matrix
products, measured before the updates.

PyTorch is not a dependency of this project: install a CPU build for the comparison. `torch` runs in this process with
its allocator settings, which are not PyTorch's defaults; `torch-as-it-comes` runs in a separate process without them.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rlax
from common import in_turn, machine, matmul_peak, report

from impala_jax import frame_stacks
from impala_jax.agent import dummy_timestep
from impala_jax.build import make_agent, make_learner
from impala_jax.config import Config, LearnerConfig, NetworkConfig
from impala_jax.kernels import allocator
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, FrameStacks, TimeStep, Trajectory

NUM_ACTIONS = 6
SPEC = EnvironmentSpec(ArraySpec((84, 84, 4), np.dtype(np.uint8), stacked=True), NUM_ACTIONS)


def make_trajectories(T: int, B: int) -> Trajectory:
    """Creates random trajectories, [T + 1, B], which contain ends of episodes."""
    rng = np.random.default_rng(0)
    steps = jax.tree.map(lambda x: np.stack([x] * (T + 1)), dummy_timestep(SPEC, B))
    ends = rng.random([T + 1, B]) < 0.02
    starts = np.roll(ends, 1, axis=0) & (np.arange(T + 1) > 0)[:, None]
    step_type = np.where(starts, FIRST, np.where(ends, LAST, MID)).astype(np.int32)
    steps = steps._replace(
        step_type=step_type,
        reward=rng.choice([-1.0, 0.0, 1.0], [T + 1, B], p=[0.05, 0.9, 0.05]).astype(np.float32),
        discount=(step_type != LAST).astype(np.float32),
        observation=FrameStacks(rng.integers(0, 256, [T + 4, B, 84, 84], np.uint8), np.full([T + 1, B], 3, np.uint8)),
        previous_action=rng.integers(0, NUM_ACTIONS, [T + 1, B], np.int32),
    )
    logits = rng.normal(0, 0.1, [T, B, NUM_ACTIONS]).astype(np.float32)
    zeros: Any = np.zeros([B], np.int32)
    return Trajectory(steps, logits, (), None, zeros, zeros, None)  # pyright: ignore[reportArgumentType]


def stacked(trajectories: Trajectory) -> TimeStep:
    """Returns the timesteps with stacked frames, [T + 1, B, 84, 84, 4] uint8, as other implementations use."""
    stacks = frame_stacks.stacked(trajectories.timesteps.observation)
    return trajectories.timesteps._replace(observation=np.asarray(stacks))


def ours(config: Config, trajectories: Trajectory) -> Callable[[], float]:
    """Returns a function that performs an update of this package's learner and returns the loss."""
    agent = make_agent(config.network, SPEC)
    learner = make_learner(config, agent)
    batch = learner.put(trajectories.experience)
    states = [learner.init(jax.random.PRNGKey(0))]

    def update() -> float:
        state, logs = learner.update(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        return float(logs['loss'])

    return update


class PlainBlock(nn.Module):
    """A residual block in flax's own layers."""

    @nn.compact
    def __call__(self, x):
        """Maps features to features of the same shape."""
        y = nn.Conv(x.shape[-1], (3, 3))(nn.relu(x))
        return x + nn.Conv(x.shape[-1], (3, 3))(nn.relu(y))


class PlainTorso(nn.Module):
    """The networks of figure 3 in flax's own layers, compatible with the parameters of `impala_jax.networks`."""

    deep: bool

    @nn.compact
    def __call__(self, x):
        """Maps images [N, 84, 84, 4] to features [N, 256]."""
        if self.deep:
            for section, channels in enumerate((16, 32, 32)):
                x = nn.max_pool(nn.Conv(channels, (3, 3))(x), (3, 3), (2, 2), padding='SAME')
                for block in range(2):
                    x = PlainBlock(name=f'ResidualBlock_{2 * section + block}')(x)
            x = nn.relu(x)
        else:
            x = nn.relu(nn.Conv(16, (8, 8), (4, 4), padding='VALID')(x))
            x = nn.relu(nn.Conv(32, (4, 4), (2, 2), padding='VALID')(x))
        return nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1)))


def plain(config: Config, trajectories: Trajectory) -> Callable[[], float]:
    """Returns the same update, with flax's own layers and RLax's V-trace."""
    torso = PlainTorso(config.network.torso == 'deep')
    T, B = trajectories.behaviour_logits.shape[:2]
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.optimizer.max_grad_norm),
        optax.rmsprop(
            config.optimizer.learning_rate,
            config.optimizer.decay,
            config.optimizer.epsilon,
            initial_scale=1.0,
            eps_in_sqrt=True,
        ),
    )

    def loss_fn(params, steps, behaviour_logits):
        frames = steps.observation.reshape((T + 1) * B, 84, 84, 4).astype(jnp.float32) / 255
        (torso_name,) = params['params'].keys() - {'policy', 'baseline'}
        features: Any = torso.apply({'params': params['params'][torso_name]}, frames)
        policy, baseline = params['params']['policy'], params['params']['baseline']
        logits = (features @ policy['kernel'] + policy['bias']).reshape(T + 1, B, -1)[:-1]
        values = (features @ baseline['kernel'] + baseline['bias']).reshape(T + 1, B)
        actions = steps.previous_action[1:]
        mask = steps.step_type[1:] != FIRST
        log_pi = rlax.batched_index(jax.nn.log_softmax(logits), actions)
        log_mu = rlax.batched_index(jax.nn.log_softmax(behaviour_logits), actions)
        rhos = jax.lax.stop_gradient(jnp.where(mask, jnp.exp(log_pi - log_mu), 0.0))
        vtrace = jax.vmap(rlax.vtrace_td_error_and_advantage, in_axes=1, out_axes=1)
        returns = vtrace(
            values[:-1],
            values[1:],
            jnp.clip(steps.reward[1:], -1, 1),
            config.loss.discount * steps.discount[1:],
            rhos,
        )
        policy_loss = -jnp.sum(log_pi * jax.lax.stop_gradient(returns.pg_advantage))
        baseline_loss = 0.5 * jnp.sum(jnp.square(returns.errors))
        entropy = -jnp.sum(jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1) * mask)
        return policy_loss + config.loss.baseline_cost * baseline_loss - config.loss.entropy_cost * entropy

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, steps, behaviour_logits):
        loss, gradient = jax.value_and_grad(loss_fn)(params, steps, behaviour_logits)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    params = make_agent(config.network, SPEC).init(jax.random.PRNGKey(0))
    state = [params, optimizer.init(params)]
    steps, behaviour_logits = jax.device_put((stacked(trajectories), trajectories.behaviour_logits))

    def call() -> float:
        params, opt_state, loss = jax.block_until_ready(update(*state, steps, behaviour_logits))
        state[:] = params, opt_state
        return float(loss)

    return call


def with_torch(config: Config, trajectories: Trajectory) -> Callable[[], float]:
    """Returns the same update in PyTorch, with V-trace as a loop over time, as in PyTorch implementations of IMPALA."""
    try:
        import torch
        from torch import nn as tnn
        from torch.nn import functional as F
    except ImportError as error:
        raise SystemExit(f'--against torch needs PyTorch: {error}') from error

    class Block(tnn.Module):
        def __init__(self, channels):
            super().__init__()
            self.convs = tnn.ModuleList(tnn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

        def forward(self, x):
            y = x
            for conv in self.convs:
                y = conv(F.relu(y))
            return x + y

    layers, inputs = [], 4
    if config.network.torso == 'deep':
        for channels in (16, 32, 32):
            layers += [tnn.Conv2d(inputs, channels, 3, padding=1), tnn.MaxPool2d(3, 2, 1)]
            layers += [Block(channels), Block(channels)]
            inputs = channels
        layers += [tnn.ReLU(), tnn.Flatten(), tnn.Linear(32 * 11 * 11, 256), tnn.ReLU()]
    else:
        layers += [tnn.Conv2d(4, 16, 8, 4), tnn.ReLU(), tnn.Conv2d(16, 32, 4, 2), tnn.ReLU()]
        layers += [tnn.Flatten(), tnn.Linear(32 * 9 * 9, 256), tnn.ReLU()]
    model = tnn.ModuleDict(
        {'torso': tnn.Sequential(*layers), 'policy': tnn.Linear(256, NUM_ACTIONS), 'baseline': tnn.Linear(256, 1)}
    )
    rate, epsilon = config.optimizer.learning_rate, config.optimizer.epsilon
    optimizer = torch.optim.RMSprop(model.parameters(), lr=rate, alpha=config.optimizer.decay, eps=epsilon)
    T, B = trajectories.behaviour_logits.shape[:2]
    steps = stacked(trajectories)
    frames = torch.as_tensor(np.ascontiguousarray(np.moveaxis(steps.observation, -1, 2)))  # [T + 1, B, C, H, W]
    actions = torch.as_tensor(steps.previous_action[1:].astype(np.int64))
    mask = torch.as_tensor(steps.step_type[1:] != FIRST).float()
    discounts = config.loss.discount * torch.as_tensor(steps.discount[1:])
    rewards = torch.as_tensor(steps.reward[1:]).clamp(-1, 1)
    behaviour = torch.as_tensor(trajectories.behaviour_logits)

    def update() -> float:
        features = model['torso'](frames.flatten(0, 1).float() / 255)
        logits = model['policy'](features).view(T + 1, B, -1)[:-1]
        values = model['baseline'](features).view(T + 1, B)
        log_policy = F.log_softmax(logits, -1)
        log_pi = log_policy.gather(-1, actions[..., None])[..., 0]
        with torch.no_grad():
            log_mu = F.log_softmax(behaviour, -1).gather(-1, actions[..., None])[..., 0]
            rhos = (log_pi - log_mu).exp().clamp(max=1.0) * mask
            deltas = rhos * (rewards + discounts * values[1:] - values[:-1])
            sums, total = [], torch.zeros(B)
            for t in reversed(range(T)):
                total = deltas[t] + discounts[t] * rhos[t] * total
                sums.append(total)
            vs = values[:-1] + torch.stack(sums[::-1])
            advantages = rhos * (rewards + discounts * torch.cat([vs[1:], values[-1:]]) - values[:-1])
        loss = -(log_pi * advantages).sum() + 0.5 * config.loss.baseline_cost * ((vs - values[:-1]) ** 2 * mask).sum()
        loss = loss + config.loss.entropy_cost * ((log_policy.exp() * log_policy).sum(-1) * mask).sum()
        optimizer.zero_grad()
        loss.backward()
        tnn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        return float(loss.detach())

    return update


def torch_as_it_comes(config: Config, trajectories: Trajectory) -> Callable[[], float]:
    """Returns `with_torch` in a separate process, which ends when its standard input is closed."""
    T, B = trajectories.behaviour_logits.shape[:2]
    command = [__file__, '--serve-torch', '--torso', config.network.torso, '--unroll', str(T), '--batch', str(B)]
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def update() -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write('update\n')
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f'the process with PyTorch ended with exit code {process.wait(60)}')
        return float(answer)

    return update


def flops_per_step(deep: bool, T: int) -> float:
    """Counts the FLOPs per transition of forward and backward pass, without gradients of the frames.

    Args:
      deep: Whether the network is the deep one.
      T: Number of transitions of a trajectory.

    Returns:
      FLOPs per transition, with 2 per multiply-add.
    """
    if deep:
        sides, channels = (84, 42, 21), (4, 16, 32, 32)
        first = 2 * 84 * 84 * 9 * 4 * 16
        rest = 2 * 256 * 32 * 11 * 11
        for i, side in enumerate(sides):
            rest += i and 2 * side**2 * 9 * channels[i] * channels[i + 1]
            rest += 4 * 2 * ((side + 1) // 2) ** 2 * 9 * channels[i + 1] ** 2
    else:
        first = 2 * 20 * 20 * 8 * 8 * 4 * 16
        rest = 2 * (9 * 9 * 4 * 4 * 16 * 32 + 9 * 9 * 32 * 256)
    return (2 * first + 3 * rest) * (T + 1) / T


VARIANTS = {'ours': ours, 'plain': plain, 'torch': with_torch, 'torch-as-it-comes': torch_as_it_comes}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torso', nargs='+', choices=('shallow', 'deep'), default=('shallow', 'deep'))
    parser.add_argument('--unroll', type=int, default=20, help='transitions per trajectory, T')
    parser.add_argument('--batch', type=int, default=32, help='trajectories per update, B')
    parser.add_argument('--repeats', type=int, default=5, help='updates per variant')
    parser.add_argument('--against', nargs='*', choices=sorted(VARIANTS.keys() - {'ours'}), default=('plain',))
    parser.add_argument('--trace', type=Path, help='write a profile of one more update to this folder')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    parser.add_argument('--serve-torch', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_torch:
        config = Config(network=NetworkConfig(args.torso[0]), learner=LearnerConfig(args.batch, args.unroll))
        update = with_torch(config, make_trajectories(args.unroll, args.batch))
        for _ in sys.stdin:
            print(update(), flush=True)
        return
    allocator.configure_allocator()
    about, peak = machine(), matmul_peak()
    about['matmul_gflops'] = round(peak / 1e9)
    rows = []
    for torso in args.torso:
        config = Config(network=NetworkConfig(torso), learner=LearnerConfig(args.batch, args.unroll))
        trajectories = make_trajectories(args.unroll, args.batch)
        updates = {name: VARIANTS[name](config, trajectories) for name in ('ours', *args.against)}
        losses = {name: update() for name, update in updates.items() if 'torch' not in name}
        np.testing.assert_allclose(list(losses.values()), losses['ours'], rtol=1e-4, err_msg=str(losses))
        times = in_turn(updates, args.repeats)
        limit = peak / flops_per_step(torso == 'deep', args.unroll)
        for name, seconds in times.items():
            rates = [args.unroll * args.batch / s for s in seconds]
            ratios = [ours_s / s for ours_s, s in zip(times['ours'], seconds, strict=True)]
            rows.append(
                {
                    'torso': torso,
                    'learner': name,
                    'steps/s': rates,
                    'of the limit': float(np.median(rates)) / limit,
                    'against ours': float(np.median(ratios)),
                }
            )
        if args.trace is not None:
            with jax.profiler.trace(args.trace / torso):
                updates['ours']()
    report(f'updates of [{args.unroll} + 1, {args.batch}] frames, float32', rows, about, args.json)


if __name__ == '__main__':
    main()
