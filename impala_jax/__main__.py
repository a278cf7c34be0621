"""The program `impala`, which is also `python -m impala_jax`."""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.cli.main import main  # noqa: E402

if __name__ == '__main__':
    main()
