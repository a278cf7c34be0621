"""Build of the compiled kernels, and the folders of the package; all other metadata is in `pyproject.toml`."""

import copy
import hashlib
import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS = 'impala_jax/kernels/kernels.cc'


# The instruction sets of each variant of the kernels; see `impala_jax/kernels/variants.py`. They are named one by one
# instead of by -march=native, so a wheel works on other machines than the one that built it.
VARIANTS = {'avx512': ('avx512f', 'avx512vl', 'avx512bw', 'avx512dq', 'avx2', 'fma'), 'avx2': ('avx2', 'fma')}


def kernels() -> list[Extension]:
    """Returns the CPU kernels, which are loaded with ctypes; they are optional and need a C++ compiler."""
    jaxlib = importlib.util.find_spec('jaxlib')
    if jaxlib is None or jaxlib.origin is None or (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
        return []
    return [
        Extension(
            f'impala_jax.kernels._kernels_{name}',
            [KERNELS],
            # Kernels are loaded only if this hash matches the source.
            define_macros=[('IMPALA_SOURCE', f'"{hashlib.sha256(Path(KERNELS).read_bytes()).hexdigest()}"')],
            include_dirs=[str(Path(jaxlib.origin).parent / 'include')],
            extra_compile_args=['-std=c++17', '-O3', *(f'-m{instructions}' for instructions in VARIANTS[name])],
            language='c++',
            optional=True,
        )
        for name in VARIANTS
    ]


class BuildKernels(build_ext):
    """Compiles the variants at the same time. They have one source, so each gets its own folder for object files."""

    def build_extension(self, ext):
        """Compiles and links one variant."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)


# The files for `--config catch` and the like, at the top of a checkout and inside the installed package.
CONFIGS = {'impala_jax.configs': 'configs', 'impala_jax.configs.ablations': 'configs/ablations'}

setup(
    packages=[*find_packages(include=['impala_jax', 'impala_jax.*']), *CONFIGS],
    package_dir=CONFIGS,
    ext_modules=kernels(),
    cmdclass={'build_ext': BuildKernels},
    options={'build_ext': {'parallel': len(VARIANTS)}},
)
