"""Configuration of what is learned: network, loss, replay, optimiser, population based training."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from impala_jax.config.checks import closest, require, require_positive

_EPSILONS = {'rmsprop': 0.01, 'adam': 1e-8}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The torso that every observation passes, and the core behind it (paper, figure 3)."""

    torso: str = 'auto'
    """`auto` (`shallow` for images, `mlp` for all else), `shallow` (2 convolutions, figure 3 left), `shallow_atari` (3
    convolutions), `deep` (15 convolutions, figure 3 right), `mlp`, or a flax module `module:Class` of your own. A torso
    for images refuses an environment without any; beside an image, vectors pass an MLP."""
    centre_filters: bool = False
    """Of the shallow torsos: take the mean out of each of the first convolution's filters, at every use. What is the
    same all over an image, mostly its background, then excites none of them, and cannot push their ReLUs out of
    reach."""
    core: str = 'feedforward'
    """`feedforward` (none), `lstm`, or a flax module `module:Class` of your own: docs/extending.md."""
    module: str | None = None
    """A flax module `module:Class` of your own in place of torso, core and heads (also `--network module:Class`):
    docs/extending.md."""
    lstm_size: int = 256
    """Size of the core; that of a class of your own, too."""
    lstm_forget_bias: float = 1.0
    """What the biases of forget gates, of instruction encoders too, start with. 1, as in the paper's code: at first an
    LSTM keeps most of its memory."""
    mlp_sizes: tuple[int, ...] = (64, 64)
    """Hidden layers of the `mlp` torso."""
    instructions: bool = True
    """Read the instruction of an observation that has one; without, it is left out."""
    num_word_ids: int = 1001
    """Word ids of instructions, from 0 for no word; the paper's environment hashes words into 1000."""
    uint8_scale: float | None = None
    """Observations of bytes are divided by this. None: by the greatest value that the environment states, else by 255.
    Set it where the values stay far below the bound, as in MiniGrid (10)."""
    compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Of the layers before the heads, in actors and learner alike, for what acts must be what is learned from.
    Parameters, the core's state, heads, V-trace, loss and optimiser are float32 with either. A torso of your own
    decides for itself."""

    def __post_init__(self):
        known = ('auto', 'shallow', 'shallow_atari', 'deep', 'mlp')
        require(
            self.torso in known or ':' in self.torso,
            f'unknown network.torso {self.torso!r}; {closest(self.torso, known)}, or a class of yours as module:Class',
        )
        require(
            self.core in ('feedforward', 'lstm') or ':' in self.core,
            f'unknown network.core {self.core!r}; {closest(self.core, ("feedforward", "lstm"))}, or a class of yours '
            'as module:Class',
        )
        require(
            self.module is None or ':' in self.module,
            f'network.module must be a class of yours as module:Class, got {self.module!r}',
        )
        require(
            math.isfinite(self.lstm_forget_bias),
            f'network.lstm_forget_bias must be finite, got {self.lstm_forget_bias}',
        )
        require_positive('network', lstm_size=self.lstm_size, num_word_ids=self.num_word_ids)
        if self.uint8_scale is not None:
            require_positive('network', uint8_scale=self.uint8_scale)


@dataclasses.dataclass(frozen=True)
class VTraceConfig:
    """The off-policy correction, and V-trace's truncation levels (section 4.1); `inf` means no truncation."""

    rho_bar: float = 1.0
    """Truncates rho in the temporal differences: decides WHAT is converged to."""
    c_bar: float = 1.0
    """Truncates the trace: decides how FAST; rho_bar >= c_bar in the theory."""
    pg_rho_bar: float = 1.0
    """Truncates rho in the policy gradient's advantage."""
    lambda_: Annotated[float, tyro.conf.arg(name='lambda')] = 1.0
    """Multiplies the trace coefficients c (remark 2)."""
    outside_theory: bool = False
    """Allow c_bar > rho_bar, for which Theorem 1 proves nothing and V-trace can diverge (`impala_jax.tabular`)."""
    implementation: Literal['auto', 'scan', 'associative_scan', 'rlax'] = 'auto'
    """How V-trace is computed; the results are the same up to rounding. `auto`: the fastest on the device. `rlax`: the
    function of that library, as a reference; c_bar and lambda must be 1."""
    correction: Literal['vtrace', 'one_step_is', 'epsilon_correction', 'none'] = 'vtrace'
    """How off-policy data is corrected (section 5.2.2, table 2). `one_step_is`: the advantage times pi/mu, uncorrected
    value targets; `epsilon_correction`: no ratios, log(pi + 1e-6) in the policy gradient; `none`: as if on-policy."""

    def __post_init__(self):
        for name in ('rho_bar', 'c_bar', 'pg_rho_bar'):
            value = getattr(self, name)
            require(value > 0, f'vtrace.{name} must be positive (inf for no truncation), got {value}')
        require(0 <= self.lambda_ <= 1, f'vtrace.lambda must lie in [0, 1], got {self.lambda_}')
        require(
            self.c_bar <= self.rho_bar or self.outside_theory,
            f'vtrace.c_bar {self.c_bar} is above vtrace.rho_bar {self.rho_bar}, outside the theory; '
            'lower c_bar, or set --vtrace.outside-theory',
        )
        if self.implementation == 'rlax':
            for field, value, only in (
                ('c_bar', self.c_bar, 1),
                ('lambda', self.lambda_, 1),
                ('correction', self.correction, 'vtrace'),
            ):
                require(
                    value == only,
                    f"vtrace.{field} {value!r}: vtrace.implementation 'rlax' has only {only!r}; use another one",
                )
        if self.correction != 'vtrace':
            for name in ('rho_bar', 'c_bar', 'pg_rho_bar'):
                value = getattr(self, name)
                require(
                    value == 1,
                    f'vtrace.{name} {value} has no effect with vtrace.correction {self.correction!r}; leave it at 1',
                )


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Experience replay (section 5.2.2): uniform sampling, the oldest trajectory is removed first."""

    fraction: float = 0.0
    """Share of each batch that is replayed; the paper's is 0.5. Only the rest counts as frames."""
    capacity: int = 10_000
    """Trajectories that are kept."""

    def __post_init__(self):
        require(0 <= self.fraction < 1, f'replay.fraction must lie in [0, 1), got {self.fraction}')
        require_positive('replay', capacity=self.capacity)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss, which is a SUM over time and batch."""

    function: str | None = None
    """A loss `module:function` of your own in place of IMPALA's (also `--loss module:function`): docs/extending.md."""
    discount: float = 0.99
    baseline_cost: float = 0.5
    entropy_cost: float = 0.01
    entropy_schedule: Literal['linear', 'constant'] = 'constant'
    """`linear`: the entropy cost falls to 0 over `optimizer.schedule_frames`. The paper's is constant."""
    reward_clip: Literal['unit', 'asymmetric', 'asymmetric_paper', 'none'] = 'unit'
    """In the learner; the reported returns stay raw. `unit`: to [-1, 1]. `asymmetric`, for DMLab-30: 5 tanh(r / 5), and
    0.3 times that where r is negative, as in the released code. `asymmetric_paper`: 0.3 min(tanh r, 0) +
    5 max(tanh r, 0), as in the paper."""

    def __post_init__(self):
        require(
            self.function is None or ':' in self.function,
            f'loss.function must be a function of yours as module:function, got {self.function!r}',
        )
        require(0 <= self.discount <= 1, f'loss.discount must lie in [0, 1], got {self.discount}')
        for name in ('baseline_cost', 'entropy_cost'):
            value = getattr(self, name)
            require(value >= 0, f'loss.{name} must not be negative, got {value}')


@dataclasses.dataclass(frozen=True)
class PopArtConfig:
    """Value targets normalised per task (Hessel et al., 2018); see `impala_jax.popart`."""

    enabled: bool = False
    step_size: float = 3e-4
    """How far one value target moves its task's mean and second moment."""
    min_scale: float = 1e-4
    max_scale: float = 1e6
    """Bounds of a task's standard deviation."""

    def __post_init__(self):
        require(0 < self.step_size < 1, f'popart.step_size must lie in (0, 1), got {self.step_size}')
        require(
            0 < self.min_scale <= self.max_scale,
            f'popart.min_scale must be positive and at most popart.max_scale, got {self.min_scale} and '
            f'{self.max_scale}',
        )


class _NotSet(float):
    """The chosen optimiser's own epsilon: where another one is chosen later, as on the command line, that one's."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser; the learning rate belongs to a SUMMED loss and to TensorFlow's RMSProp."""

    name: str = 'rmsprop'
    """`rmsprop`, `adam`, or a function `module:function` of your own that makes an optax transformation (also
    `--optimizer module:function`): docs/extending.md."""
    learning_rate: float = 6e-4
    schedule: Literal['linear', 'constant'] = 'linear'
    """`linear`: to 0 over `schedule_frames`."""
    schedule_frames: int | None = None
    """Environment frames over which linear schedules, also that of the entropy cost, fall to 0; None: `total_frames`.
    Set it where `total_frames` will be raised later: otherwise the schedules jump back at that resume."""
    epsilon: float = _NotSet(_EPSILONS['rmsprop'])
    """RMSProp's stands inside the square root, as TensorFlow's does; Adam's outside, and where it is not set, it is
    1e-8."""
    decay: float = 0.99
    """RMSProp's decay; its accumulator starts at 1, as TensorFlow's does."""
    momentum: float = 0.0
    b1: float = 0.9
    """Adam."""
    b2: float = 0.999
    """Adam."""
    max_grad_norm: float = 40.0
    """The gradient's global norm is clipped to this; inf for no clipping."""

    def __post_init__(self):
        require(
            self.name in _EPSILONS or ':' in self.name,
            f'unknown optimizer.name {self.name!r}; {closest(self.name, _EPSILONS)}, or a function of yours as '
            'module:function',
        )
        if isinstance(self.epsilon, _NotSet):
            object.__setattr__(self, 'epsilon', _NotSet(_EPSILONS.get(self.name, _EPSILONS['adam'])))
        require_positive(
            'optimizer', learning_rate=self.learning_rate, epsilon=self.epsilon, max_grad_norm=self.max_grad_norm
        )
        if self.schedule_frames is not None:
            require_positive('optimizer', schedule_frames=self.schedule_frames)


@dataclasses.dataclass(frozen=True)
class PBTConfig:
    """Population based training (section 5.3.2, appendix F): `launch/pbt.py`, rules in `impala_jax.studies.pbt`.

    The first learning rate, entropy cost and epsilon of a member are drawn from the ranges here, and stand in its
    `config.json`. The defaults are the paper's, of DMLab-30; the interval, which it does not give, is ours.
    """

    member: int | None = None
    """Index of this run within the population in the workdir's parent; `launch/pbt.py` sets it. None outside one."""
    learning_rate: tuple[float, float] = (5e-6, 5e-3)
    """The first one is drawn log-uniformly between these."""
    entropy_cost: tuple[float, float] = (5e-5, 1e-2)
    """The first one is drawn log-uniformly between these."""
    epsilon: tuple[float, ...] = (1e-1, 1e-3, 1e-5, 1e-7)
    """The first one, of the optimiser, is drawn from these."""
    burn_in_frames: int = 20_000_000
    """Frames of a member before it first compares itself."""
    interval_frames: int = 10_000_000
    """Frames of a member from one comparison to the next."""
    threshold: float = 0.05
    """A member copies another whose fitness is better by more than this, absolute; inf: never, a random search."""
    mutation_probability: float = 0.33
    """Of each hyperparameter that was copied."""
    mutation_factor: float = 1.2
    """What is mutated is multiplied or divided by this."""

    def __post_init__(self):
        require(self.member is None or self.member >= 0, f'pbt.member must be 0 or more, got {self.member}')
        for name in ('learning_rate', 'entropy_cost'):
            low, high = getattr(self, name)
            require(0 < low <= high, f'pbt.{name} must be two positive numbers, the lower one first, got {low} {high}')
        require(
            len(self.epsilon) > 0 and min(self.epsilon) > 0, f'pbt.epsilon must be positive numbers, got {self.epsilon}'
        )
        require(self.burn_in_frames >= 0, f'pbt.burn_in_frames must be 0 or more, got {self.burn_in_frames}')
        require_positive('pbt', interval_frames=self.interval_frames)
        require(self.threshold >= 0, f'pbt.threshold must be 0 or more, got {self.threshold}')
        require(
            0 <= self.mutation_probability <= 1,
            f'pbt.mutation_probability must lie in [0, 1], got {self.mutation_probability}',
        )
        require(self.mutation_factor >= 1, f'pbt.mutation_factor must be 1 or more, got {self.mutation_factor}')
