"""Names of the files in a run's folder, and the atomic write of one of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

METRICS = 'metrics.jsonl'
EVALUATIONS = 'evaluations.jsonl'
SCHEDULE = 'pbt.jsonl'
RUN_CONFIG = 'config.json'
TENSORBOARD = 'tensorboard'


def write_atomically(path: Path, content: str) -> None:
    """Writes a file whose readers see all of it or what was there before."""
    temporary = path.with_name(f'.{re.sub(r"[^a-z.]", "", path.name)}-{os.getpid()}')
    try:
        with temporary.open('w', encoding='utf-8', errors='backslashreplace') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
