"""The three ways to run an experiment; all build their nodes from the same constructors (nodes.py)."""
