"""Tests of `impala_jax.training`."""
