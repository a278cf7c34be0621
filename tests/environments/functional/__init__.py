"""Tests of `impala_jax.environments.functional`."""
