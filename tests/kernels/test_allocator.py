"""The allocator keeps its memory."""

from tests.helpers.programs import finish, start

FAULTS = """
import resource, sys
from impala_jax.kernels import allocator
if 'keep' in sys.argv:
    assert allocator.configure_allocator()
import jax, jax.numpy as jnp
double = jax.jit(lambda x: x + x)
x = jnp.ones([20_000_000])  # 80 MB: more than an arena of a thread can hold.
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fewest_faults(folder, argument):
    """The pages of 4 KiB that each of 30 calls with an output of 80 MB faults in: of the best call."""
    status, output, errors = finish(start(folder, '-c', FAULTS, argument, environment={'JAX_PLATFORMS': 'cpu'}))
    assert status == 0, errors
    return min(map(int, output.split()))


def test_memory_is_kept(tmp_path):
    assert fewest_faults(tmp_path, 'keep') < 100
    assert fewest_faults(tmp_path, 'default') > 19_000
