"""Which of the compiled variants of the kernels is loaded, that they agree, and learning without any."""

import ast
import os
import subprocess
import sys

import pytest

from impala_jax.config import ConfigError
from impala_jax.kernels import cpu, variants
from impala_jax.kernels.variants import VARIABLE, VARIANTS
from tests.helpers.programs import ROOT

ALL = {name for needed in VARIANTS.values() for name in needed}
needs_kernels = pytest.mark.skipif(bool(cpu.REASON), reason=f'kernels {cpu.REASON}')


def run(code, **environment):
    """What a program of its own prints; a variant is chosen when it starts."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        **{'env': os.environ | environment, 'capture_output': True, 'text': True, 'timeout': 200, 'cwd': ROOT},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ('value', 'expected'), [('', ('avx512', 'avx2')), ('auto', ('avx512', 'avx2')), ('avx2', ('avx2',)), ('off', ())]
)
def test_the_variable_selects_variants(monkeypatch, value, expected):
    monkeypatch.setenv(VARIABLE, value)
    assert variants.selected() == expected


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, 'on')
    with pytest.raises(ConfigError, match='^IMPALA_JAX_KERNELS=on is unknown; it must be auto, off, avx512 or avx2$'):
        variants.selected()


def test_each_variant_is_compiled_for_the_instructions_that_are_asked_for():
    """setup.py cannot import the package."""
    (value,) = (
        node.value
        for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'VARIANTS'
    )
    assert list(ast.literal_eval(value).items()) == list(VARIANTS.items())


@needs_kernels
def test_a_processor_gets_the_best_variant_that_it_can_run():
    assert '_kernels_avx512.' in cpu._library(VARIANTS, ALL)._name
    assert '_kernels_avx2.' in cpu._library(VARIANTS, ALL - {'avx512vl'})._name
    assert cpu._library(VARIANTS, ALL - {'fma'}) == 'not available for this processor, which lacks fma'
    assert cpu._library(['avx512'], {'avx2', 'fma'}) == 'not available for this processor, which lacks avx512f'


def test_other_systems_and_processors_use_xla(monkeypatch):
    for system, machine in (('Linux', 'aarch64'), ('Darwin', 'arm64')):
        monkeypatch.setattr('platform.system', lambda system=system: system)
        monkeypatch.setattr('platform.machine', lambda machine=machine: machine)
        assert cpu._load() == f'not available for {system} on {machine}, only for Linux on x86_64'


@needs_kernels
def test_variants_compute_the_same_bits():
    """Machines with different processors take part in one run."""
    code = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from impala_jax.kernels import cpu, layers
if cpu.REASON:
    print(cpu.REASON)
    raise SystemExit
rng = np.random.default_rng(0)  # XLA would take seconds to compile JAX's for each shape.
images, kernel, bias = (
    jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in [(5, 21, 21, 16), (3, 3, 16, 48), (48,)]
)
digest = hashlib.sha256()
for convolution in (cpu.Convolution(1, 'SAME', True, True), cpu.Convolution(2, 'VALID', False, False)):
    outputs, backward = jax.vjp(lambda *args: layers.conv(convolution, *args), images, kernel, bias)
    for array in (outputs, *backward(outputs)):
        digest.update(np.asarray(array).tobytes())
rows = jnp.asarray(rng.standard_normal((20, 21), np.float32))
for array in cpu.vtrace(rows, rows, rows, rows, rows[0], (1.0, None, 2.0), 0.9):
    digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""
    digests = [run(code, **{VARIABLE: name}) for name in VARIANTS]
    if 'not available for this processor' in digests[0]:
        pytest.skip(digests[0])
    assert digests[0] == digests[1] and len(digests[0]) == 64


def test_catch_is_learned_without_kernels():
    """By a convolution, so that acting and the update would both use kernels."""
    code = """
import flax.linen as nn, jax, optax
import impala_jax
from impala_jax.kernels import cpu, layers

def call(name, result):
    raise AssertionError(f'{name} is called')

cpu._call = call

class Torso(nn.Module):
    @nn.compact
    def __call__(self, observations):
        x = layers.Conv(16, 3, relu=True)(observations[..., None])
        return nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))

environment = impala_jax.environments.make(impala_jax.EnvironmentConfig('catch'), 32, seed=0)
network = impala_jax.networks.build(impala_jax.NetworkConfig(torso='__main__:Torso'), environment.spec)
agent = impala_jax.Agent(network, environment.spec)
learner = impala_jax.Learner(agent, optax.adam(1e-3), impala_jax.ImpalaLoss(discount=0.99))
actor = impala_jax.Actor(agent, environment, unroll_length=20, seed=0)
state = learner.init(jax.random.PRNGKey(0))
for update in range(400):
    trajectory = actor.unroll(update, state.params)
    state, logs = learner.update(state, trajectory)
print(float(trajectory.info.episode_return[trajectory.info.episode_ended].mean()))
"""
    one_device = ' '.join(flag for flag in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in flag)
    assert float(run(code, **{VARIABLE: 'off', 'XLA_FLAGS': one_device})) > 0.8  # A random policy's is -0.6.
