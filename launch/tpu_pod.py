"""Trains on a pod; every host runs this script: python launch/tpu_pod.py --config FILE --workdir DIR."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import start  # noqa: E402

if __name__ == '__main__':
    start('pod')
