"""Runs of all kinds, each broken in one way at one moment, and judged by what is promised: `python -m tests.chaos`.

A case is a function of one seed. `cases` draws it, `recipes` says which command it starts, `faults` breaks it,
`experiment` does all of that in order, `judge` compares what happened with what docs/reliability.md promises, and
`results` keeps the verdicts.
"""
