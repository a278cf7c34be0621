"""Runs actors for a learner on another machine: python launch/actors.py --learner HOST:PORT --num-actors 8."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('actors')
