"""What is broken, where and when: a case is drawn from its seed, and from what is installed."""

from __future__ import annotations

import importlib.util
import random
from typing import NamedTuple

RUNTIMES = ('lockstep', 'threads', 'launchpad', 'local_mp', 'pod', 'pbt', 'serve', 'sweep')
_NEED_LAUNCHPAD = ('launchpad', 'local_mp', 'serve')

SIGNALS = ('SIGTERM', 'SIGINT', 'SIGHUP')  # Handled: the run stops, and says that it can be resumed.
DISK = ('disk full', 'read-only', 'removed', 'replaced by a file')
DAMAGE = ('truncated', 'flipped', 'missing')
CONNECTION = ('cut', 'stalled', 'garbled')
TROUBLES = ('raises', 'exits', 'dies', 'aborts', 'hangs', 'nonsense')

# Relative frequencies.
_FAMILIES = {'signal': 32, 'kill': 20, 'stop': 12, 'disk': 12, 'damage': 10, 'environment': 14}
_SERVED = {'signal': 20, 'kill': 20, 'stop': 10, 'environment': 10, 'connection': 40}
_MOMENTS = {'start': 25, 'row': 20, 'checkpoint': 15, 'half': 20, 'evaluation': 20}
_QUICK = ('lockstep', 'threads', 'launchpad', 'pbt')


class Case(NamedTuple):
    """One run, and how it is broken."""

    seed: int
    runtime: str  # of RUNTIMES
    environment: str  # `catch` in the actors' process; in workers `steady`, `children`, `slow`; or the `dmlab` stand-in
    family: str  # of faults
    fault: str
    target: str  # Process: `main`, `any`, `group`, `all`, `actors`; checkpoints: `newest`, `all`; `once` or `always`.
    moment: str  # of _MOMENTS
    delay_s: float  # from the moment to the fault
    lasts_s: float | None  # What is stopped or disturbed goes on after this; None: never.
    victim: float  # in [0, 1): which process of those that there are, by age
    options: tuple[str, ...]  # of the run

    @property
    def kind(self) -> str:
        """Fault and target, as the table names them."""
        if self.family == 'damage':
            return f'checkpoint {self.fault}, {self.target}'
        if self.family == 'environment':
            return f'environment {self.fault} {self.target}'
        if self.family == 'connection':
            return f'connections {self.fault}'
        if self.family == 'disk':
            return f'workdir {self.fault}' if self.fault != 'disk full' else self.fault
        for_good = ' for good' if self.family == 'stop' and self.lasts_s is None else ''
        return f'{self.fault} to {self.target}{for_good}'

    @property
    def is_again_at_once(self) -> bool:
        """Whether the same command is started while others of the killed run may still be ending."""
        return self.fault == 'SIGKILL' and self.target in ('main', 'group') and self.victim < 0.5

    @property
    def line(self) -> str:
        """The case in one line."""
        when = {
            'start': 'after the start',
            'row': 'after the first row',
            'checkpoint': 'after the first checkpoint',
            'half': 'after half of the frames',
            'evaluation': 'after the last checkpoint',
        }[self.moment]
        text = f'seed {self.seed}: {self.runtime}, {self.environment}: {self.kind}'
        if self.family != 'environment':
            text += f', {self.delay_s:.2f} s {when}'
        if self.lasts_s is not None:
            text += f', for {self.lasts_s:.1f} s'
        if self.target == 'any':
            text += f', victim {self.victim:.2f}'
        if self.is_again_at_once:
            text += ', again at once'
        return text + (f' ({" ".join(self.options)})' if self.options else '')

    @property
    def is_quick(self) -> bool:
        """Whether it suits a check that should take minutes."""
        return (
            self.runtime in _QUICK
            and self.environment in ('catch', 'steady')
            and self.family in ('signal', 'kill', 'damage', 'environment')
            and (self.fault, self.target) != ('hangs', 'always')
        )


def installed() -> tuple[str, ...]:
    """The runtimes that can be started here."""
    has_launchpad = all(importlib.util.find_spec(name) for name in ('launchpad', 'reverb'))
    return tuple(name for name in RUNTIMES if has_launchpad or name not in _NEED_LAUNCHPAD)


def draw(seed: int, runtimes: tuple[str, ...]) -> Case:
    """The case of a seed, among `runtimes`."""
    rng = random.Random(seed)

    def weighted(weights: dict[str, int]) -> str:
        return rng.choices(list(weights), list(weights.values()))[0]

    runtime = rng.choice(runtimes)
    family = weighted(_SERVED if runtime == 'serve' else _FAMILIES)
    environment = weighted({'catch': 40, 'steady': 25, 'children': 10, 'slow': 10, 'dmlab': 15})
    moment = weighted(_MOMENTS)
    lasts_s = None
    if family == 'signal':
        fault = rng.choice(SIGNALS)
        target = weighted({'main': 45, 'group': 20, 'all': 15, 'any': 20})
    elif family == 'kill':
        fault, target = 'SIGKILL', weighted({'main': 35, 'any': 55, 'group': 10})
    elif family == 'stop':
        fault, target = 'SIGSTOP', weighted({'main': 30, 'any': 70})
        lasts_s = rng.uniform(1.0, 6.0)
        # Nothing bounds how long a cell or a member may take.
        if target == 'any' and rng.random() < 0.3 and runtime not in ('sweep', 'pbt'):
            lasts_s = None
    elif family == 'disk':
        fault, target = rng.choice(DISK), ''
    elif family == 'damage':
        fault, target = rng.choice(DAMAGE), weighted({'newest': 70, 'all': 30})
        moment = weighted({'checkpoint': 50, 'half': 50})
    elif family == 'connection':
        fault, target, lasts_s = rng.choice(CONNECTION), '', rng.uniform(0.2, 8.0)
        moment = weighted({'start': 20, 'row': 40, 'half': 40})
    else:
        fault, target = rng.choice(TROUBLES), weighted({'once': 60, 'always': 40})
        if runtime == 'serve':
            target = 'once'  # The learner waits for actors for as long as it takes.
    if runtime == 'serve' and target in ('main', 'any') and rng.random() < 0.5:
        target = 'actors'
    if runtime == 'sweep' and moment == 'evaluation':
        moment = 'half'  # A cell that is finished has no checkpoints.
    if family == 'environment':
        environment = weighted({'steady': 80, 'children': 20})
    if environment == 'slow':
        if family in ('signal', 'kill'):
            moment = 'start'  # While the resets last, nothing else comes.
        else:
            environment = 'steady'
    if runtime == 'sweep' and environment == 'dmlab':
        environment = 'steady'
    if moment == 'start':
        delay_s = rng.uniform(0.5, 35.0 if environment == 'slow' else 9.0)
    else:
        delay_s = rng.uniform(0.0, 1.0)
    victim = rng.random()
    return Case(
        seed, runtime, environment, family, fault, target, moment, delay_s, lasts_s, victim, _options(rng, runtime)
    )


def _options(rng: random.Random, runtime: str) -> tuple[str, ...]:
    """Drawn whether or not they fit, so that a case changes as little as possible with the others."""
    lag, replay, core, inference, actors = (rng.random() for _ in range(5))
    options = []
    if runtime == 'lockstep' and lag < 0.3:
        options += ['--policy-lag', '2']
    if runtime not in ('serve', 'sweep') and replay < 0.2:
        options += ['--replay.fraction', '0.5', '--replay.capacity', '100']
    if core < 0.2:
        options += ['--network.core', 'lstm', '--network.lstm-size', '16']
    if runtime in ('threads', 'launchpad') and inference < 0.2:
        options += ['--actor.inference', 'accelerator']
    if runtime != 'serve':
        options += ['--actor.num-actors', '1' if actors < 0.4 else '2']
    return tuple(options)
