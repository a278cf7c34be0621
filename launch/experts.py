"""Trains experts and one agent: python launch/experts.py --suite minisuite --config FILE --output runs/experts."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('experts')
