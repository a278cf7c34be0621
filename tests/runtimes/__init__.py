"""Tests of `impala_jax.runtimes`."""
