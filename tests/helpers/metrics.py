"""Statistics and rows of a run, and consoles that keep what is printed."""

import io
import json
import re
import struct
from pathlib import Path

import numpy as np
from rich.console import Console

from impala_jax.config import Config
from impala_jax.rundir.files import METRICS, TENSORBOARD
from impala_jax.types import StepInfo

CONFIG = Config(total_frames=64_000)
FRAMES = CONFIG.total_frames


def info(*returns: float, restarts: int = 0, shape: tuple[int, int] = (4, 3)) -> StepInfo:
    """Counts [T, B] of steps in which these games ended."""
    episode_return, episode_ended = np.zeros(shape, np.float32), np.zeros(shape, bool)
    episode_return.reshape(-1)[: len(returns)] = returns
    episode_ended.reshape(-1)[: len(returns)] = True
    counts = np.zeros(shape, np.int32)
    counts[0, 0] = restarts
    return StepInfo(episode_return, episode_ended, counts)


def learner_row(frames: int) -> dict:
    """Row of a learner, without what actors count."""
    losses = {name: 1.5 for name in ('loss', 'policy_loss', 'baseline_loss', 'entropy', 'grad_norm', 'learning_rate')}
    return {'frames': frames, 'learner_steps': frames // 640, **losses}


def silent() -> Console:
    """Console that is not a terminal."""
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def terminal(width: int = 100) -> Console:
    """Console that is a terminal, of a width in characters."""
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, _environ={'TERM': 'xterm'}
    )


def shown(console: Console) -> str:
    """Text that was written, without colours."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r'\x1b\[[0-9;]*m', '', console.file.getvalue())


def rows(workdir: Path) -> list[dict]:
    """Rows of a run whose file has no torn line."""
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


def events(workdir: Path) -> list:
    """Events that TensorBoard reads."""
    from tensorboardX.proto import event_pb2

    (path,) = (workdir / TENSORBOARD).iterdir()
    content, events = path.read_bytes(), []
    while content:
        (size,) = struct.unpack('<Q', content[:8])  # TFRecord: size, its checksum, the data, its checksum
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))  # pyright: ignore[reportAttributeAccessIssue]
        content = content[16 + size :]
    return events
