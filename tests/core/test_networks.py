"""Networks: observations of any shape, sizes, instructions, dtypes, how they start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.agent import dummy_timestep
from impala_jax.build import make_agent
from impala_jax.config import ConfigError, NetworkConfig
from impala_jax.networks import InstructionEncoder, ResettingLSTM
from impala_jax.types import INSTRUCTION, MID, ArraySpec, EnvironmentSpec
from tests.helpers.agents import DICT, STEP_TYPES, VECTOR, A, random_timesteps

ATARI_AND_VECTOR = EnvironmentSpec(
    {'image': ArraySpec((84, 84, 4), np.dtype(np.uint8)), 'vector': ArraySpec((5,), np.dtype(np.float32))}, A
)
DMLAB = EnvironmentSpec(ArraySpec((72, 96, 3), np.dtype(np.uint8)), 9)
ATARI = EnvironmentSpec(ArraySpec((84, 84, 4), np.dtype(np.uint8)), 6)


def num_params(config, spec):
    shapes = jax.eval_shape(make_agent(config, spec).init, jax.random.PRNGKey(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize('core', ['feedforward', 'lstm'])
@pytest.mark.parametrize('torso', ['shallow', 'shallow_atari', 'deep', 'minatar', 'mlp'])
def test_outputs_have_a_row_per_timestep(torso, core):
    spec = DMLAB if core == 'lstm' else ATARI
    agent = make_agent(NetworkConfig(torso, core=core), spec)

    def unroll():
        timesteps = jax.tree.map(lambda x: jnp.stack([x, x, x]), dummy_timestep(spec, 2))
        return agent.unroll(agent.init(jax.random.PRNGKey(0)), timesteps, agent.initial_state(2))

    output, state = jax.eval_shape(unroll)
    assert output.logits.shape == (3, 2, spec.num_actions)
    assert output.values.shape == (3, 2)
    assert [x.shape for x in jax.tree.leaves(state)] == ([(2, 256)] * 2 if core == 'lstm' else [])


def test_numbers_of_parameters_are_as_counted_by_hand():
    """As counted by hand; without the instructions' encoder."""
    lstm = 4 * 256 * ((256 + 9 + 1) + 256 + 1)  # torso, action, reward; its own output; bias
    heads = 256 * (9 + 1) + (9 + 1)

    conv = 8 * 8 * 3 * 16 + 16 + 4 * 4 * 16 * 32 + 32
    shallow = conv + 7 * 10 * 32 * 256 + 256 + lstm + heads  # 72x96 -> 17x23 -> 7x10
    assert num_params(NetworkConfig('shallow', core='lstm'), DMLAB) == shallow == 1_123_130

    def section(before, after):
        return 9 * before * after + after + 4 * (9 * after * after + after)

    conv = section(3, 16) + section(16, 32) + section(32, 32)
    deep = conv + 9 * 12 * 32 * 256 + 256 + lstm + heads  # 72x96 -> 36x48 -> 18x24 -> 9x12
    assert num_params(NetworkConfig('deep', core='lstm'), DMLAB) == deep == 1_520_714

    three = 8 * 8 * 4 * 32 + 32 + 4 * 4 * 32 * 64 + 64 + 3 * 3 * 64 * 64 + 64
    nature = three + 7 * 7 * 64 * 512 + 512 + 512 * (6 + 1) + (6 + 1)  # Mnih et al., 2015, and a baseline
    assert num_params(NetworkConfig('shallow_atari'), ATARI) == nature


def test_every_part_of_an_observation_counts():
    agent = make_agent(NetworkConfig('shallow'), DICT)
    params = agent.init(jax.random.PRNGKey(0))
    timesteps = random_timesteps(DICT, np.full([1, 2], MID, np.int32))
    unroll = jax.jit(agent.unroll)
    logits = unroll(params, timesteps, ())[0].logits
    assert np.isfinite(logits).all()
    for name, value in timesteps.observation.items():
        other = timesteps._replace(observation=timesteps.observation | {name: (value + 1).astype(value.dtype)})
        assert (unroll(params, other, ())[0].logits != logits).any(), name


def test_bytes_are_scaled_and_numbers_are_not():
    """uint8 is a picture, from 0 to 1; the same numbers in another dtype are taken as they are."""
    config, step_types = NetworkConfig('mlp', mlp_sizes=(8,)), np.full([1, 2], MID, np.int32)

    def outputs(dtype, scale):
        spec = EnvironmentSpec(ArraySpec((4, 4, 1), np.dtype(np.uint8)), A)
        agent = make_agent(config, spec)
        timesteps = random_timesteps(spec, step_types)
        observation = (timesteps.observation * scale).astype(dtype)
        return agent.unroll(agent.init(jax.random.PRNGKey(0)), timesteps._replace(observation=observation), ())[0]

    np.testing.assert_allclose(outputs(np.uint8, 1).logits, outputs(np.float32, 1 / 255).logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs(np.int32, 1).logits, outputs(np.float32, 1).logits)


class Twice(nn.Module):
    """A torso of one's own."""

    @nn.compact
    def __call__(self, x):
        return 2 * x.reshape(x.shape[0], -1)


def test_a_torso_of_ones_own_is_used():
    agent = make_agent(NetworkConfig(f'{__name__}:Twice'), VECTOR)
    params = agent.init(jax.random.PRNGKey(0))
    timesteps = random_timesteps(VECTOR)
    policy = params['params']['policy']
    expected = 2 * timesteps.observation @ np.asarray(policy['kernel']) + np.asarray(policy['bias'])
    np.testing.assert_allclose(agent.unroll(params, timesteps, ())[0].logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'torso, message',
    [
        ('no_such_module:Torso', "'no_such_module:Torso': cannot import"),
        (f'{__name__}:NoSuchTorso', 'has no function or class .NoSuchTorso.'),
        (f'{__name__}:num_params', 'not a flax.linen.Module'),
    ],
)
def test_a_torso_that_cannot_be_used_is_refused(torso, message):
    with pytest.raises(ConfigError, match=message):
        make_agent(NetworkConfig(torso), VECTOR)


def test_a_torso_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'shalow'.*'shallow'"):
        NetworkConfig('shalow')


def test_an_image_too_small_for_the_torso_is_refused():
    spec = EnvironmentSpec(ArraySpec((84, 19, 3), np.dtype(np.uint8)), A)
    with pytest.raises(ConfigError, match='at least 20 pixels.*mlp'):
        make_agent(NetworkConfig('shallow'), spec)


def bytes_spec(shape, **fields):
    return EnvironmentSpec(ArraySpec(shape, np.dtype(np.uint8), **fields), A)


@pytest.mark.parametrize(
    'shape, axes',
    [
        ((24, 28), (0, 1)),
        ((24, 28, 3), (0, 1, 2)),
        ((4, 24, 28), (1, 2, 0)),
        ((3, 24, 28, 4), (1, 2, 0, 3)),
        ((3, 4, 24, 28), (2, 3, 0, 1)),
        ((24, 28, 20), (0, 1, 2)),  # More channels than could come first
    ],
)
def test_images_are_read_with_their_channels_wherever_they_are(shape, axes):
    """The same picture, channels last, gives the same numbers; the order of joined channels is that of their axes."""
    for torso in ('auto', 'shallow', 'deep'):
        agent = make_agent(NetworkConfig(torso), bytes_spec(shape))
        assert f'observation {list(shape)} uint8: image of 24 x 28' in agent.reads
    agent = make_agent(NetworkConfig(), bytes_spec(shape))
    timesteps = random_timesteps(agent.spec, np.full([1, 2], MID, np.int32))
    params = agent.init(jax.random.PRNGKey(0))
    assert any(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    last = np.transpose(timesteps.observation, [0, 1, *(2 + axis for axis in axes)]).reshape([1, 2, 24, 28, -1])
    plain = make_agent(NetworkConfig(), bytes_spec(last.shape[2:]))
    expected = plain.unroll(params, timesteps._replace(observation=last), ())[0].logits
    np.testing.assert_array_equal(agent.unroll(params, timesteps, ())[0].logits, expected)


@pytest.mark.parametrize('shape', [(), (4,), (10, 5), (7, 7, 3), (3, 10, 10), (6, 10, 10, 10)])
def test_auto_reads_all_else_by_an_mlp_and_the_other_torsos_refuse_it(shape):
    agent = make_agent(NetworkConfig(), bytes_spec(shape))
    assert agent.reads == f'observation {list(shape)} uint8: an mlp, divided by 255'
    assert not any(leaf.ndim == 4 for leaf in jax.tree.leaves(agent.init(jax.random.PRNGKey(0))))
    for torso in ('shallow', 'shallow_atari', 'deep'):
        with pytest.raises(ConfigError, match=rf"network.torso '{torso}' (needs|takes) images.*try --network.torso"):
            make_agent(NetworkConfig(torso), bytes_spec(shape))


def test_beside_an_image_vectors_pass_an_mlp():
    agent = make_agent(NetworkConfig('shallow'), DICT)
    assert agent.reads == (
        "observation['count'] [] int32: an mlp; "
        "observation['image'] [20, 24, 3] uint8: image of 20 x 24, 3 channels, shallow, divided by 255; "
        "observation['vector'] [5] float32: an mlp"
    )


@pytest.mark.parametrize(
    'config, bounds, scale',
    [({}, None, 255), ({}, (0, 10), 10), ({}, (0, 0), 1), ({'uint8_scale': 7.0}, (0, 10), 7), ({}, (5, 200), 200)],
)
def test_bytes_are_divided_by_their_bound(config, bounds, scale):
    step_types = np.full([1, 2], MID, np.int32)
    agent = make_agent(NetworkConfig('mlp', mlp_sizes=(8,), **config), bytes_spec((6,), bounds=bounds))
    params, timesteps = agent.init(jax.random.PRNGKey(0)), random_timesteps(agent.spec, step_types)
    scaled = timesteps._replace(observation=(timesteps.observation / np.float32(scale)).astype(np.float32))
    expected = agent.unroll(params, scaled, ())[0].logits
    np.testing.assert_allclose(agent.unroll(params, timesteps, ())[0].logits, expected, rtol=1e-4, atol=1e-5)
    assert scale == 1 or f'divided by {scale}' in agent.reads


def category(num_values):
    return EnvironmentSpec({'room': ArraySpec((), np.dtype(np.int32), num_values=num_values)}, A)


@pytest.mark.parametrize('mlp_sizes', [(8, 4), (8,), ()])
def test_a_category_is_read_as_the_mlp_reads_its_one_hot_vector(mlp_sizes):
    agent = make_agent(NetworkConfig(mlp_sizes=mlp_sizes), category(10))
    params = agent.init(jax.random.PRNGKey(0))['params']
    rooms = np.arange(10, dtype=np.int32)[None]
    timesteps = random_timesteps(agent.spec, np.full([1, 10], MID, np.int32))._replace(observation={'room': rooms})
    logits = agent.unroll({'params': params}, timesteps, ())[0].logits
    torso = params['CategoryTorso_0']
    x = np.maximum(np.eye(10) @ np.asarray(torso['Embed_0']['embedding']), 0)
    for layer in torso.get('MLPTorso_0', {}).values():
        x = np.maximum(x @ np.asarray(layer['kernel']) + np.asarray(layer['bias']), 0)
    expected = x @ np.asarray(params['policy']['kernel']) + np.asarray(params['policy']['bias'])
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-6)
    assert len({row.tobytes() for row in np.asarray(logits[0])}) == 10


def test_a_category_of_too_many_values_is_refused():
    assert jax.eval_shape(make_agent(NetworkConfig(), category(2**20)).init, jax.random.PRNGKey(0))
    with pytest.raises(ConfigError, match=r"observation\['room'\] has 1,048,577 categories.*vector"):
        make_agent(NetworkConfig(), category(2**20 + 1))


@pytest.mark.parametrize(
    'spec, value, message',
    [
        (category(10), 10, r"observation\['room'\] has category 10, outside 0 to 9"),
        (category(10), -1, r"observation\['room'\] has category -1, outside 0 to 9"),
    ],
)
def test_a_category_without_an_embedding_is_an_error(spec, value, message):
    agent = make_agent(NetworkConfig(), spec)
    agent.check_observation({'room': np.array([0, 9, 5], np.int32)})
    with pytest.raises(ConfigError, match=message):
        agent.check_observation({'room': np.array([0, value, 5], np.int32)})


@pytest.mark.parametrize('torso', ['shallow', 'shallow_atari'])
def test_a_constant_background_excites_no_filter_and_what_moves_on_it_does(torso):
    """Otherwise half of the filters answer to grey with a large negative constant, and their ReLUs are dead."""
    agent = make_agent(NetworkConfig(torso), EnvironmentSpec(ArraySpec((84, 84, 4), np.dtype(np.uint8)), 6))
    params = agent.init(jax.random.PRNGKey(0))
    (kernel,) = [leaf for leaf in jax.tree.leaves(params) if leaf.shape[:3] == (8, 8, 4)]
    image = np.full([84, 84, 4], 87, np.float32) / 255
    answer = jax.lax.conv_general_dilated(
        image[None], kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(answer, 0, atol=1e-5)
    image[40:44, 50:52] = 236 / 255  # A ball.
    answer = jax.lax.conv_general_dilated(
        image[None], kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    assert (np.asarray(answer).max(axis=(0, 1, 2)) > 1e-2).mean() > 0.9


@pytest.mark.parametrize('torso', ['shallow', 'shallow_atari'])
def test_a_background_moves_no_centred_filter(torso):
    spec = EnvironmentSpec(ArraySpec((84, 84, 4), np.dtype(np.uint8)), 6)
    timesteps = jax.tree.map(lambda x: x[None], dummy_timestep(spec, 1))
    image = jax.random.randint(jax.random.PRNGKey(1), (1, 1, 84, 84, 4), 0, 256).astype(np.uint8)

    def logits(agent, params, image):
        return agent.unroll(params, timesteps._replace(observation=image), ())[0].logits

    def first(path):
        return 'Conv_0' in jax.tree_util.keystr(path)

    def change(centre):
        """Of the logits, when a constant is added to the first filters."""
        agent = make_agent(NetworkConfig(torso, centre_filters=centre), spec)
        params = agent.init(jax.random.PRNGKey(0))
        shift = lambda path, x: x + 0.1 if first(path) and x.ndim == 4 else x  # noqa: E731
        before = logits(agent, params, image)
        after = logits(agent, jax.tree_util.tree_map_with_path(shift, params), image)
        return float(np.abs(after - before).max() / np.abs(before).max())

    assert change(centre=True) < 1e-3
    assert change(centre=False) > 0.1


WORDS = EnvironmentSpec(
    {'instruction': ArraySpec((4,), np.dtype(np.int32)), 'rgb': ArraySpec((72, 96, 3), np.dtype(np.uint8))}, 9
)


def test_numbers_of_parameters_with_instructions_are_the_papers():
    """The paper's figure 3 says 1.2M (shallow) and 1.6M (deep)."""
    encoder = 1001 * 20 + 4 * 64 * (20 + 64 + 1)  # embedding; words, its own output, bias
    joined = 4 * 256 * 64  # the core's further inputs
    for torso, without in (('shallow', 1_123_130), ('deep', 1_520_714)):
        config = NetworkConfig(torso, core='lstm')
        assert num_params(config, WORDS) == without + encoder + joined
        assert num_params(NetworkConfig(torso, core='lstm', instructions=False), WORDS) == without
    assert num_params(NetworkConfig('deep', core='lstm'), WORDS) == 1_628_030


class TestInstructions:
    SPEC = EnvironmentSpec(
        {'instruction': ArraySpec((4,), np.dtype(np.int32)), 'vector': ArraySpec((3,), np.dtype(np.float32))}, A
    )

    def logits(self, words, **config):
        agent = make_agent(NetworkConfig('mlp', mlp_sizes=(8,), **config), self.SPEC)
        params = agent.init(jax.random.PRNGKey(0))
        observation = {'instruction': np.array([[words]], np.int32), 'vector': np.ones([1, 1, 3], np.float32)}
        step_type = np.full([1, 1], MID, np.int32)
        timesteps = random_timesteps(self.SPEC, step_type)._replace(observation=observation)
        return np.asarray(agent.unroll(params, timesteps, ())[0].logits)

    def test_words_and_their_order_are_read(self):
        seen = [
            self.logits(words) for words in ([1, 2, 0, 0], [2, 1, 0, 0], [1, 3, 0, 0], [1, 2, 3, 0], [1000, 2, 0, 0])
        ]
        assert len({logits.tobytes() for logits in seen}) == 5
        assert np.isfinite(seen).all()

    def test_what_is_no_word_is_skipped(self):
        np.testing.assert_array_equal(self.logits([5, 7, 0, 0]), self.logits([0, 5, 0, 7]))

    def test_no_words_give_zeros(self):
        encoder = InstructionEncoder(1001)
        words = np.zeros([2, 4], np.int32)
        params = encoder.init(jax.random.PRNGKey(0), words)
        assert not np.asarray(encoder.apply(params, words)).any()
        words[1, 0] = 9
        output = np.asarray(encoder.apply(params, words))
        assert output.shape == (2, 64) and not output[0].any() and output[1].any()

    def test_an_unknown_id_is_not_taken_for_another(self):
        assert np.isnan(self.logits([1, 1001, 0, 0])).all()
        assert np.isfinite(self.logits([1, 1001, 0, 0], num_word_ids=1002)).all()

    def test_an_id_without_an_embedding_is_an_error(self):
        agent = make_agent(NetworkConfig('mlp'), self.SPEC)
        for words, message in (
            ([1, 4000, 0, 0], 'word id 4000, and network.num_word_ids is 1001; set --network.num-word-ids 4001'),
            ([1, -3, 0, 0], 'word id -3, outside 0 to 1000'),
        ):
            observation = {'instruction': np.array([[1000, 0, 0, 0], words]), 'vector': np.ones([2, 3])}
            with pytest.raises(ConfigError, match=message) as error:
                agent.check_observation(observation)
            assert "observation['instruction']" in str(error.value)
            make_agent(NetworkConfig('mlp', instructions=False), self.SPEC).check_observation(observation)

    def test_bounds_beyond_the_embedding_are_refused(self):
        words = self.SPEC.observation['instruction']
        for bounds, message in (
            ((0, 5000), 'word id 5000, and network.num_word_ids is 1001; set --network.num-word-ids 5001'),
            ((-1, 9), 'word id -1, outside'),
        ):
            spec = self.SPEC._replace(observation={'instruction': words._replace(bounds=bounds)})
            with pytest.raises(ConfigError, match=message):
                make_agent(NetworkConfig('mlp'), spec)
            beside = spec._replace(observation=self.SPEC.observation | spec.observation)
            make_agent(NetworkConfig('mlp', instructions=False), beside)
            with pytest.raises(ConfigError, match='--network.no-instructions: the observation consists'):
                make_agent(NetworkConfig('mlp', instructions=False), spec)
        spec = self.SPEC._replace(observation={'instruction': words._replace(bounds=(0, 5000))})
        make_agent(NetworkConfig('mlp', num_word_ids=5001), spec)

    def test_they_can_be_left_out(self):
        same = [self.logits(words, instructions=False) for words in ([1, 2, 0, 0], [3, 4, 5, 0])]
        np.testing.assert_array_equal(*same)

    def test_only_word_ids_under_the_key_are_an_instruction(self):
        """Integers of another name, or a picture of that name, pass a torso, which takes them as numbers."""
        encoded = NetworkConfig('mlp', mlp_sizes=(8,))
        for key, leaf in (
            ('numbers', ArraySpec((4,), np.dtype(np.int32))),
            ('instruction', ArraySpec((4,), np.dtype(np.float32))),
            ('instruction', ArraySpec((4, 4), np.dtype(np.int32))),
        ):
            spec = EnvironmentSpec({key: leaf}, A)
            size = int(np.prod(leaf.shape))
            assert num_params(encoded, spec) == (size + 1) * 8 + (8 + 1) * (A + 1)
        nested = EnvironmentSpec({'language': {'instruction': ArraySpec((4,), np.dtype(np.int32))}}, A)
        assert num_params(encoded, nested) > 1001 * 20


def tensorflow_lstm(gates, inputs, forget_bias):
    """[T, D] -> [T, size]; TensorFlow's BasicLSTMCell, whose own biases start at 0.

    Args:
      gates: i, j, f, o -> kernels [D, size] and [size, size].
    """
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    c = h = np.zeros(gates['i'][1].shape[0])
    outputs = []
    for x in inputs:
        i, j, f, o = (x @ gates[gate][0] + h @ gates[gate][1] for gate in 'ijfo')
        c = c * sigmoid(f + forget_bias) + sigmoid(i) * np.tanh(j)
        h = np.tanh(c) * sigmoid(o)
        outputs.append(h)
    return np.array(outputs)


@pytest.mark.parametrize('forget_bias', [0.0, 1.0, 2.5])
class TestForgetBias:
    SPEC = EnvironmentSpec({'instruction': ArraySpec((4,), np.dtype(np.int32), bounds=(0, 49))}, A)

    def params(self, forget_bias, module):
        """Those that an agent starts with, of one of its modules."""
        config = NetworkConfig('mlp', core='lstm', lstm_size=6, lstm_forget_bias=forget_bias, num_word_ids=50)
        return {'params': make_agent(config, self.SPEC).init(jax.random.PRNGKey(0))['params'][module]}

    def gates(self, params):
        """flax calls TensorFlow's j g."""
        cell = params['params']['OptimizedLSTMCell_0']
        return {
            gate: [np.asarray(cell[part + gate.replace('j', 'g')]['kernel'], np.float64) for part in 'ih']
            for gate in 'ijfo'
        }

    def test_the_core_starts_as_tensorflows(self, forget_bias):
        params = self.params(forget_bias, 'ResettingLSTM_0')
        gates = self.gates(params)
        inputs = np.random.RandomState(0).randn(9, 1, len(gates['i'][0])).astype(np.float32)
        arguments = inputs, np.zeros([9, 1], bool), (np.zeros([1, 6], np.float32),) * 2
        expected = tensorflow_lstm(gates, inputs[:, 0], forget_bias)
        np.testing.assert_allclose(ResettingLSTM(6).apply(params, *arguments)[0][:, 0], expected, atol=1e-6)

    def test_the_instruction_encoder_starts_as_tensorflows(self, forget_bias):
        params, words = self.params(forget_bias, 'InstructionEncoder_0'), np.array([[7, 3, 11, 3]], np.int32)
        embedded = np.asarray(params['params']['Embed_0']['embedding'], np.float64)[words[0]]
        expected = tensorflow_lstm(self.gates(params), embedded, forget_bias)[-1]
        np.testing.assert_allclose(InstructionEncoder(50).apply(params, words)[0], expected, atol=1e-6)

    def test_the_configuration_sets_both(self, forget_bias):
        agent = make_agent(NetworkConfig('mlp', core='lstm', lstm_size=8, lstm_forget_bias=forget_bias), self.SPEC)
        params = agent.init(jax.random.PRNGKey(0))
        biases = [
            (path[-2].key, np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if 'LSTMCell' in str(path) and path[-1].key == 'bias'
        ]
        assert sorted(name for name, _ in biases) == sorted(2 * ['hi', 'hf', 'hg', 'ho'])
        for name, bias in biases:
            np.testing.assert_array_equal(bias, forget_bias if name == 'hf' else 0)


class LSTMTorso(nn.Module):
    """Of a user's own: it has a forget gate of the same name."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        zeros = jnp.zeros([x.shape[0], 5])
        return nn.OptimizedLSTMCell(5)((zeros, zeros), x)[1]


def test_the_forget_bias_of_a_torso_of_ones_own_is_left_alone():
    agent = make_agent(NetworkConfig(f'{__name__}:LSTMTorso', core='lstm', lstm_size=8), VECTOR)
    params = agent.init(jax.random.PRNGKey(0))['params']
    assert (np.asarray(params['LSTMTorso_0']['OptimizedLSTMCell_0']['hf']['bias']) == 0).all()
    assert (np.asarray(params['ResettingLSTM_0']['OptimizedLSTMCell_0']['hf']['bias']) == 1).all()


def operand_dtypes(jaxpr, found):
    """The dtypes that convolutions and matrix products take, in order, also inside of loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ('conv_general_dilated', 'dot_general'):
            found.append({operand.aval.dtype.name for operand in equation.invars})
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                operand_dtypes(inner, found)
    return found


@pytest.mark.parametrize('core', ['feedforward', 'lstm'])
@pytest.mark.parametrize('torso', ['shallow', 'shallow_atari', 'deep', 'minatar', 'mlp'])
@pytest.mark.parametrize('compute_dtype', ['float32', 'bfloat16'])
def test_bfloat16_is_of_all_layers_but_the_heads(torso, core, compute_dtype):
    """Parameters, outputs and state stay float32."""
    spec = EnvironmentSpec({**ATARI_AND_VECTOR.observation, INSTRUCTION: ArraySpec((4,), np.dtype(np.int32))}, A)
    agent = make_agent(NetworkConfig(torso, core=core, compute_dtype=compute_dtype), spec)
    params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
    arguments = (params, random_timesteps(spec), agent.initial_state(STEP_TYPES.shape[1]))
    outputs = jax.eval_shape(agent.unroll, *arguments)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, outputs))} == {'float32'}
    *layers, policy, baseline = operand_dtypes(jax.make_jaxpr(agent.unroll)(*arguments).jaxpr, [])
    assert policy == baseline == {'float32'}
    assert len(layers) >= 5 and all(layer == {compute_dtype} for layer in layers), layers
