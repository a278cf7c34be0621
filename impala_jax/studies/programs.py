"""Compiled programs of a sweep: cells that differ only in inputs of a program are its members."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # They import JAX, which workers import after they have set its environment variables.
    from impala_jax.runtimes.device.population import Population
    from impala_jax.studies.ablation import Cell

_MAX_MEMBERS = 32  # Largest number of cells of a program.
_MAX_BYTES = 2**30  # Largest size of the state of a program.

# State of a worker process: the last program, by what it is compiled for.
_populations: dict[tuple[str, int, int], Population] = {}


class Unit(NamedTuple):
    """Cells that run together in a worker process."""

    cells: Sequence[Cell]
    num_members: int = 1  # Number of members of the compiled program, at least that of the cells.
    policy_lag: int = 0  # Largest lag of the program's members.


class Part(NamedTuple):
    """Cells of a unit that run at the same time, and the program that runs them."""

    cells: Sequence[Cell]
    population: Population


def divide(cells: Sequence[Cell]) -> list[Unit]:
    """Divides cells into compiled programs, in a way that does not depend on the machine.

    The result of a cell depends, by rounding, on the number of members of its program.
    """
    from impala_jax.runtimes.device.population import program_of

    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(program_of(cell.config), []).append(cell)
    units = []
    for group in groups.values():
        num_members = math.ceil(len(group) / math.ceil(len(group) / _MAX_MEMBERS))
        lag = max(cell.config.policy_lag for cell in group)
        units += [Unit(group[i : i + num_members], num_members, lag) for i in range(0, len(group), num_members)]
    return units


def parts(unit: Unit) -> Iterator[Part]:
    """Compiles the program of a unit, and divides the cells if they would take too much memory together.

    Raises:
      ConfigError: As for `run`, or if a single cell exceeds the memory of this machine.
    """
    from impala_jax.runtimes.device.population import Population, program_of
    from impala_jax.runtimes.device.program import require_memory

    config = unit.cells[0].config
    key = program_of(config), unit.num_members, unit.policy_lag
    if key not in _populations:  # Units with the same program follow each other.
        _populations.clear()
        num_bytes = Population(config, 1, unit.policy_lag).member_bytes
        require_memory(num_bytes, config)
        num_members = max(1, min(unit.num_members, _MAX_BYTES // num_bytes))
        _populations[key] = Population(config, num_members, unit.policy_lag)
    population = _populations[key]
    for start in range(0, len(unit.cells), population.num_members):
        yield Part(unit.cells[start : start + population.num_members], population)
