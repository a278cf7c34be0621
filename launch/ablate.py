"""Runs a grid of experiments: python launch/ablate.py --grid configs/ablations/table2.py --output runs/table2."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('ablate')
