"""Build of the compiled kernels, and the folders of the package; all other metadata is in `pyproject.toml`."""

import hashlib
import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup

KERNELS = 'impala_jax/kernels/kernels.cc'


def kernels() -> list[Extension]:
    """Returns the CPU kernels, which are loaded with ctypes; they are optional and need a C++ compiler."""
    jaxlib = importlib.util.find_spec('jaxlib')
    if jaxlib is None or jaxlib.origin is None:
        return []
    return [
        Extension(
            'impala_jax.kernels._kernels',
            [KERNELS],
            # Kernels are loaded only if this hash matches the source.
            define_macros=[('IMPALA_SOURCE', f'"{hashlib.sha256(Path(KERNELS).read_bytes()).hexdigest()}"')],
            include_dirs=[str(Path(jaxlib.origin).parent / 'include')],
            extra_compile_args=['-std=c++17', '-O3', '-march=native'],
            language='c++',
            optional=True,
        )
    ]


# The files for `--config catch` and the like, at the top of a checkout and inside the installed package.
CONFIGS = {'impala_jax.configs': 'configs', 'impala_jax.configs.ablations': 'configs/ablations'}

setup(
    packages=[*find_packages(include=['impala_jax', 'impala_jax.*']), *CONFIGS],
    package_dir=CONFIGS,
    ext_modules=kernels(),
)
