"""Tests of `impala_jax.rundir`."""
