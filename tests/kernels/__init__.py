"""Tests of `impala_jax.kernels`."""
