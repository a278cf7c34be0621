"""Configuration of the algorithm: network, loss, replay, optimiser and population based training."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from impala_jax.config.checks import closest, require, require_positive

_EPSILONS = {'rmsprop': 0.01, 'adam': 1e-8}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network: a torso per observation, and a core (figure 3 of the paper)."""

    torso: str = 'auto'
    """Torso for observations: `shallow` (2 convolutions, figure 3 left), `shallow_atari` (3 convolutions), `deep` (15
    convolutions, figure 3 right), `minatar` (1 convolution, as in Young and Tian, 2019), `mlp`, `auto` (`shallow` for
    images, `mlp` for other observations), or a flax module of your own as `module:Class` (docs/extending.md). An image
    torso requires an image in the observation; vectors next to the image have an MLP."""
    centre_filters: bool = False
    """Whether the shallow torsos subtract the mean from each filter of the first convolution, at every use. The filters
    then do not respond to uniform areas such as the background, which could otherwise push their ReLUs to zero for
    good."""
    core: str = 'feedforward'
    """Core of the network: `feedforward` (no core), `lstm`, or a flax module of your own as `module:Class`
    (docs/extending.md)."""
    module: str | None = None
    """Flax module of your own that replaces torso, core and heads, as `module:Class` (docs/extending.md). Also
    `--network module:Class`."""
    lstm_size: int = 256
    """Size of the core, including a core of your own."""
    lstm_forget_bias: float = 1.0
    """Initial bias of the forget gates of the LSTM and the instruction encoder. With 1, as in the paper's code, an LSTM
    initially retains most of its state."""
    mlp_sizes: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers of the `mlp` torso."""
    instructions: bool = True
    """Whether the network reads the instruction in an observation; otherwise it is ignored."""
    num_word_ids: int = 1001
    """Number of word ids in instructions, including 0 for padding. The paper's environment hashes words into 1000
    ids."""
    uint8_scale: float | None = None
    """Divisor of uint8 observations. None: the upper bound that the environment states, else 255. Set it if the values
    are far below that bound, as in MiniGrid (10)."""
    compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Dtype of the layers before the heads, the same for actors and learner. Parameters, state of the core, heads,
    V-trace, loss and optimiser are always float32. A torso of your own chooses its dtype itself."""

    def __post_init__(self):
        known = ('auto', 'shallow', 'shallow_atari', 'deep', 'minatar', 'mlp')
        require(
            self.torso in known or ':' in self.torso,
            f'unknown network.torso {self.torso!r}; {closest(self.torso, known)}, or your own class as module:Class',
        )
        require(
            self.core in ('feedforward', 'lstm') or ':' in self.core,
            f'unknown network.core {self.core!r}; {closest(self.core, ("feedforward", "lstm"))}, or your own class as '
            'module:Class',
        )
        require(
            self.module is None or ':' in self.module,
            f'network.module must be your own class as module:Class, got {self.module!r}',
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
    """The off-policy correction, and the truncation levels of V-trace (section 4.1); `inf` disables a truncation."""

    rho_bar: float = 1.0
    """Truncation level of the ratios rho in the temporal differences; determines the fixed point."""
    c_bar: float = 1.0
    """Truncation level of the trace coefficients c; determines the speed of convergence. The theory assumes
    c_bar <= rho_bar."""
    pg_rho_bar: float = 1.0
    """Truncation level of the ratios rho in the advantages of the policy gradient."""
    lambda_: Annotated[float, tyro.conf.arg(name='lambda')] = 1.0
    """Factor of the trace coefficients c (remark 2), in [0, 1]."""
    outside_theory: bool = False
    """Whether to allow c_bar > rho_bar, which Theorem 1 does not cover and for which V-trace can diverge
    (`impala_jax.tabular`)."""
    implementation: Literal['auto', 'scan', 'associative_scan', 'rlax'] = 'auto'
    """Implementation of V-trace; results agree up to rounding. `auto`: the fastest one on the device. `rlax`: the
    function of that library, as a reference, which requires c_bar and lambda to be 1."""
    correction: Literal['vtrace', 'one_step_is', 'epsilon_correction', 'none'] = 'vtrace'
    """Off-policy correction (section 5.2.2, table 2). `one_step_is`: advantages multiplied by pi/mu, uncorrected value
    targets. `epsilon_correction`: no ratios, and log(pi + 1e-6) in the policy gradient. `none`: data is treated as
    on-policy."""

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
                    f"vtrace.{field} {value!r}: vtrace.implementation 'rlax' supports {only!r} only; use another "
                    'implementation',
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
    """Experience replay (section 5.2.2), with uniform sampling and first-in-first-out removal."""

    fraction: float = 0.0
    """Fraction of each batch that is replayed, in [0, 1); 0.5 in the paper. Replayed trajectories do not count as
    frames."""
    capacity: int = 10_000
    """Largest number of trajectories in replay."""

    def __post_init__(self):
        require(0 <= self.fraction < 1, f'replay.fraction must lie in [0, 1), got {self.fraction}')
        require_positive('replay', capacity=self.capacity)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss, which is a SUM over time and batch."""

    function: str | None = None
    """Loss of your own that replaces IMPALA's, as `module:function` (docs/extending.md). Also
    `--loss module:function`."""
    discount: float = 0.99
    """Discount factor gamma."""
    baseline_cost: float = 0.5
    """Weight of the baseline loss, half the squared error of the values."""
    entropy_cost: float = 0.01
    """Weight of the entropy bonus."""
    entropy_schedule: Literal['linear', 'constant'] = 'constant'
    """Schedule of the entropy cost: `constant`, as in the paper, or `linear` to 0 over
    `optimizer.schedule_frames`."""
    reward_clip: Literal['unit', 'asymmetric', 'asymmetric_paper', 'none'] = 'unit'
    """Reward clipping in the loss; reported returns are raw. `unit`: to [-1, 1]. `asymmetric`, for DMLab-30:
    5 tanh(r / 5), multiplied by 0.3 if r is negative, as in the released code. `asymmetric_paper`: 0.3 min(tanh r, 0) +
    5 max(tanh r, 0), as in the paper."""

    def __post_init__(self):
        require(
            self.function is None or ':' in self.function,
            f'loss.function must be your own function as module:function, got {self.function!r}',
        )
        require(0 <= self.discount <= 1, f'loss.discount must lie in [0, 1], got {self.discount}')
        for name in ('baseline_cost', 'entropy_cost'):
            value = getattr(self, name)
            require(value >= 0, f'loss.{name} must not be negative, got {value}')


@dataclasses.dataclass(frozen=True)
class PopArtConfig:
    """PopArt: normalisation of value targets per task (Hessel et al., 2018)."""

    enabled: bool = False
    """Whether to normalise value targets."""
    step_size: float = 3e-4
    """Step size per value target of the running mean and second moment."""
    min_scale: float = 1e-4
    """Lower bound of a task's standard deviation."""
    max_scale: float = 1e6
    """Upper bound of a task's standard deviation."""

    def __post_init__(self):
        require(0 < self.step_size < 1, f'popart.step_size must lie in (0, 1), got {self.step_size}')
        require(
            0 < self.min_scale <= self.max_scale,
            f'popart.min_scale must be positive and at most popart.max_scale, got {self.min_scale} and '
            f'{self.max_scale}',
        )


class _NotSet(float):
    """Default epsilon of the chosen optimiser; changes with the optimiser, as when the command line replaces it."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser. The default learning rate is for a SUMMED loss and RMSProp as in TensorFlow."""

    name: str = 'rmsprop'
    """Optimiser: `rmsprop`, `adam`, or a function of your own that returns an optax transformation, as
    `module:function` (docs/extending.md). Also `--optimizer module:function`."""
    learning_rate: float = 6e-4
    """Learning rate at the start of the run."""
    schedule: Literal['linear', 'constant'] = 'linear'
    """Schedule of the learning rate: `constant`, or `linear` to 0 over `schedule_frames`."""
    schedule_frames: int | None = None
    """Environment frames after which linear schedules, including that of the entropy cost, reach 0; None:
    `total_frames`. Set it if `total_frames` will be raised later; otherwise the schedules jump back when the run is
    resumed."""
    epsilon: float = _NotSet(_EPSILONS['rmsprop'])
    """Epsilon of the optimiser. RMSProp has it inside the square root, as in TensorFlow; Adam has it outside, with
    default 1e-8."""
    decay: float = 0.99
    """Decay of RMSProp's accumulator, which starts at 1, as in TensorFlow."""
    momentum: float = 0.0
    """Momentum of RMSProp."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    max_grad_norm: float = 40.0
    """Largest global norm of the gradient, to which it is clipped; inf for no clipping."""

    def __post_init__(self):
        require(
            self.name in _EPSILONS or ':' in self.name,
            f'unknown optimizer.name {self.name!r}; {closest(self.name, _EPSILONS)}, or your own function as '
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
    """Population based training (section 5.3.2, appendix F), for `launch/pbt.py`.

    The initial learning rate, entropy cost and epsilon of each member are sampled from the ranges here, and written to
    its `config.json`. The defaults are those of the paper for DMLab-30, except the interval, which it does not state.
    """

    member: int | None = None
    """Index of this run within its population; None outside a population. Set by `launch/pbt.py`."""
    learning_rate: tuple[float, float] = (5e-6, 5e-3)
    """Range of the initial learning rate, sampled log-uniformly."""
    entropy_cost: tuple[float, float] = (5e-5, 1e-2)
    """Range of the initial entropy cost, sampled log-uniformly."""
    epsilon: tuple[float, ...] = (1e-1, 1e-3, 1e-5, 1e-7)
    """Choices for the epsilon of the optimiser, sampled uniformly."""
    burn_in_frames: int = 20_000_000
    """Environment frames of a member before its first comparison."""
    interval_frames: int = 10_000_000
    """Environment frames of a member between comparisons."""
    threshold: float = 0.05
    """Absolute difference in fitness above which a member copies a better one; inf for a random search without
    copies."""
    mutation_probability: float = 0.33
    """Probability of mutation of each copied hyperparameter."""
    mutation_factor: float = 1.2
    """Factor by which a mutation multiplies or divides a hyperparameter."""

    def __post_init__(self):
        require(self.member is None or self.member >= 0, f'pbt.member must be 0 or more, got {self.member}')
        for name in ('learning_rate', 'entropy_cost'):
            low, high = getattr(self, name)
            require(0 < low <= high, f'pbt.{name} must be two positive numbers in ascending order, got {low} {high}')
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
