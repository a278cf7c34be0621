"""Tests of `impala_jax.system`."""
