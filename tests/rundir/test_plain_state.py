"""States without pickle: what goes in comes out, what cannot is refused, and nothing that is read runs code."""

import collections
import pickle
import random

import dm_env
import numpy as np
import pytest

from impala_jax.rundir import plain_state


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, (list, tuple, collections.deque)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (np.ndarray, np.generic)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, (np.random.RandomState, np.random.Generator)):
        np.testing.assert_array_equal(a.bytes(100), b.bytes(100))
    elif isinstance(a, random.Random):
        assert [a.random() for _ in range(9)] == [b.random() for _ in range(9)]
    else:
        assert a == b or (a != a and b != b)


VALUES = [
    None,
    [True, 1, 2**130, -0.0, 0.1, float('inf'), float('nan'), 'text \ud800 \x00', b'bytes', ()],
    {'a': {1: 'one', (2, 'b'): [2]}, None: {3, 4}, 'f': frozenset([5])},
    [np.arange(6).reshape(2, 3)[:, ::2], np.zeros([0, 3], np.float16), np.array(7, np.uint8), np.float32(0.1)],
    [np.array([True]), np.array(['ab', 'c']), np.dtype('<f4'), np.datetime64('2020-01-01')],
    collections.deque([1, [2]], maxlen=3),
    collections.OrderedDict(b=1, a=2),
    dm_env.restart({'x': np.ones(2)}),
    np.random.RandomState(3),
    [np.random.Generator(np.random.PCG64(3)), np.random.Generator(np.random.MT19937(3))],
    [np.random.Generator(np.random.Philox(3)), np.random.Generator(np.random.SFC64(3)), random.Random(3)],
]


@pytest.mark.parametrize('value', VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_come_back(value):
    assert_same(plain_state.decode(plain_state.encode(value)), value)


def test_what_was_the_same_stays_the_same():
    board = np.zeros(3)
    value = {'board': board, 'again': [board]}
    value['itself'] = value
    read = plain_state.decode(plain_state.encode(value))
    assert read['board'] is read['again'][0] and read['itself'] is read and read['board'] is not board


class Part:
    def __init__(self, size):
        self.board = np.zeros(size)
        self.rng = np.random.RandomState(1)


class Whole:
    """An environment's kinds of attributes."""

    def __init__(self, size=3):
        self.part = Part(size)
        self.parts = [Part(1), Part(2)]
        self.shared = self.part
        self.rng = self.part.rng
        self.step = self.advance
        self.kind = Part
        self.function = len
        self.spec = dm_env.specs.BoundedArray((2,), np.float32, 0, 1)
        self.lazy = None

    def advance(self):
        self.lazy = np.random.default_rng(self.rng.randint(100)) if self.lazy is None else self.lazy
        self.part.board[0] += self.rng.random_sample()
        self.parts[1].board = self.parts[1].board + self.lazy.random()
        return self.part.board[0], self.parts[1].board.tolist()


def test_objects_go_on_where_they_were():
    whole = Whole()
    for _ in range(3):
        whole.step()
    blueprint = plain_state.blueprint_of(Whole())
    state = plain_state.encode(whole, blueprint)
    built = Whole()
    part = built.part
    assert plain_state.decode_into(built, state) is built
    assert built.part is part is built.shared and built.rng is part.rng and built.step.__self__ is built
    for _ in range(5):
        assert built.step() == whole.step()
    for other in (None, Part(3), 3):
        with pytest.raises(ValueError, match='Whole was'):
            plain_state.decode_into(other, state)


def test_what_cannot_be_saved_is_named():
    for value, words in (
        (object(), 'cannot save builtins.object at the top level'),
        ({'a': [1, open]}, r'cannot save .*open at '),
        ([(i for i in ())], 'generator'),
        (np.array([object()]), 'an array of dtype object'),
        (collections.defaultdict(int), 'defaultdict'),
    ):
        with pytest.raises(TypeError, match=words):
            plain_state.encode(value)
    counter = [0]
    whole = Whole()
    whole.lazy = lambda: counter
    blueprint = plain_state.blueprint_of(Whole())
    with pytest.raises(TypeError, match='closure .* at .lazy'):
        plain_state.encode(whole, blueprint)
    whole.lazy = Part(1)
    with pytest.raises(TypeError, match='Part at .lazy, which was made after its environment was built'):
        plain_state.encode(whole, blueprint)


class Dangerous:
    def __reduce__(self):
        return pytest.fail, ('it was unpickled',)


def test_whatever_is_read_runs_no_code_and_is_refused():
    state = plain_state.encode([np.arange(3), {'a': 'b'}, np.random.RandomState(0)])
    rng = np.random.default_rng(0)
    for broken in (
        pickle.dumps(Dangerous()),
        b'',
        state[:-1],
        state[:40],
        state.replace(b'"numpy_random"', b'"builtins_eval"'),
        state.replace(b'MT19937', b'MT19938'),
        state.replace(b'[3]', b'[9]'),
        state.replace(b'"<i8"', b'"|O8"'),
    ):
        with pytest.raises(ValueError):
            plain_state.decode(broken)
    header = len(b'impala_jax state 1\n')
    for _ in range(2000):
        broken = bytearray(state)
        for position in rng.integers(header, len(state), 3):
            broken[position] = rng.integers(256)
        try:
            plain_state.decode(bytes(broken))
        except ValueError:
            pass
