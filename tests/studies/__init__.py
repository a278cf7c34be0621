"""Tests of `impala_jax.studies`."""
