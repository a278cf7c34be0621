"""The networks of figure 3: a torso for each observation, an optional LSTM that resets, two heads.

Everything takes time-major input [T, B, ...]. The torso runs on time x batch folded into one axis; only the LSTM runs
step by step. Torsos, instruction encoder and core compute in `NetworkConfig.compute_dtype`, the heads in float32.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import frame_stacks, layers
from impala_jax.config import ConfigError, NetworkConfig
from impala_jax.layers import Conv
from impala_jax.types import FIRST, INSTRUCTION, Array, ArraySpec, EnvironmentSpec, FrameStacks, PyTree, TimeStep


class NetworkOutput(NamedTuple):
    """The two heads."""

    logits: Array  # [T, B, A] float32
    values: Array  # [T, B] float32; with PopArt [T, B, K], normalised, one a task


_relu_init = nn.initializers.orthogonal(2**0.5)


def _image_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Orthogonal filters whose weights sum to zero.

    Images are not negative and mostly background, to which any other filter answers with a large constant: half of the
    filters would be negative nearly everywhere from the start, and their ReLUs dead.
    """
    return layers.centred(_relu_init(key, shape, dtype))


class ShallowTorso(nn.Module):
    """Two convolutions (figure 3, left); `centre_filters` as in `NetworkConfig`."""

    channels: tuple[int, ...] = (16, 32)
    kernels: tuple[int, ...] = (8, 4)
    strides: tuple[int, ...] = (4, 2)
    hidden_size: int = 256
    centre_filters: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[N, H, W, C] -> [N, hidden_size]."""
        x = images
        for i, size in enumerate(zip(self.channels, self.kernels, self.strides, strict=True)):
            if i == 0:
                layer = Conv(*size, 'VALID', centre=self.centre_filters, kernel_init=_image_init, dtype=self.dtype)
            else:
                layer = Conv(*size, 'VALID', relu=True, kernel_init=_relu_init, dtype=self.dtype)
            x = layer(x)
        dense = nn.Dense(self.hidden_size, kernel_init=_relu_init, dtype=self.dtype)
        return nn.relu(dense(nn.relu(x).reshape(x.shape[0], -1)))


class ResidualBlock(nn.Module):
    """ReLU-conv-ReLU-conv plus the input."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H, W, C]."""
        y = Conv(x.shape[-1], 3, relu=True, dtype=self.dtype)(x)
        y = Conv(x.shape[-1], 3, relu=True, dtype=self.dtype)(y)
        return x + y


class DeepTorso(nn.Module):
    """Fifteen convolutions in three residual sections (figure 3, right)."""

    channels: tuple[int, ...] = (16, 32, 32)
    hidden_size: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[N, H, W, C] -> [N, hidden_size]."""
        x = images
        for channels in self.channels:
            x = Conv(channels, 3, pool=True, dtype=self.dtype)(x)
            for _ in range(2):
                x = ResidualBlock(self.dtype)(x)
        x = nn.relu(x)
        dense = nn.Dense(self.hidden_size, kernel_init=_relu_init, dtype=self.dtype)
        return nn.relu(dense(x.reshape(x.shape[0], -1)))


class MLPTorso(nn.Module):
    """Dense layers over the flattened observation."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, ...] -> [N, hidden_sizes[-1]]."""
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size, dtype=self.dtype)(x))
        return x


class InstructionEncoder(nn.Module):
    """Words of an instruction, embedded and read by an LSTM (figure 3); no words give zeros."""

    num_word_ids: int
    embedding_size: int = 20
    hidden_size: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, words: Array) -> Array:
        """[N, L] int32 -> [N, hidden_size], the output at the last word; 0 is no word.

        An id that is not below `num_word_ids` makes the output NaN.
        """
        embedded = nn.Embed(self.num_word_ids, self.embedding_size)(words)

        def step(cell, carry, step_inputs):
            x, is_word = step_inputs
            new, _ = cell(carry, x)
            carry = jax.tree.map(lambda new, old: jnp.where(is_word[:, None], new, old), new, carry)
            return carry, None

        scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False}, in_axes=1)
        zeros = jnp.zeros([words.shape[0], self.hidden_size])
        cell = nn.OptimizedLSTMCell(self.hidden_size, dtype=self.dtype)
        (_, output), _ = scan(cell, (zeros, zeros), (embedded, words != 0))
        return output


class ResettingLSTM(nn.Module):
    """An LSTM whose state, float32, becomes zeros BEFORE a step that starts an episode."""

    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array, resets: Array, state: PyTree) -> tuple[Array, PyTree]:
        """[T, B, D], bool [T, B], two of [B, size] -> [T, B, size], two of [B, size]."""

        def step(cell, carry, step_inputs):
            x, reset = step_inputs
            carry = jax.tree.map(lambda s: jnp.where(reset[:, None], jnp.zeros_like(s), s), carry)
            return cell(carry, x)

        scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
        state, outputs = scan(nn.OptimizedLSTMCell(self.size, dtype=self.dtype), state, (inputs, resets))
        return outputs, state


class ImpalaNetwork(nn.Module):
    """Torso, core and heads.

    An observation may be nested; what its leaves' torsos yield is joined. A leaf under the key `instruction` that is
    int32 [words] is read by the `InstructionEncoder` instead.
    """

    num_actions: int
    config: NetworkConfig
    num_normalised_values: int | None = None  # K with PopArt, else None

    @nn.compact
    def __call__(self, timesteps: TimeStep, state: PyTree) -> tuple[NetworkOutput, PyTree]:
        """Runs T timesteps of B environments.

        Args:
          timesteps: [T, B, ...].
          state: [B, ...], the core's state before timestep 0; `()` without a recurrent core.

        Returns:
          NetworkOutput ([T, B, A] and [T, B], with PopArt [T, B, K]) and the state after the last timestep.
        """
        num_steps, batch = timesteps.step_type.shape
        first = timesteps.step_type == FIRST
        leaves = []
        observation = timesteps.observation
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            observation, is_leaf=lambda x: isinstance(x, FrameStacks)
        ):
            leaf = frame_stacks.stacked(leaf) if isinstance(leaf, FrameStacks) else leaf
            leaf = leaf.reshape(num_steps * batch, *leaf.shape[2:])
            if not _is_instruction(path, leaf):
                leaves.append(_torso(self.config, leaf.ndim - 1)(_to_float(leaf)))
            elif self.config.instructions:
                leaves.append(InstructionEncoder(self.config.num_word_ids, dtype=_compute_dtype(self.config))(leaf))
        x = leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=-1)
        x = x.reshape(num_steps, batch, -1)

        if self.config.core == 'lstm':
            # Nothing of the episode before is seen at an episode's first step.
            action = jax.nn.one_hot(timesteps.previous_action, self.num_actions) * ~first[..., None]
            reward = jnp.clip(timesteps.reward * ~first, -1.0, 1.0)[..., None]
            core = ResettingLSTM(self.config.lstm_size, _compute_dtype(self.config))
            x, state = core(jnp.concatenate([x, action, reward], -1), first, state)

        logits = nn.Dense(self.num_actions, name='policy', kernel_init=nn.initializers.orthogonal(0.01))(x)
        num_values = self.num_normalised_values
        values = nn.Dense(num_values or 1, name='baseline', kernel_init=nn.initializers.orthogonal(1.0))(x)
        return NetworkOutput(logits, values if num_values else values[..., 0]), state


def build(config: NetworkConfig, spec: EnvironmentSpec, popart: bool = False) -> ImpalaNetwork:
    """The network for an environment; with `popart` it has a value for each task.

    Raises:
      ConfigError: a torso that cannot take the environment's observations, or a class that cannot be found.
    """
    for leaf in jax.tree.leaves(spec.observation, is_leaf=lambda x: isinstance(x, ArraySpec)):
        if config.torso in _IMAGE_TORSOS and len(leaf.shape) == 3 and min(leaf.shape[:2]) < _IMAGE_TORSOS[config.torso]:
            raise ConfigError(
                f'network.torso {config.torso!r} needs images of at least {_IMAGE_TORSOS[config.torso]} pixels a '
                f'side, the environment has {leaf.shape}; try --network.torso mlp'
            )
    if ':' in config.torso:
        _custom_torso(config.torso)
    return ImpalaNetwork(spec.num_actions, config, spec.num_tasks if popart else None)


def initial_state(config: NetworkConfig, batch_size: int) -> PyTree:
    """The core's state at an episode's start: zeros, two of [B, lstm_size] float32, or `()` without an LSTM."""
    if config.core == 'feedforward':
        return ()
    return (np.zeros([batch_size, config.lstm_size], np.float32), np.zeros([batch_size, config.lstm_size], np.float32))


# The smallest image side each torso can take.
_IMAGE_TORSOS = {'shallow': 20, 'shallow_atari': 36, 'deep': 8}


def _torso(config: NetworkConfig, rank: int) -> nn.Module:
    """The torso for observations of this rank; what is not an image goes through the MLP."""
    if ':' in config.torso:
        return _custom_torso(config.torso)()
    dtype = _compute_dtype(config)
    if rank != 3 or config.torso == 'mlp':
        return MLPTorso(config.mlp_sizes, dtype)
    if config.torso == 'deep':
        return DeepTorso(dtype=dtype)
    if config.torso == 'shallow_atari':
        return ShallowTorso((32, 64, 64), (8, 4, 3), (4, 2, 1), 512, config.centre_filters, dtype)
    return ShallowTorso(centre_filters=config.centre_filters, dtype=dtype)


def _compute_dtype(config: NetworkConfig) -> Any:
    return jnp.bfloat16 if config.compute_dtype == 'bfloat16' else jnp.float32


def _custom_torso(path: str) -> type[nn.Module]:
    module_name, _, class_name = path.partition(':')
    try:
        torso = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'network.torso {path!r} cannot be imported: {error}') from error
    if not (isinstance(torso, type) and issubclass(torso, nn.Module)):
        raise ConfigError(f'network.torso {path!r} is not a flax.linen.Module')
    return torso


def _is_instruction(path: tuple[Any, ...], leaf: Array) -> bool:
    """Whether a leaf, [N, ...], of an observation is word ids."""
    key = getattr(path[-1], 'key', None) if path else None
    return key == INSTRUCTION and leaf.ndim == 2 and leaf.dtype == jnp.int32


def _to_float(x: Array) -> Array:
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
