"""Tests of `impala_jax.cli`."""
