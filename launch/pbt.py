"""Trains a population: python launch/pbt.py --config configs/minisuite_pbt.py --workdir runs/pbt --members 4."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('pbt')
