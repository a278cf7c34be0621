"""Plays whole games with a checkpoint: python launch/evaluate.py --workdir runs/catch --episodes 100."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('evaluate')
