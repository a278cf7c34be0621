"""The networks of the paper's figure 3: a torso per observation, an optional LSTM with resets, and two heads.

Inputs are time-major, [T, B, ...]. Torsos run on time and batch merged into one axis; only the LSTM runs step by step.
Torsos, instruction encoder and core compute in `NetworkConfig.compute_dtype`, the heads in float32.

`impala_jax.readings` decides how each leaf of an observation is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.config import ConfigError, NetworkConfig, import_object
from impala_jax.kernels import layers
from impala_jax.kernels.layers import Conv
from impala_jax.readings import Reading, read
from impala_jax.types import (
    FIRST,
    Array,
    EnvironmentSpec,
    PyTree,
    TimeStep,
)


class NetworkOutput(NamedTuple):
    """Outputs of the policy head and the value head."""

    logits: Array  # [T, B, A] float32
    values: Array  # [T, B] float32; with PopArt [T, B, K], one normalised value per task.


_relu_init = nn.initializers.orthogonal(2**0.5)


def _image_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Initialises orthogonal filters with weights that sum to zero.

    Pixels are not negative and mostly background, to which other filters respond with a large constant. Half of those
    filters would be negative nearly everywhere from the start, and their ReLUs dead.
    """
    return layers.centred(_relu_init(key, shape, dtype))


class ShallowTorso(nn.Module):
    """Two convolutions and a dense layer (figure 3, left); `NetworkConfig` describes `centre_filters`."""

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


class CategoryTorso(nn.Module):
    """An MLP over a one-hot vector, with an embedding as its first layer instead of the vector."""

    num_values: int
    hidden_sizes: tuple[int, ...] = (64, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, categories: Array) -> Array:
        """[N] integers from 0 to num_values - 1 -> [N, hidden_sizes[-1]]; NaN for other integers."""
        first, *rest = self.hidden_sizes or (64,)
        x = nn.relu(nn.Embed(self.num_values, first, dtype=self.dtype)(categories))
        return MLPTorso(tuple(rest), self.dtype)(x) if rest else x


class InstructionEncoder(nn.Module):
    """An LSTM over embedded words of an instruction (figure 3); an empty instruction gives zeros."""

    num_word_ids: int
    embedding_size: int = 20
    hidden_size: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, words: Array) -> Array:
        """[N, L] int32 -> [N, hidden_size], the output at the last word.

        Word id 0 is padding. Ids of `num_word_ids` or more make the output NaN.
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
    """An LSTM whose state, float32, is set to zeros BEFORE a step that starts an episode."""

    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array, resets: Array, state: PyTree) -> tuple[Array, PyTree]:
        """Runs T steps.

        Args:
          inputs: Inputs, [T, B, D].
          resets: Whether the step starts an episode, [T, B] bool.
          state: Cell and hidden state, two arrays [B, size].

        Returns:
          The outputs, [T, B, size], and the state after the last step.
        """

        def step(cell, carry, step_inputs):
            x, reset = step_inputs
            carry = jax.tree.map(lambda s: jnp.where(reset[:, None], jnp.zeros_like(s), s), carry)
            return cell(carry, x)

        scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
        state, outputs = scan(nn.OptimizedLSTMCell(self.size, dtype=self.dtype), state, (inputs, resets))
        return outputs, state

    @nn.nowrap
    def initial_state(self, batch_size: int) -> PyTree:
        """Returns zeros, two arrays [B, size] float32."""
        return (np.zeros([batch_size, self.size], np.float32), np.zeros([batch_size, self.size], np.float32))


class ImpalaNetwork(nn.Module):
    """The network of an agent: torsos, core and heads.

    An observation may be nested. Each leaf has a torso, given by its `Reading`, and the outputs of the torsos are
    concatenated. In a dict with an image and a vector, for example, the image has the torso of `NetworkConfig.torso`,
    and the vector an MLP.
    """

    num_actions: int
    config: NetworkConfig
    readings: tuple[Reading, ...]  # One per leaf of the observation, in the order of `jax.tree.leaves`.
    num_normalised_values: int | None = None  # Number of tasks K with PopArt, else None.

    @nn.compact
    def __call__(self, timesteps: TimeStep, state: PyTree) -> tuple[NetworkOutput, PyTree]:
        """Evaluates the network on a sequence of timesteps.

        Args:
          timesteps: Timesteps, [T, B, ...].
          state: State of the core before timestep 0, [B, ...]; `()` without a recurrent core.

        Returns:
          A NetworkOutput with logits [T, B, A] and values [T, B] (with PopArt [T, B, K]), and the state of the core
          after the last timestep.
        """
        num_steps, batch = timesteps.step_type.shape
        first = timesteps.step_type == FIRST
        leaves = []
        for reading, leaf in zip(self.readings, jax.tree.leaves(timesteps.observation), strict=True):
            leaf = leaf.reshape(num_steps * batch, *leaf.shape[2:])
            if reading.torso != 'words':
                leaves.append(_torso(self.config, reading)(_input(reading, leaf)))
            elif self.config.instructions:
                leaves.append(InstructionEncoder(self.config.num_word_ids, dtype=_compute_dtype(self.config))(leaf))
        x = leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=-1)
        x = x.reshape(num_steps, batch, -1)

        if self.config.core != 'feedforward':
            # At the first step of an episode, the core does not see action and reward of the previous episode.
            action = jax.nn.one_hot(timesteps.previous_action, self.num_actions) * ~first[..., None]
            reward = jnp.clip(timesteps.reward * ~first, -1.0, 1.0)[..., None]
            x, state = self._core()(jnp.concatenate([x, action, reward], -1), first, state)

        logits = nn.Dense(self.num_actions, name='policy', kernel_init=nn.initializers.orthogonal(0.01))(x)
        num_values = self.num_normalised_values
        values = nn.Dense(num_values or 1, name='baseline', kernel_init=nn.initializers.orthogonal(1.0))(x)
        return NetworkOutput(logits, values if num_values else values[..., 0]), state

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Returns initial parameters, with open forget gates (`NetworkConfig.lstm_forget_bias`)."""
        return _start_forget_gates(super().init(*args, **kwargs), self.config.lstm_forget_bias)

    @nn.nowrap
    def initial_state(self, batch_size: int) -> PyTree:
        """Returns the state of the core at the start of an episode, [B, ...]; `()` without a recurrent core."""
        return () if self.config.core == 'feedforward' else self._core().initial_state(batch_size)

    @nn.nowrap
    def _core(self) -> Any:
        core = ResettingLSTM if self.config.core == 'lstm' else _imported('network.core', self.config.core)
        return core(self.config.lstm_size, dtype=_compute_dtype(self.config))


def build(config: NetworkConfig, spec: EnvironmentSpec, popart: bool = False) -> nn.Module:
    """Builds the network for an environment.

    Args:
      config: Configuration of the network.
      spec: Spec of the environment.
      popart: Whether the network has one normalised value per task.

    Raises:
      ConfigError: As for `read`, or if a class cannot be found, or `popart` is set for a user's network.
    """
    if config.module is not None:
        if popart:
            raise ConfigError(
                f'popart.enabled: network.module {config.module!r} has no value per task; set only one of the two'
            )
        return _imported('network.module', config.module)(spec.num_actions)
    for field, path in (('network.torso', config.torso), ('network.core', config.core)):
        if ':' in path:
            _imported(field, path)
    return ImpalaNetwork(spec.num_actions, config, read(config, spec.observation), spec.num_tasks if popart else None)


def _start_forget_gates(params: PyTree, bias: float) -> PyTree:
    """Sets the forget gate biases of an `ImpalaNetwork`'s own LSTMs to `bias`.

    TensorFlow's LSTM cell, which the paper's code uses, adds 1 to the input of the forget gate; flax's does not. An
    initial bias is equivalent for learning, and does not change the meaning of trained parameters.
    """

    def start(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [part.key for part in path]
        is_own = names[1].startswith((ResettingLSTM.__name__, InstructionEncoder.__name__))
        return jnp.full_like(leaf, bias) if is_own and names[-2:] == ['hf', 'bias'] else leaf

    return jax.tree_util.tree_map_with_path(start, params)


def _torso(config: NetworkConfig, reading: Reading) -> nn.Module:
    if ':' in reading.torso:
        return _imported('network.torso', reading.torso)()
    dtype = _compute_dtype(config)
    if reading.torso == 'category':
        return CategoryTorso(reading.num_values, config.mlp_sizes, dtype)
    if reading.torso == 'mlp':
        return MLPTorso(config.mlp_sizes, dtype)
    if reading.torso == 'deep':
        return DeepTorso(dtype=dtype)
    if reading.torso == 'minatar':
        return ShallowTorso((16,), (3,), (1,), 128, config.centre_filters, dtype)
    if reading.torso == 'shallow_atari':
        return ShallowTorso((32, 64, 64), (8, 4, 3), (4, 2, 1), 512, config.centre_filters, dtype)
    return ShallowTorso(centre_filters=config.centre_filters, dtype=dtype)


def _input(reading: Reading, leaf: Array) -> Array:
    """Input of the torso for a leaf [N, ...]: categories, images [N, H, W, C], or scaled numbers."""
    if reading.torso == 'category':
        return leaf
    if reading.axes:
        leaf = jnp.transpose(leaf, (0, *(axis + 1 for axis in reading.axes)))
        leaf = leaf.reshape(*leaf.shape[:3], -1)
    return leaf.astype(jnp.float32) / reading.scale if leaf.dtype == jnp.uint8 else leaf.astype(jnp.float32)


def _compute_dtype(config: NetworkConfig) -> Any:
    return jnp.bfloat16 if config.compute_dtype == 'bfloat16' else jnp.float32


def _imported(field: str, path: str) -> type[nn.Module]:
    """Imports `path`, module:Class; raises ConfigError if it does not exist or is not a flax module."""
    found = import_object(field, path)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f'{field} {path!r} is not a flax.linen.Module')
    return found
