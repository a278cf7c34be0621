"""Checkpoints survive kills, damage and full disks, and say what is wrong."""

import dataclasses
import errno
import json
import logging
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.build import make_agent
from impala_jax.config import Config, ConfigError, EnvironmentConfig, LossConfig, NetworkConfig
from impala_jax.rundir import checkpoint, checkpoint_format, orbax_arrays, plain_state
from impala_jax.rundir.checkpoint import Checkpointer, CheckpointError, CheckpointMismatch
from impala_jax.trajectory_queue import Replay
from tests.helpers.programs import ROOT

CONFIG = Config(timeout_s=60.0)


class State(NamedTuple):
    params: dict
    opt_state: tuple
    key: np.ndarray
    runtime: dict


def make_state(value: int = 0, blob: int = 5) -> State:
    return State(
        params={
            'params': {'Dense_0': {'kernel': np.full((30, 40), value, np.float32), 'bias': jnp.ones(3, jnp.bfloat16)}}
        },
        opt_state=((), (np.asarray(value, np.int32), None, np.zeros((0, 4)))),
        key=np.array([1, 2**32 - 1], np.uint32),
        runtime={
            'snapshots': [np.arange(blob, dtype=np.uint8)],
            'frames': 2**40 + value,
            'done': np.array([True, False]),
        },
    )


def make(tmp_path: Path, config: Config = CONFIG, keep: int = 3) -> Checkpointer:
    return Checkpointer(tmp_path / checkpoint.DIRECTORY, config, keep)


def saved_steps(tmp_path: Path) -> list[int]:
    return checkpoint.steps(tmp_path / checkpoint.DIRECTORY)


def folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / checkpoint.DIRECTORY / f'{step:09d}'


def restored(checkpointer: Checkpointer, template=None) -> checkpoint.Checkpoint:
    result = checkpointer.restore_latest(make_state() if template is None else template)
    assert result is not None
    return result


def test_restores_what_was_saved(tmp_path):
    state = make_state(7)
    make(tmp_path).save(12, state, {'frames': 3, 'note': 'a'})
    result = restored(make(tmp_path))
    assert (result.step, result.metadata) == (12, {'frames': 3, 'note': 'a'})
    assert jax.tree.structure(result.state) == jax.tree.structure(state)
    for leaf, expected in zip(jax.tree.leaves(result.state), jax.tree.leaves(state), strict=True):
        assert type(leaf) is np.ndarray
        assert leaf.dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.flags.writeable


def test_nothing_is_restored_before_a_save(tmp_path):
    assert make(tmp_path).restore_latest(make_state()) is None
    with pytest.raises(CheckpointError, match='no checkpoint in .*--workdir'):
        checkpoint.load_config(tmp_path)


def test_a_template_may_hold_shapes_or_none(tmp_path):
    make(tmp_path).save(1, make_state(7), {})
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype), make_state())
    state = restored(make(tmp_path), template._replace(runtime=None)).state
    np.testing.assert_array_equal(state.params['params']['Dense_0']['kernel'], 7 * np.ones((30, 40)))
    assert list(state.runtime) == ['done', 'frames', 'snapshots']
    np.testing.assert_array_equal(state.runtime['snapshots']['0'], np.arange(5))


def test_runtime_may_change_its_shape_but_nothing_else(tmp_path):
    make(tmp_path).save(1, make_state(blob=9), {})
    assert restored(make(tmp_path), make_state(blob=2)).state.runtime['snapshots'][0].shape == (9,)
    with pytest.raises(CheckpointMismatch, match=r'key is uint32\[2\] there, uint32\[3\] now'):
        make(tmp_path).restore_latest(make_state()._replace(key=np.zeros(3, np.uint32)))
    with pytest.raises(CheckpointMismatch, match=r'key is uint32\[2\] there, int32\[2\] now'):
        make(tmp_path).restore_latest(make_state()._replace(key=np.zeros(2, np.int32)))
    with pytest.raises(CheckpointMismatch, match=r'opt_state/1/0 is not expected'):
        make(tmp_path).restore_latest(make_state()._replace(opt_state=()))
    with pytest.raises(CheckpointMismatch, match=r'opt_state/2 is missing'):
        make(tmp_path).restore_latest(make_state()._replace(opt_state=(*make_state().opt_state, np.zeros(2))))


def test_saving_a_step_twice_is_a_no_op(tmp_path):
    checkpointer = make(tmp_path)
    checkpointer.save(1, make_state(1), {})
    before = (folder(tmp_path, 1) / 'checkpoint.json').stat().st_mtime_ns
    checkpointer.save(1, make_state(2), {})
    assert (folder(tmp_path, 1) / 'checkpoint.json').stat().st_mtime_ns == before


def test_a_damaged_step_is_saved_again(tmp_path):
    checkpointer = make(tmp_path)
    checkpointer.save(1, make_state(1), {})
    (folder(tmp_path, 1) / 'checkpoint.json').unlink()
    checkpointer.save(1, make_state(2), {})
    assert restored(checkpointer).state.opt_state[1][0] == 2


def test_the_newest_are_kept(tmp_path):
    checkpointer = make(tmp_path, keep=2)
    for step in (5, 10, 200, 1000):
        checkpointer.save(step, make_state(step), {})
    assert saved_steps(tmp_path) == [200, 1000]
    assert sorted(path.name for path in (tmp_path / checkpoint.DIRECTORY).iterdir()) == ['000000200', '000001000']


def test_damaged_checkpoints_never_push_out_good_ones(tmp_path):
    checkpointer = make(tmp_path, keep=2)
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {})
    make(tmp_path, keep=9).save(3, make_state(3), {})
    for step in (2, 3):
        (folder(tmp_path, step) / 'checkpoint.json').unlink()
    checkpointer = make(tmp_path, keep=2)
    assert restored(checkpointer).step == 1
    checkpointer.save(2, make_state(2), {})
    assert saved_steps(tmp_path) == [1, 2]
    assert restored(make(tmp_path)).step == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize('which', ['largest', 'checkpoint.json'])
def test_damage_is_reported_and_the_one_before_used(tmp_path, caplog, damage, which):
    checkpointer = make(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {})
    files = [path for path in folder(tmp_path, 2).rglob('*') if path.is_file()]
    damaged = max(files, key=lambda path: path.stat().st_size) if which == 'largest' else folder(tmp_path, 2) / which
    damage(damaged)
    with caplog.at_level(logging.WARNING, 'impala_jax.rundir.checkpoint'):
        assert restored(make(tmp_path)).step == 1
    (record,) = [record for record in caplog.records if record.name == 'impala_jax.rundir.checkpoint']
    message = record.getMessage()
    assert str(folder(tmp_path, 2)) in message and damaged.name in message and '\n' not in message


def test_every_file_is_verified(tmp_path):
    make(tmp_path).save(1, make_state(1), {})
    for path in [path for path in folder(tmp_path, 1).rglob('*') if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content + b' ')
        if path.name == 'checkpoint.json':  # White space behind JSON says nothing.
            continue
        with pytest.raises(CheckpointError):
            make(tmp_path).restore_latest(make_state())
        path.write_bytes(content)
    assert restored(make(tmp_path)).step == 1


def test_all_damaged_is_an_error_and_no_fresh_start(tmp_path):
    checkpointer = make(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {})
        (folder(tmp_path, step) / 'checkpoint.json').write_text('{}')
    for _ in range(2):  # The second start must not take the directory for an empty one.
        with pytest.raises(CheckpointError, match='no checkpoint in .* is good') as error:
            make(tmp_path).restore_latest(make_state())
        assert '\n' not in str(error.value)


def test_another_configuration_is_named(tmp_path):
    make(tmp_path).save(1, make_state(), {})
    other = dataclasses.replace(CONFIG, seed=3, loss=LossConfig(entropy_cost=0.5))
    with pytest.raises(CheckpointMismatch) as error:
        make(tmp_path, other).restore_latest(make_state())
    assert isinstance(error.value, ConfigError)
    for part in ('seed: 0 in the checkpoint, 3 now', 'loss.entropy_cost: 0.01', '0.5 now', '--workdir'):
        assert part in str(error.value)
    assert '\n' not in str(error.value)
    longer = dataclasses.replace(CONFIG, total_frames=5, timeout_s=5.0)
    assert restored(make(tmp_path, longer)).step == 1


def test_a_field_of_another_version_is_named(tmp_path, monkeypatch):
    to_dict = checkpoint.config_lib.to_dict
    monkeypatch.setattr(checkpoint.config_lib, 'to_dict', lambda config: to_dict(config) | {'novelty': 1})
    make(tmp_path).save(1, make_state(), {})
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatch, match='another version of impala_jax.*novelty'):
        make(tmp_path).restore_latest(make_state())


@pytest.mark.parametrize('number', [3, '2'])
def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch, number):
    make(tmp_path).save(1, make_state(), {})
    monkeypatch.setattr(checkpoint_format, 'FORMAT', number)
    make(tmp_path).save(2, make_state(), {})
    for read in (
        lambda: make(tmp_path).restore_latest(make_state()),
        lambda: checkpoint.check_config(tmp_path, CONFIG),
        lambda: checkpoint.load_config(tmp_path),
    ):
        with pytest.raises(CheckpointMismatch, match=f'000000002 has format {number!r}, and .* reads formats 1 to 2'):
            read()
    assert checkpoint.steps(tmp_path / checkpoint.DIRECTORY) == [1, 2]


def test_the_first_format_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_format, 'FORMAT', 1)
    make(tmp_path).save(1, make_state(), {})
    monkeypatch.undo()
    assert restored(make(tmp_path)).step == 1


def test_a_run_of_the_version_before_auto_resumes(tmp_path, monkeypatch):
    to_dict = checkpoint.config_lib.to_dict

    def old_dict(config):
        values = to_dict(config)
        del values['network']['uint8_scale']
        return values

    monkeypatch.setattr(checkpoint.config_lib, 'to_dict', old_dict)
    make(tmp_path, dataclasses.replace(CONFIG, network=NetworkConfig('shallow'))).save(1, make_state(), {})
    monkeypatch.undo()
    assert checkpoint.load_config(tmp_path).network == NetworkConfig('auto', uint8_scale=255.0)
    for torso in ('auto', 'shallow'):
        assert restored(make(tmp_path, dataclasses.replace(CONFIG, network=NetworkConfig(torso)))).step == 1
    with pytest.raises(CheckpointMismatch, match="network.torso: 'auto' in the checkpoint, 'mlp' now"):
        make(tmp_path, dataclasses.replace(CONFIG, network=NetworkConfig('mlp'))).restore_latest(make_state())


def test_reading_a_part_of_another_run(tmp_path):
    config = dataclasses.replace(CONFIG, seed=9, vtrace=dataclasses.replace(CONFIG.vtrace, rho_bar=float('inf')))
    make(tmp_path, config).save(4, make_state(3), {'frames': 8})
    assert checkpoint.load_config(tmp_path) == config
    result = checkpoint.restore(tmp_path, {'params': make_state().params})
    assert (result.step, result.metadata) == (4, {'frames': 8})
    np.testing.assert_array_equal(result.state['params']['params']['Dense_0']['kernel'], 3 * np.ones((30, 40)))
    with pytest.raises(CheckpointMismatch, match='Dense_1/kernel is missing'):
        checkpoint.restore(tmp_path, {'params': {'params': {'Dense_1': {'kernel': np.zeros(2)}}}})


def test_reading_beside_a_run_that_prunes(tmp_path, monkeypatch):
    checkpointer = make(tmp_path, keep=2)
    checkpointer.save(1, make_state(), {})
    verify = checkpoint_format.verify

    def verify_late(path):
        monkeypatch.setattr(checkpoint_format, 'verify', verify)
        for step in (2, 3):
            checkpointer.save(step, make_state(), {})
        return verify(path)

    monkeypatch.setattr(checkpoint_format, 'verify', verify_late)
    assert checkpoint.restore(tmp_path, {'key': make_state().key}).step == 3


@pytest.mark.parametrize(
    ('raised', 'said'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
        (ValueError('RESOURCE_EXHAUSTED: writing\nmore lines'), 'RESOURCE_EXHAUSTED: writing'),
    ],
)
def test_a_failed_write_leaves_the_former_intact(tmp_path, monkeypatch, raised, said):
    checkpointer = make(tmp_path)
    checkpointer.save(1, make_state(1), {})

    def fail(path, arrays):
        path.mkdir()
        (path / 'half').write_text('x')
        raise raised

    monkeypatch.setattr(orbax_arrays, 'save', fail)
    with pytest.raises(CheckpointError, match='cannot write checkpoint .*000000002.*earlier') as error:
        checkpointer.save(2, make_state(2), {})
    assert said in str(error.value) and '\n' not in str(error.value)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / checkpoint.DIRECTORY).iterdir()] == ['000000001']
    assert restored(checkpointer).step == 1


@pytest.mark.parametrize(
    'free, blob, said',
    [
        (100, 5, '100 bytes are free, up to 4.8 kB are needed'),
        (2_540_000, 3_000_000, '2.5 MB are free, up to 3.0 MB are needed'),
    ],
)
def test_a_full_disk_is_named(free, blob, said, tmp_path, monkeypatch):
    def fail(path, arrays):
        raise ValueError('some text of a library')

    monkeypatch.setattr(orbax_arrays, 'save', fail)
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': free})())
    with pytest.raises(CheckpointError, match=f'the disk is full: {said}'):
        make(tmp_path).save(2, make_state(2, blob), {})


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match='cannot write checkpoints to .*file/checkpoints: Not a directory'):
        make(tmp_path / 'file')


def test_a_file_system_that_hangs_is_given_up(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(orbax_arrays, 'save', lambda path, arrays: release.wait(30))
    with pytest.raises(CheckpointError, match='did not answer within 0.2 s'):
        make(tmp_path, dataclasses.replace(CONFIG, timeout_s=0.2)).save(1, make_state(), {})
    release.set()


def test_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(TypeError, match='params is <?U|object|str'):
        make(tmp_path).save(1, make_state()._replace(params='abc'), {})  # pyright: ignore[reportArgumentType]
    assert saved_steps(tmp_path) == []


def test_saving_is_fast_and_leaves_no_thread(tmp_path):
    rng = np.random.default_rng(0)
    state = {f'layer_{i}': rng.normal(size=(83, 1000)).astype(np.float32) for i in range(30)}  # 10 MB
    checkpointer = make(tmp_path)
    threads = set(threading.enumerate())
    times = []
    for step in range(3):
        start = time.perf_counter()
        checkpointer.save(step, state, {})
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
    checkpointer.restore_latest(state)
    assert set(threading.enumerate()) <= threads


_SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
import numpy as np
from impala_jax.rundir.checkpoint import Checkpointer
from impala_jax.config import Config

checkpointer = Checkpointer(Path(sys.argv[1]), Config(), 2)
latest = checkpointer.restore_latest({'a': np.zeros(50_000), 'b': np.zeros((), np.int64)})
for step in itertools.count(latest.step + 1 if latest else 1):
    checkpointer.save(step, {'a': np.full(50_000, step, np.float64), 'b': np.asarray(step)}, {'step': step})
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path):
    rng = random.Random(time.time_ns())
    newest = 0
    for _ in range(3):
        command = [sys.executable, '-c', _SAVE_FOR_EVER, str(tmp_path / checkpoint.DIRECTORY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            for _ in range(3):
                newest = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            newest = max([newest, *map(int, process.stdout.read().split())])
        result = checkpoint.restore(tmp_path, {'a': np.zeros(50_000), 'b': np.zeros((), np.int64)})
        # A kill between the rename and the print may leave one more than was printed.
        assert result.step in (newest, newest + 1)
        assert result.metadata == {'step': result.step}
        assert result.state['b'] == result.step
        np.testing.assert_array_equal(result.state['a'], result.step)
        assert len(saved_steps(tmp_path)) <= 3  # One more than kept, if killed before the oldest was removed.


def test_manifest_is_readable_by_a_person(tmp_path):
    make(tmp_path).save(1, make_state(), {'frames': 3})
    manifest = json.loads((folder(tmp_path, 1) / 'checkpoint.json').read_text())
    assert manifest['metadata'] == {'frames': 3}
    assert manifest['leaves']['params/params/Dense_0/bias'] == ['bfloat16', [3]]


class _Dangerous:
    def __reduce__(self):
        return pytest.fail, ('it was unpickled',)


@pytest.mark.parametrize('processes', [0, 1])
def test_states_of_actors_of_another_version_are_refused(processes):
    agent = make_agent(NetworkConfig('mlp', mlp_sizes=(4,)), environments.spec(EnvironmentConfig('catch')))
    environment = environments.make(EnvironmentConfig('catch', processes=processes), 2, 0)
    try:
        actor = Actor(agent, environment, 3, seed=0)
        actor.unroll(0, agent.init(jax.random.PRNGKey(0)))
        saved = plain_state.decode(actor.get_state())
        states = plain_state.decode(saved['environment'])
        shorter = [plain_state.encode(plain_state.decode(state)[:-1]) for state in states]
        for state in (
            {name: value for name, value in saved.items() if name != 'game_over'},
            saved | {'core': [np.zeros(3)]},
            saved | {'timestep': saved['timestep'][:-1]},
            saved | {'environment': plain_state.encode(shorter)},
            saved | {'environment': pickle.dumps(states)},
        ):
            with pytest.raises(ConfigError, match='is of another version of impala_jax .*--workdir') as error:
                actor.set_state(plain_state.encode(state))
            assert '\n' not in str(error.value)
        # As earlier versions wrote them.
        with pytest.raises(ConfigError, match='is of another version of impala_jax .*--workdir'):
            actor.set_state(pickle.dumps(_Dangerous()))
    finally:
        environment.close()


def test_replay_of_another_version_is_refused():
    agent = make_agent(NetworkConfig('mlp', mlp_sizes=(4,)), environments.spec(EnvironmentConfig('catch')))
    replay = Replay(4, 1, seed=0)
    replay.mix(agent.empty_trajectory(3, 2))
    state = replay.state()
    del state['leaves']['0']
    with pytest.raises(ConfigError, match='saved replay is of another version of impala_jax: .* start again'):
        replay.restore(state, agent.trajectory_structure())
