"""The recipes in `deploy/` for clusters of Ray: what they start is accepted, and ends as it should."""

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from impala_jax.cli.command_line import train_arguments
from impala_jax.config import ConfigError
from tests.helpers.programs import ROOT, finish, marked_processes, wait_for
from tests.helpers.runs import ENDLESS, rows_of

DEPLOY = ROOT / 'deploy'


def executable(path, *lines):
    path.write_text('\n'.join(['#!/bin/bash', *lines]) + '\n')
    path.chmod(0o700)


def require_ray_accepts(words):
    """Raises an error if `ray start` would refuse the options."""
    from ray.scripts.scripts import start

    start.make_context('start', list(words))


@pytest.fixture
def ray_cluster():
    yaml = pytest.importorskip('yaml')
    documents = list(yaml.safe_load_all((DEPLOY / 'kuberay.yaml').read_text()))
    kinds = {document['kind']: document for document in documents}
    assert set(kinds) == {'RayCluster', 'NetworkPolicy'}
    return kinds['RayCluster']['spec'], kinds['NetworkPolicy']['spec']


def pods(spec):
    return [group['template'] for group in [spec['headGroupSpec'], *spec['workerGroupSpecs']]]


def test_the_pods_of_kuberay_share_a_token_and_only_they_reach_each_other(ray_cluster):
    spec, policy = ray_cluster
    for pod in pods(spec):
        (container,) = pod['spec']['containers']
        variables = {entry['name']: entry for entry in container['env']}
        assert variables['RAY_AUTH_MODE']['value'] == 'token'
        assert variables['RAY_AUTH_TOKEN']['valueFrom']['secretKeyRef'] == {'name': 'impala-ray', 'key': 'token'}
        assert '/dev/shm' in [mount['mountPath'] for mount in container['volumeMounts']]
        assert container['resources']['limits']['memory']
        labels = pod['metadata']['labels'].items()
        assert policy['podSelector']['matchLabels'].items() <= labels
        (rule,) = policy['ingress']
        assert rule['from'] == [{'podSelector': policy['podSelector']}]


@pytest.mark.ray
def test_the_commands_of_kuberay_are_accepted(ray_cluster):
    spec, _ = ray_cluster
    (container,) = spec['headGroupSpec']['template']['spec']['containers']
    (script,) = container['args']
    starts, learner = script.splitlines()[:2]
    words = shlex.split(starts)
    assert words[:2] == ['ray', 'start']
    require_ray_accepts(words[2 : words.index('||')])
    words = shlex.split(learner)
    assert words[:2] == ['python', 'launch/local.py'] and words[-1] == '&'
    config, _, runtime = train_arguments(words[2:-1])
    assert runtime == 'ray' and config.ray_address == 'auto' and config.actor.num_actors is None
    with pytest.raises(ConfigError):
        train_arguments([*words[2:-1], '--ray-adress', 'auto'])
    parameters = spec['workerGroupSpecs'][0]['rayStartParams']
    require_ray_accepts([f'--{name}={value}' for name, value in parameters.items()])


@pytest.mark.parametrize(
    ('learner', 'stopped', 'expected'),
    [
        ("trap 'sleep 0.3; echo saved; exit 143' TERM; echo ready; while :; do sleep 0.1; done", True, 143),
        ('echo ready; exit 3', False, 3),
        ('echo ready; exit 0', True, None),  # It waits, so that it is not started again.
    ],
    ids=['stopped', 'failed', 'finished'],
)
def test_the_head_of_kuberay_ends_as_its_learner_does(ray_cluster, tmp_path, learner, stopped, expected):
    (container,) = ray_cluster[0]['headGroupSpec']['template']['spec']['containers']
    executable(tmp_path / 'ray', 'exit 0')
    executable(tmp_path / 'python', learner)
    process = subprocess.Popen(
        [*container['command'], *container['args']],
        env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == 'ready\n'
        if expected is None:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        if stopped:
            process.send_signal(signal.SIGTERM)
        status = process.wait(20)
        assert status == expected if expected is not None else status != 0
        if expected == 143:
            assert process.stdout.readline() == 'saved\n'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.ray
def test_the_script_for_slurm_runs_and_ends_with_its_job(tmp_path):
    """`srun` starts one node here; the learner's end by a signal ends everything, and the token is removed."""
    tools = tmp_path / 'bin'
    tools.mkdir()
    executable(tools / 'srun', 'while [[ $1 == --* ]]; do shift; done', 'exec "$@"')
    for name in ('launch', 'configs', 'impala_jax'):
        (tmp_path / name).symlink_to(ROOT / name)
    job = {'SLURM_SUBMIT_DIR': str(tmp_path), 'SLURM_JOB_ID': str(secrets.randbelow(10**6)), 'SLURM_CPUS_PER_TASK': '2'}
    before = set(Path('/tmp').glob('impala_ray_*'))
    workdir = tmp_path / 'run'
    options = [*ENDLESS, '--config', 'configs/catch.py', '--workdir', str(workdir), '--logging.interval-updates', '1']
    environment = {**os.environ, **job, 'VENV': sys.prefix, 'PATH': f'{tools}:{os.environ["PATH"]}'}
    environment |= {'PYTHONPATH': str(ROOT), 'RUN_MARK': str(tmp_path)}
    process = subprocess.Popen(
        ['bash', str(DEPLOY / 'slurm.sh'), *options],
        env={name: value for name, value in environment.items() if name != 'XLA_FLAGS'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: workdir.exists() and any(row['actors'] == 2 for row in rows_of(workdir)), process)
        (token,) = tmp_path.glob('.ray_token_*')
        assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
        process.send_signal(signal.SIGTERM)
        code, stdout, stderr = finish(process, 90)
        assert code == 143, stdout + stderr
        assert stderr.splitlines()[-1].startswith('stopped by signal 15 at '), stderr
        wait_for(lambda: not marked_processes(tmp_path), timeout_s=30)
        assert not list(tmp_path.glob('.ray_token_*'))
        assert set(Path('/tmp').glob('impala_ray_??????')) <= before
    finally:
        for pid in marked_processes(tmp_path):
            os.kill(int(pid), signal.SIGKILL)
