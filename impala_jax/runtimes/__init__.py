"""The three runtimes of an experiment, which build their nodes with the same functions (nodes.py)."""
