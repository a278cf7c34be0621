"""The verdicts, a JSON line per case, and the table of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import RUNTIMES, Case
from .experiment import FAILED, KEPT, NOT_APPLIED, SKIPPED


class Results:
    """The file of verdicts, which are kept by seed and by the version of the code.

    Args:
      path: Of the file; made when missing.
      version: Of the code, and of the Python, that is judged now.
    """

    def __init__(self, path: Path, version: str):
        self._path = path
        self._version = version
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self, every_version: bool = False) -> list[dict[str, Any]]:
        """The newest verdict on each seed, of this version or on each seed and version."""
        newest = {}
        for row in self._read():
            if every_version or row['version'] == self._version:
                newest[row['version'], row['seed']] = row
        return list(newest.values())

    def known(self, case: Case) -> dict[str, Any] | None:
        """The verdict on a case, if there is one."""
        rows = [row for row in self.rows() if row['seed'] == case.seed and row['line'] == case.line]
        return rows[-1] if rows else None

    def add(self, verdict: dict[str, Any]) -> None:
        line = json.dumps(verdict | {'version': self._version}) + '\n'
        with self._lock, open(self._path, 'a', encoding='utf-8') as file:
            file.write(line)

    def _read(self) -> Iterable[dict[str, Any]]:
        if not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text(encoding='utf-8').splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # Torn by a kill.
        return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line per kind of fault, a column per runtime, in each cell `as promised / cases`."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    outcomes = Counter()
    for row in rows:
        outcomes[row['outcome']] += 1
        if row['outcome'] in (KEPT, FAILED):
            for kind in (row['kind'], ''):
                for runtime in (row['runtime'], ''):
                    counts.setdefault((kind, runtime), Counter())[row['outcome']] += 1

    def cell(kind: str, runtime: str) -> str:
        count = counts.get((kind, runtime))
        return '' if count is None else f'{count[KEPT]}/{count.total()}'

    columns = [*RUNTIMES, '']
    lines = [f'| fault | {" | ".join(RUNTIMES)} | all |', f'|---|{"---|" * len(columns)}']
    for kind in sorted({kind for kind, _ in counts if kind}) + ['']:
        lines.append(f'| {kind or "all"} | {" | ".join(cell(kind, runtime) for runtime in columns)} |')
    judged = outcomes[KEPT] + outcomes[FAILED]
    lines += [
        '',
        f'{judged} cases: {outcomes[KEPT]} as promised, {outcomes[FAILED]} failed. Beside them {outcomes[NOT_APPLIED]} '
        f'whose run was over before the fault, and {outcomes[SKIPPED]} that this machine cannot make.',
    ]
    return '\n'.join(lines)


def in_a_line(verdict: dict[str, Any]) -> str:
    """A verdict's outcome and case."""
    text = f'{verdict["outcome"]:11} {verdict["line"]}'
    if verdict['outcome'] == SKIPPED:
        return f'{text}: {verdict["reason"]}'
    slack = f', slack {verdict["slack"]:g}' if verdict['slack'] != 1 else ''
    return f'{text} [{verdict["seconds"]:.0f} s{slack}]'


def report(verdict: dict[str, Any]) -> str:
    """A verdict in a line, and of a failed one all that one needs to know."""
    text = in_a_line(verdict)
    if verdict['outcome'] != FAILED:
        return text
    lines = [text, f'  fault: {verdict.get("fault", "none")}']
    lines.append(f'  status {verdict.get("status")} after {verdict.get("ended_after_s")} s')
    for failure in verdict['failures']:
        lines.append('  {promise}: expected {expected}; seen: {seen}'.format(**failure))
    lines += [f'  process: {process}' for process in verdict.get('processes', [])]
    lines += [f'  | {line}' for line in verdict.get('output', '').splitlines()]
    return '\n'.join(lines)
