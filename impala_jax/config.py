"""Configuration: frozen dataclasses, validated on construction; derived values are properties.

The defaults are the paper's (Espeholt et al., 2018, appendix G, Atari). A file in `configs/` overrides what its
experiment needs; the command line overrides the file. Nothing here builds an environment or imports JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from impala_jax.system.machine import num_cores


class ConfigError(Exception):
    """A value that cannot work: the message names the field, the value and the remedy, in one line."""


def closest(name: str, known: Iterable[str], prefix: str = '', usable: Callable[[str], bool] = lambda _: True) -> str:
    """'did you mean ...?' with the names in `known` nearest to `name`, at most three; '' where there are none.

    Args:
      prefix: What stands before a name in the message.
      usable: Whether a name is worth suggesting; asked of the nearest ten only.
    """
    known = list(known)
    for cutoff in (0.4, 0.0):
        near = filter(usable, difflib.get_close_matches(name, known, n=10, cutoff=cutoff))
        close = [repr(prefix + other) for other in itertools.islice(near, 3)]
        if close:
            return f'did you mean {" or ".join(close)}?'
    return ''


def import_object(field: str, path: str) -> Any:
    """What `path`, module:name, stands for in the field of a configuration.

    Raises:
      ConfigError: it cannot be imported.
    """
    module, _, name = path.partition(':')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'{field} {path!r} cannot be imported: {error}') from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f'{owner}.{name} must be positive, got {value}')


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """Which task, and how it is stepped."""

    name: str = 'catch'
    """`catch`, `catch_memory`, `delayed_bandit`, `bsuite/catch/0`, `atari/pong`, `dmlab/rooms_watermaze`,
    `gymnasium/CartPole-v1`, `gymnasium/minigrid:MiniGrid-Empty-5x5-v0` (after importing `minigrid`), or a factory
    `module:function` that is called as `function(seed=...)` and returns a dm_env.Environment or a gymnasium.Env; or one
    of the suites `atari57`, `dmlab30` and `minisuite`, whose tasks are spread evenly over all actors' environments."""
    preset: Literal['paper', 'machado'] = 'paper'
    """Atari only. `paper`: 1 to 30 no-ops at the start, the minimal action set, episodes end at life loss in training.
    `machado` (Machado et al., 2018): sticky actions with probability .25, all 18 actions, episodes are games."""
    full_action_space: bool | None = None
    """Atari only: all 18 actions, or the game's minimal set. None: as the preset has it; all 18 in `atari57`."""
    action_repeat: int | None = None
    """Environment frames in one agent step; all budgets and metrics count frames. None: 4 on Atari and DeepMind Lab, 1
    elsewhere. For a factory it only states what the environment itself does."""
    max_failures: int = 3
    """An environment that fails this many times without finishing an episode in between ends the run."""
    processes: int = 0
    """Worker processes an actor spreads its environments over. 0: none for the built-in environments (which step
    faster inside the actor), one an environment for DeepMind Lab, and as many as there are cores, at most one an
    environment, for the others."""
    renderer: Literal['software', 'hardware'] = 'software'
    """DeepMind Lab only: pictures are drawn by the CPU, or by a GPU."""
    level_cache: str = '~/.cache/impala_jax/dmlab_levels'
    """DeepMind Lab only: a folder for compiled maps, shared by all processes and runs; '' for none."""
    dataset_path: str = ''
    """DeepMind Lab only: the folder of pictures that two of DMLab-30's psychlab levels need; `dummy` for plain colours,
    which are another task than the paper's."""

    def __post_init__(self):
        _require(bool(self.name), 'environment.name is empty; try --environment.name catch')
        _require_positive('environment', max_failures=self.max_failures)
        if self.action_repeat is not None:
            _require_positive('environment', action_repeat=self.action_repeat)
        _require(self.processes >= 0, f'environment.processes must be 0 or more, got {self.processes}')
        _require(
            not (self.processes and self.name.startswith('dmlab/')),
            f'environment.processes {self.processes}: each environment of DeepMind Lab has a process of its own; leave '
            'it at 0',
        )

    @property
    def frames_per_step(self) -> int:
        """Environment frames in one agent step."""
        if self.action_repeat is not None:
            return self.action_repeat
        return 4 if self.name in ('atari57', 'dmlab30') or self.name.startswith(('atari/', 'dmlab/')) else 1


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
        _require(
            self.torso in known or ':' in self.torso,
            f'unknown network.torso {self.torso!r}; {closest(self.torso, known)}, or a class of yours as module:Class',
        )
        _require(
            self.core in ('feedforward', 'lstm') or ':' in self.core,
            f'unknown network.core {self.core!r}; {closest(self.core, ("feedforward", "lstm"))}, or a class of yours '
            'as module:Class',
        )
        _require(
            self.module is None or ':' in self.module,
            f'network.module must be a class of yours as module:Class, got {self.module!r}',
        )
        _require(
            math.isfinite(self.lstm_forget_bias),
            f'network.lstm_forget_bias must be finite, got {self.lstm_forget_bias}',
        )
        _require_positive('network', lstm_size=self.lstm_size, num_word_ids=self.num_word_ids)
        if self.uint8_scale is not None:
            _require_positive('network', uint8_scale=self.uint8_scale)


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
    implementation: Literal['auto', 'scan', 'associative_scan'] = 'auto'
    """How the recurrence is compiled; the results are the same. `auto`: what was measured to be faster there."""
    correction: Literal['vtrace', 'one_step_is', 'epsilon_correction', 'none'] = 'vtrace'
    """How off-policy data is corrected (section 5.2.2, table 2). `one_step_is`: the advantage times pi/mu, uncorrected
    value targets; `epsilon_correction`: no ratios, log(pi + 1e-6) in the policy gradient; `none`: as if on-policy."""

    def __post_init__(self):
        for name in ('rho_bar', 'c_bar', 'pg_rho_bar'):
            value = getattr(self, name)
            _require(value > 0, f'vtrace.{name} must be positive (inf for no truncation), got {value}')
        _require(0 <= self.lambda_ <= 1, f'vtrace.lambda must lie in [0, 1], got {self.lambda_}')
        _require(
            self.c_bar <= self.rho_bar or self.outside_theory,
            f'vtrace.c_bar {self.c_bar} is above vtrace.rho_bar {self.rho_bar}, outside the theory; '
            'lower c_bar, or set --vtrace.outside-theory',
        )
        if self.correction != 'vtrace':
            for name in ('rho_bar', 'c_bar', 'pg_rho_bar'):
                value = getattr(self, name)
                _require(
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
        _require(0 <= self.fraction < 1, f'replay.fraction must lie in [0, 1), got {self.fraction}')
        _require_positive('replay', capacity=self.capacity)


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
        _require(
            self.function is None or ':' in self.function,
            f'loss.function must be a function of yours as module:function, got {self.function!r}',
        )
        _require(0 <= self.discount <= 1, f'loss.discount must lie in [0, 1], got {self.discount}')
        for name in ('baseline_cost', 'entropy_cost'):
            value = getattr(self, name)
            _require(value >= 0, f'loss.{name} must not be negative, got {value}')


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
        _require(0 < self.step_size < 1, f'popart.step_size must lie in (0, 1), got {self.step_size}')
        _require(
            0 < self.min_scale <= self.max_scale,
            f'popart.min_scale must be positive and at most popart.max_scale, got {self.min_scale} and '
            f'{self.max_scale}',
        )


_EPSILONS = {'rmsprop': 0.01, 'adam': 1e-8}


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
        _require(
            self.name in _EPSILONS or ':' in self.name,
            f'unknown optimizer.name {self.name!r}; {closest(self.name, _EPSILONS)}, or a function of yours as '
            'module:function',
        )
        if isinstance(self.epsilon, _NotSet):
            object.__setattr__(self, 'epsilon', _NotSet(_EPSILONS.get(self.name, _EPSILONS['adam'])))
        _require_positive(
            'optimizer', learning_rate=self.learning_rate, epsilon=self.epsilon, max_grad_norm=self.max_grad_norm
        )
        if self.schedule_frames is not None:
            _require_positive('optimizer', schedule_frames=self.schedule_frames)


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The batched update."""

    batch_size: int = 32
    """Trajectories in an update, over all devices of all hosts."""
    unroll_length: int = 20
    """Transitions in a trajectory (n in the paper)."""
    num_devices: int | None = None
    """Devices of each host to split the batch over; None: all."""
    queue_capacity: int | None = None
    """Trajectories that wait at most, on each host, before actors block; None: two of the host's batches (but at least
    one unroll of each actor)."""
    max_nonfinite_updates: int = 10
    """An update whose gradient is not finite is skipped and counted; this many in a row end the run."""

    def __post_init__(self):
        _require_positive(
            'learner',
            batch_size=self.batch_size,
            unroll_length=self.unroll_length,
            max_nonfinite_updates=self.max_nonfinite_updates,
        )
        if self.num_devices is not None:
            _require_positive('learner', num_devices=self.num_devices)
            _require(
                self.batch_size % self.num_devices == 0,
                f'learner.batch_size {self.batch_size} does not divide over {self.num_devices} devices; '
                f'try {math.ceil(self.batch_size / self.num_devices) * self.num_devices}',
            )


_number_or_auto = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar='INT|auto',
    instance_from_str=lambda words: num_cores() if words[0] == 'auto' else int(words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclasses.dataclass(frozen=True)
class ActorConfig:
    """Actors; each steps a vector of environments with one batched inference a step."""

    num_actors: Annotated[int, _number_or_auto] = dataclasses.field(default_factory=num_cores)
    """Of each host; `auto`, and the default: one a core. 0 only with `serve_actors`: all act on other machines."""
    num_envs: int = 16
    """Environments an actor."""
    inference: Literal['actor', 'accelerator'] = 'actor'
    """Where actors run the network. `actor`: each by itself, on the CPU. `accelerator`: on the learner's devices, the
    requests of all actors in one batch (`impala_jax.inference`), for networks that are too slow for the CPU; runtimes
    `threads` and `launchpad` with `local_mt`. Actors of other machines always run it themselves."""
    inference_wait_ms: float = 2.0
    """`accelerator`: how long the first request of a batch waits for those of other actors."""

    def __post_init__(self):
        _require(
            self.inference_wait_ms >= 0, f'actor.inference_wait_ms must be 0 or more, got {self.inference_wait_ms}'
        )
        _require(self.num_actors >= 0, f'actor.num_actors must be 0 or more, got {self.num_actors}')
        _require_positive('actor', num_envs=self.num_envs)


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """The evaluator plays whole episodes with the newest parameters, beside training and once more at the end."""

    episodes: int = 20
    """Episodes an evaluation, of each task of a suite; 0 for no evaluator."""
    interval_s: float = 60.0
    """Pause between two evaluations, s."""
    num_envs: int = 10
    """Environments stepped together; at most `episodes` are used."""
    greedy: bool = False
    """Play the most likely action; the paper samples."""
    max_episode_steps: int = 27_000
    """Agent steps after which an episode of an evaluation is truncated, so that every evaluation ends. The default is
    half an hour of an Atari game, the usual limit there."""

    def __post_init__(self):
        _require(self.episodes >= 0, f'evaluator.episodes must be 0 or more, got {self.episodes}')
        _require_positive(
            'evaluator',
            num_envs=self.num_envs,
            interval_s=self.interval_s,
            max_episode_steps=self.max_episode_steps,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written; one more is written at the end, and on SIGTERM and SIGINT."""

    interval_s: float = 300.0
    keep: int = 3
    """The newest this many are kept; at least 2, so that a damaged one never loses the run."""

    def __post_init__(self):
        _require_positive('checkpoint', interval_s=self.interval_s)
        _require(self.keep >= 2, f'checkpoint.keep must be 2 or more, got {self.keep}')


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """When a row of metrics is written."""

    interval_s: float = 2.0
    """Runtimes `threads` and `launchpad`."""
    interval_updates: int = 50
    """Runtime `lockstep`, whose rows must not depend on the clock."""

    def __post_init__(self):
        _require_positive('logging', interval_s=self.interval_s, interval_updates=self.interval_updates)


@dataclasses.dataclass(frozen=True)
class PBTConfig:
    """Population based training (section 5.3.2, appendix F): `launch/pbt.py`, rules in `impala_jax.studies.pbt`.

    The first learning rate, entropy cost and epsilon of a member are drawn from the ranges here, and stand in its
    `config.json`. The defaults are the paper's, of DMLab-30; the interval, which it does not give, is ours.
    """

    member: int | None = None
    """Which member of the population in the workdir's parent this run is; `launch/pbt.py` sets it. None: of none."""
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
        _require(self.member is None or self.member >= 0, f'pbt.member must be 0 or more, got {self.member}')
        for name in ('learning_rate', 'entropy_cost'):
            low, high = getattr(self, name)
            _require(0 < low <= high, f'pbt.{name} must be two positive numbers, the lower one first, got {low} {high}')
        _require(
            len(self.epsilon) > 0 and min(self.epsilon) > 0, f'pbt.epsilon must be positive numbers, got {self.epsilon}'
        )
        _require(self.burn_in_frames >= 0, f'pbt.burn_in_frames must be 0 or more, got {self.burn_in_frames}')
        _require_positive('pbt', interval_frames=self.interval_frames)
        _require(self.threshold >= 0, f'pbt.threshold must be 0 or more, got {self.threshold}')
        _require(
            0 <= self.mutation_probability <= 1,
            f'pbt.mutation_probability must lie in [0, 1], got {self.mutation_probability}',
        )
        _require(self.mutation_factor >= 1, f'pbt.mutation_factor must be 1 or more, got {self.mutation_factor}')


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    total_frames: int = 200_000_000
    """Environment frames to train for, action repeat included; rounded up to whole updates."""
    seed: int = 0
    environment: EnvironmentConfig = EnvironmentConfig()
    network: NetworkConfig = NetworkConfig()
    vtrace: VTraceConfig = VTraceConfig()
    loss: LossConfig = LossConfig()
    popart: PopArtConfig = PopArtConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    actor: ActorConfig = ActorConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    pbt: PBTConfig = PBTConfig()
    policy_lag: int = 0
    """Runtime `lockstep`: actors act with parameters exactly this many updates old."""
    launch_type: Literal['local_mt', 'local_mp'] = 'local_mt'
    """Runtime `launchpad`: nodes are threads of one process, or processes."""
    serve_actors: int | None = None
    """Runtime `launchpad`: the port at which actors of other machines join (`launch/actors.py`); anybody who reaches it
    is let in. None: a free port, and no others join."""
    timeout_s: float = 300.0
    """No wait of one part for another lasts longer than this; covers compilation and the slowest reset, s."""

    def __post_init__(self):
        for name, value in (('total_frames', self.total_frames), ('timeout_s', self.timeout_s)):
            _require(value > 0, f'{name} must be positive, got {value}')
        _require(self.policy_lag >= 0, f'policy_lag must be 0 or more, got {self.policy_lag}')
        _require(0 <= self.seed < 2**31, f'seed must lie in [0, 2**31), got {self.seed}')
        _require(
            self.serve_actors is None or 0 < self.serve_actors < 2**16,
            f'serve_actors must be a port from 1 to 65535, got {self.serve_actors}',
        )
        _require(
            self.actor.num_actors > 0 or self.serve_actors is not None,
            'actor.num_actors is 0, and nobody else acts: give it some, or let actors of other machines join with '
            '--serve-actors PORT',
        )
        _require(
            self.optimizer.schedule == 'constant' or self.schedule_updates >= self.total_updates,
            f'optimizer.schedule_frames {self.optimizer.schedule_frames} is below total_frames {self.total_frames}: '
            'the learning rate would be 0 from there on, and nothing learned; raise it',
        )
        replayed = self.replay.fraction * self.learner.batch_size
        _require(
            replayed == int(replayed),
            f'replay.fraction {self.replay.fraction} of learner.batch_size {self.learner.batch_size} is no whole '
            'number of trajectories; change either',
        )
        capacity = self.learner.queue_capacity
        _require(
            capacity is None or capacity >= self.num_fresh,
            f'learner.queue_capacity {capacity} is below the {self.num_fresh} trajectories of a batch that come from '
            f'the queue: no batch could ever be complete; try {2 * self.num_fresh}',
        )

    @property
    def num_replayed(self) -> int:
        """Trajectories of a batch that come from replay."""
        return int(self.replay.fraction * self.learner.batch_size)

    @property
    def num_fresh(self) -> int:
        """Trajectories of a batch that come from the queue; they stand first."""
        return self.learner.batch_size - self.num_replayed

    @property
    def frames_per_update(self) -> int:
        """Environment frames consumed by one update; what is replayed does not count again."""
        return self.num_fresh * self.learner.unroll_length * self.environment.frames_per_step

    @property
    def total_updates(self) -> int:
        """Updates in the whole run."""
        return -(-self.total_frames // self.frames_per_update)

    @property
    def schedule_updates(self) -> int:
        """Updates over which linear schedules fall to 0."""
        frames = self.optimizer.schedule_frames
        return self.total_updates if frames is None else -(-frames // self.frames_per_update)

    @property
    def queue_capacity(self) -> int:
        """Trajectories that wait at most before actors block."""
        if self.learner.queue_capacity is not None:
            return self.learner.queue_capacity
        return max(2 * self.num_fresh, self.actor.num_actors * self.actor.num_envs)


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with fields set by their names on the command line, as in `{'vtrace.rho_bar': 2.0, 'seed': 1}`.

    All are set at once, so that only the result must be valid.

    Raises:
      ConfigError: a field that does not exist, named with the closest one that does, or a value that cannot work.
    """
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        get(config, name)
        owner, _, field = name.rpartition('.')
        nested.setdefault(owner, {})[_PYTHON_NAMES.get(field, field)] = value
    plain = nested.pop('', {})
    owners = {owner: dataclasses.replace(getattr(config, owner), **fields) for owner, fields in nested.items()}
    return dataclasses.replace(config, **plain, **owners)


def get(config: Config, name: str) -> Any:
    """The value of a field by its name on the command line, as in `vtrace.lambda`.

    Raises:
      ConfigError: there is no such field; the closest one is named.
    """
    known = {field.replace('lambda_', 'lambda') for field in to_flat_dict(config)}
    if name not in known:
        raise ConfigError(f'unknown configuration field {name!r}; {closest(name, known)}')
    value = config
    for part in name.split('.'):
        value = getattr(value, _PYTHON_NAMES.get(part, part))
    return value


# Fields whose name on the command line is a keyword in Python.
_PYTHON_NAMES = {'lambda': 'lambda_'}


# What may differ between a checkpoint and the configuration that resumes it: how and where the run is executed, but
# nothing that changes what is learned.
_RESUMABLE = (
    'actor',
    'checkpoint',
    'environment.level_cache',
    'environment.max_failures',
    'environment.processes',
    'environment.renderer',
    'evaluator',
    'launch_type',
    'learner.max_nonfinite_updates',
    'learner.num_devices',
    'learner.queue_capacity',
    'logging',
    'optimizer.schedule_frames',
    'serve_actors',
    'timeout_s',
    'total_frames',
    'vtrace.implementation',
    'vtrace.outside_theory',
)


def to_dict(config: Any) -> dict[str, Any]:
    """A nested dict of JSON values; infinities are the strings 'inf' and '-inf', which JSON lacks."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _to_json(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def to_flat_dict(config: Config) -> dict[str, Any]:
    """The values of `to_dict` by the fields' names, as in `learner.batch_size`."""
    return _flatten(to_dict(config))


def from_dict(values: dict[str, Any], cls: type = Config, owner: str = '') -> Any:
    """The inverse of `to_dict`; fields that are absent take their defaults.

    Raises:
      ConfigError: a field that does not exist, named with the closest one that does.
    """
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    for name in sorted(unknown):
        raise ConfigError(f'unknown configuration field {owner}{name!r}; {closest(name, hints)}')
    kwargs = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name], f'{owner}{name}.')  # pyright: ignore[reportArgumentType]
        elif isinstance(value, list):
            value = tuple(value)
        elif value in ('inf', '-inf'):
            value = float(value)
        kwargs[name] = value
    return cls(**kwargs)


def upgraded(values: dict[str, Any], resumed_by: Config | None = None) -> dict[str, Any]:
    """A `to_dict` that an older version may have written, as this version means it.

    Args:
      values: as `to_dict` gives them.
      resumed_by: Where both make the same network of images, the values of this configuration are preferred.
    """
    network = values.get('network', {})
    if 'torso' not in network or 'uint8_scale' in network:
        return values
    torso = 'auto' if network['torso'] == 'shallow' else network['torso']  # Once all but images passed an MLP.
    scale = 255.0
    if resumed_by is not None:
        torso = 'shallow' if (torso, resumed_by.network.torso) == ('auto', 'shallow') else torso
        scale = None if resumed_by.network.uint8_scale is None else scale
    return values | {'network': network | {'torso': torso, 'uint8_scale': scale}}


def differences(old: Config, new: Config, where: str = 'in the checkpoint') -> list[str]:
    """The fields, one line each, by which `new` cannot resume a run of `old`, which stands `where`."""
    old_flat, new_flat = to_flat_dict(old), to_flat_dict(new)
    return [
        f'{name}: {old_flat.get(name)!r} {where}, {new_flat.get(name)!r} now'
        for name in sorted(set(old_flat) | set(new_flat))
        if old_flat.get(name) != new_flat.get(name)
        and not any(name == free or name.startswith(free + '.') for free in _RESUMABLE)
    ]


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value
    return flat


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return 'inf' if value > 0 else '-inf'
    return list(value) if isinstance(value, tuple) else value
