"""Draws figures of runs and sweeps: python launch/plot.py curve --workdir runs/catch --output catch.png."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('plot')
