"""Tests of `impala_jax.config`."""
