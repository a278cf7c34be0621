"""Throughput of whole runs, compared with the limit given by their parts, and with Sample Factory.

    python benchmarks/end_to_end.py [--config configs/pong.py] [--runtime launchpad threads] [--seconds 60]
                                    [--repeats 3] [--sample-factory PYTHON] [--json FILE]

The figures are frames per second. That of a run is the median over the rows of its metrics, without the first third.
The parts, emulator, inference and update, are measured alone in this process before the runs. If they alternate, they
allow 1 / (1 / emulator + 1 / inference + 1 / update).

Sample Factory plays Pong with the shallow network, 2 workers of 16 environments, unrolls of 20 and batches of 640
steps, each used once. It needs older packages than this project; PYTHON is the interpreter of an environment created by
`pip install torch 'sample-factory[atari]==2.1.1'` and, for the ROMs, `AutoROM --accept-license`. Its V-trace
(`--with_vtrace`) stops after the first samples with PyTorch 2.13, so it runs without V-trace, which is less work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from common import in_turn, machine, report

from impala_jax import environments
from impala_jax.build import make_agent, make_learner
from impala_jax.cli import command_line
from impala_jax.config import Config
from impala_jax.kernels import allocator
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import columns, concatenate

ROOT = Path(__file__).resolve().parent.parent


def seconds_of_parts(config: Config, repeats: int = 5) -> dict[str, float]:
    """Measures emulator, inference and update alone, in seconds per frame."""
    agent = make_agent(config.network, environments.spec(config.environment), config.popart.enabled)
    learner = make_learner(config, agent)
    states = [learner.init(jax.random.PRNGKey(0))]
    params = jax.tree.map(np.array, states[0].params)
    actor = nodes.make_actor(host_share(config), agent, 0)
    num_envs, T = config.actor.num_envs, config.learner.unroll_length
    enough = concatenate([actor.unroll(0, params) for _ in range(-(-config.learner.batch_size // num_envs))])
    batch = learner.put(columns(enough, 0, config.learner.batch_size).experience)
    timestep = jax.tree.map(np.copy, actor.environment.step(np.zeros(num_envs, np.int32))[0])
    step, key = jax.jit(agent.step), jax.random.PRNGKey(0)
    actions = np.random.default_rng(0).integers(0, agent.spec.num_actions, [T, num_envs])

    def emulate():
        for row in actions:
            actor.environment.step(row)

    def infer():
        for _ in range(T):
            np.asarray(step(params, key, timestep, agent.initial_state(num_envs)).action)

    def update():
        states.append(jax.block_until_ready(learner.update(states.pop(), batch)[0]))

    times = in_turn({'emulator': emulate, 'inference': infer, 'update': update}, repeats)
    actor.environment.close()
    acted = num_envs * T * config.environment.frames_per_step
    frames = {'emulator': acted, 'inference': acted, 'update': config.frames_per_update}
    return {name: float(np.median(seconds)) / frames[name] for name, seconds in times.items()}


def frames_per_second(
    config: str | Path, runtime: str, seconds: float, overrides: list[str], script: str = 'local.py'
) -> float:
    """Measures the frames per second of a run.

    Args:
      config: Configuration of the run.
      runtime: Runtime of the run.
      seconds: Duration of the training, after which the run is stopped, in seconds.
      overrides: Further command-line arguments.
      script: Script in `launch/` that starts the run.

    Raises:
      RuntimeError: The run ended by itself, or did not start within 300 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / 'run'
        command = [sys.executable, ROOT / 'launch' / script, '--config', config, '--workdir', workdir]
        command += ['--runtime', runtime, '--logging.interval-s', '1', '--evaluator.episodes', '0', *overrides]
        environment = {'PYTHONPATH': str(ROOT), **os.environ}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            metrics, deadline, end = workdir / 'metrics.jsonl', time.monotonic() + 300, None
            while end is None or time.monotonic() < end:
                if process.poll() is not None or (end is None and time.monotonic() > deadline):
                    raise RuntimeError(f'{runtime}: the run ended, or did not start within 300 s')
                if end is None and metrics.exists() and metrics.stat().st_size:
                    end = time.monotonic() + seconds
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait(60)
        rates = [json.loads(line)['frames_per_second'] for line in metrics.read_text().splitlines()]
    return float(np.median(rates[len(rates) // 3 :]))


SAMPLE_FACTORY = """
--env=atari_pong --algo=APPO --experiment=benchmark --device=cpu --train_for_env_steps=1000000000 --async_rl=True
--num_workers=2 --num_envs_per_worker=16 --rollout=20 --batch_size=640 --num_batches_per_epoch=1 --num_epochs=1
--encoder_conv_architecture=convnet_impala --encoder_conv_mlp_layers 256 --use_rnn=False --normalize_returns=False
--normalize_input=False --decorrelate_envs_on_one_worker=False --decorrelate_experience_max_seconds=0
"""


def sample_factory(python: Path, seconds: float) -> float:
    """Measures the frames per second of Sample Factory: the median of the values that it prints every 5 s.

    Args:
      python: Interpreter of an environment with Sample Factory.
      seconds: Duration of the measurement after the first update, in seconds.

    Raises:
      RuntimeError: Sample Factory ended by itself, or did not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python,
            '-u',
            '-m',
            'sf_examples.atari.train_atari',
            f'--train_dir={folder}',
            *SAMPLE_FACTORY.split(),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        deadline = threading.Timer(seconds + 300, os.killpg, (process.pid, signal.SIGKILL))
        deadline.start()
        rates, printed, end = [], [], float('inf')
        try:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                match = re.search(r'Fps is \(10 sec: ([\d.]+)', line)
                if match and float(match[1]) > 0:
                    end = min(end, time.monotonic() + seconds)
                    rates.append(float(match[1]))
                if time.monotonic() > end:
                    break
            else:
                raise RuntimeError(f'Sample Factory ended, or did not finish in time: {"".join(printed[-5:])}')
        finally:
            deadline.cancel()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    return float(np.median(rates[len(rates) // 3 :]))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Further arguments are overrides of the configuration, as for launch/local.py.',
    )
    parser.add_argument('--config', default='configs/pong.py', help='configuration of the runs')
    parser.add_argument('--runtime', nargs='+', default=('launchpad', 'threads'), help='runtimes to measure')
    parser.add_argument('--seconds', type=float, default=60, help='duration of the training in each run')
    parser.add_argument('--repeats', type=int, default=3, help='runs per runtime')
    parser.add_argument('--sample-factory', type=Path, metavar='PYTHON', help='interpreter with Sample Factory')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args, overrides = parser.parse_known_args()
    allocator.configure_allocator()
    config = command_line.override(command_line.load_config_file(args.config), overrides)
    about = machine()
    parts = seconds_of_parts(config)
    about |= {f'{name}_frames_per_second': round(1 / seconds) for name, seconds in parts.items()}
    rates: dict[str, list[float]] = {runtime: [] for runtime in args.runtime}
    of_peer: list[float] = []
    for _ in range(args.repeats):
        for runtime, measured in rates.items():
            measured.append(frames_per_second(args.config, runtime, args.seconds, overrides))
        if args.sample_factory is not None:
            of_peer.append(sample_factory(args.sample_factory, args.seconds))
    allowed = 1 / sum(parts.values())
    rows = [
        {'runtime': runtime, 'frames/s': measured, 'of the parts': float(np.median(measured)) / allowed}
        for runtime, measured in (rates | ({'Sample Factory': of_peer} if of_peer else {})).items()
    ]
    report(f'{args.config}: the parts in alternation allow {allowed:,.0f} frames/s', rows, about, args.json)


if __name__ == '__main__':
    main()
