"""Trains or resumes on this machine: python launch/local.py --config configs/catch.py --workdir runs/catch."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('train')
