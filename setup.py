"""Packaging. `requirements/` holds exact pins of everything here, for each Python; the Makefile installs those."""

import hashlib
import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup

CORE = [
    'chex>=0.1.90',
    'dm-env>=1.6',
    'filelock>=3.16',  # JAX wants it to bound its compilation cache.
    'flax>=0.10.7',
    'jax>=0.6.2',
    'numpy>=1.26',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.11.39',
    'rich>=13.9',
    'rlax>=0.1.7',
    'tensorboardX>=2.6',
    'tyro>=1.0',
]

# Launchpad's C++ part and Reverb are each linked against one TensorFlow, which pip does not know: of all releases only
# these load together, and there are no wheels of Launchpad for Python 3.11 or later.
LAUNCHPAD = [
    'dm-launchpad==0.5.2',
    'dm-reverb==0.7.2',
    'numpy<2',
    'protobuf==3.19.6',
    'setuptools<81',  # TensorBoard 2.8 imports pkg_resources, which later ones lack.
    'tensorboardX<2.6.1',  # Later ones need protobuf 4.
    'tensorflow-cpu==2.8.4',
]

ATARI = ['ale-py>=0.12', 'gymnasium>=1.1']
PLOT = ['matplotlib>=3.9']
VIDEO = ['imageio>=2.37', 'imageio-ffmpeg>=0.6', 'pillow>=11']
DEV = [
    'hypothesis>=6.100',
    'pre-commit>=4',
    'pyright>=1.1.400',
    'pytest>=8.4',
    'pytest-timeout>=2.3',
    'pytest-xdist>=3.6',
    'ruff>=0.12',
    'setuptools>=77',  # Builds the project itself, which is installed without build isolation.
]
NOTEBOOKS = ['ipykernel>=6.29', 'nbclient>=0.10']


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


README = Path(__file__).parent / 'README.md'

setup(
    name='impala_jax',
    version='0.1.0',
    description='IMPALA (Espeholt et al., 2018) in JAX: scalable distributed reinforcement learning with V-trace',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    python_requires='>=3.10,<3.14',
    packages=find_packages(include=['impala_jax', 'impala_jax.*']),
    package_data={'impala_jax': ['**/*.csv', 'kernels/kernels.cc']},
    ext_modules=kernels(),
    install_requires=CORE,
    extras_require={
        'atari': ATARI,
        'video': VIDEO,
        'plot': PLOT,
        'launchpad': [f'{requirement}; python_version < "3.11"' for requirement in LAUNCHPAD],
        'dev': sorted(DEV + PLOT + VIDEO),
        'notebooks': sorted(NOTEBOOKS + PLOT + VIDEO),
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda12]'],
    },
)
