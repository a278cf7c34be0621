"""Tests of `impala_jax.evaluation`."""
