"""Tests: a folder for each wing of the package, `core` for its top, and `runs` for whole runs."""
