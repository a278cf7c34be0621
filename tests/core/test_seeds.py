"""Seeds that are derived from others are all different."""

import itertools

import numpy as np
import pytest

from impala_jax import seeds
from impala_jax.config import Config
from impala_jax.runtimes.host_share import host_share
from impala_jax.seeds import derived_seed
from impala_jax.studies import pbt


def test_no_two_paths_share_a_seed():
    """Neither where zeros follow, nor where numbers take more than a word."""
    paths = [path for length in range(5) for path in itertools.product([0, 1, 5], repeat=length)]
    paths += [(2**32,), (2**32 + 5,), (5 * 2**32,), (2**32, 0), (0, 2**32), (2**31 - 1,), (2**64 - 1,)]
    states = {tuple(seeds.sequence(*path).generate_state(4)) for path in paths}
    assert len(states) == len(paths)
    assert len({derived_seed(*path) for path in paths}) == len(paths)


def test_seeds_are_integers_of_31_bits():
    values = [seeds.derived_seed(7, i) for i in range(2_000)]
    assert all(isinstance(value, int) and 0 <= value < 2**31 for value in values)
    assert np.mean(values) == pytest.approx(2**30, rel=0.05)
    assert values == [seeds.derived_seed(7, i) for i in range(2_000)]


def test_nodes_members_and_hosts_have_seeds_of_their_own():
    config = Config(seed=5)
    nodes = [host_share(config).node_seed(*path) for path in [(), (0,), (0, 0), (0, 0, 0), (1,), (3, 1), (3, 2), (4,)]]
    members = [pbt.member_config(config, index).seed for index in range(4)]
    assert len({*nodes, *members}) == len(nodes) + len(members)
