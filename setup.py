"""The compiled part of the package, and which folders it consists of; `pyproject.toml` has all the rest."""

import hashlib
import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup

KERNELS = 'impala_jax/kernels/kernels.cc'


def kernels() -> list[Extension]:
    """The CPU kernels, loaded with ctypes. Without a C++ compiler the installation goes on without them."""
    jaxlib = importlib.util.find_spec('jaxlib')
    if jaxlib is None or jaxlib.origin is None:
        return []
    return [
        Extension(
            'impala_jax.kernels._kernels',
            [KERNELS],
            # What was compiled from another source is not loaded.
            define_macros=[('IMPALA_SOURCE', f'"{hashlib.sha256(Path(KERNELS).read_bytes()).hexdigest()}"')],
            include_dirs=[str(Path(jaxlib.origin).parent / 'include')],
            extra_compile_args=['-std=c++17', '-O3', '-march=native'],
            language='c++',
            optional=True,
        )
    ]


# The files that `--config catch` names. They stand at the top of the checkout, and inside the installed package.
CONFIGS = {'impala_jax.configs': 'configs', 'impala_jax.configs.ablations': 'configs/ablations'}

setup(
    packages=[*find_packages(include=['impala_jax', 'impala_jax.*']), *CONFIGS],
    package_dir=CONFIGS,
    ext_modules=kernels(),
)
