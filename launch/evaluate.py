"""Plays whole games with a checkpoint: python launch/evaluate.py --workdir runs/catch --episodes 100"""

from impala_jax.metrics import quiet_libraries

quiet_libraries()  # Before they are imported.

import json  # noqa: E402
from pathlib import Path  # noqa: E402

from impala_jax import allocator, checkpoint, command_line, environments  # noqa: E402
from impala_jax.agent import Agent  # noqa: E402
from impala_jax.config import ConfigError  # noqa: E402
from impala_jax.evaluation import Evaluator, check_video, human_normalised, write_video  # noqa: E402


def evaluate() -> None:
    parser = command_line.Parser(description='Plays whole games with the newest checkpoint of a run.')
    parser.add_argument('--workdir', required=True, type=Path, help='of the run')
    parser.add_argument('--episodes', type=int, default=100, help='games to play (default: %(default)s)')
    parser.add_argument('--num-envs', type=int, default=16, help='games played together (default: %(default)s)')
    parser.add_argument('--greedy', action='store_true', help='play the most likely action instead of sampling')
    parser.add_argument('--seed', type=int, default=1_000_003, help='of games and actions (default: %(default)s)')
    parser.add_argument('--json', type=Path, help='write the scores to this file')
    parser.add_argument('--video', type=Path, help='write one game to this mp4 or gif file')
    arguments = parser.parse_args()
    for name in ('episodes', 'num_envs'):
        if getattr(arguments, name) < 1:
            raise ConfigError(f'--{name.replace("_", "-")} must be positive, got {getattr(arguments, name)}')
    if arguments.video is not None:
        check_video(arguments.video)
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f'--json {arguments.json}: there is no directory {arguments.json.absolute().parent}')

    config = checkpoint.load_config(arguments.workdir)
    saved = checkpoint.restore(arguments.workdir, {'learner': {'params': None}})
    allocator.keep_memory()
    agent = Agent(config.network, environments.spec(config.environment))
    evaluator = Evaluator(
        agent,
        config.environment,
        episodes=arguments.episodes,
        num_envs=arguments.num_envs,
        seed=arguments.seed,
        greedy=arguments.greedy,
        record=arguments.video is not None,
    )
    try:
        evaluation = evaluator.play(saved.step, saved.state['learner']['params'])
    finally:
        evaluator.close()

    scores = {
        'episodes': len(evaluation.returns),
        'mean_return': evaluation.mean,
        'median_return': evaluation.median,
        'stderr': evaluation.stderr,
        'min_return': min(evaluation.returns),
        'max_return': max(evaluation.returns),
        'human_normalised': human_normalised(config.environment.name, evaluation.mean),
        'checkpoint_step': saved.step,
        'frames': saved.step * config.frames_per_update,
        'environment': config.environment.name,
        'greedy': arguments.greedy,
        'seed': arguments.seed,
    }
    print(f'{config.environment.name}: {scores["episodes"]} games at {scores["frames"]:,} frames')
    print(f'mean {evaluation.mean:.2f}  standard error {evaluation.stderr:.2f}  median {evaluation.median:.2f}')
    print(f'lowest {scores["min_return"]:.2f}  highest {scores["max_return"]:.2f}')
    if scores['human_normalised'] is not None:
        print(f'human-normalised {scores["human_normalised"]:.1f} %')
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(scores, indent=2) + '\n')
    if arguments.video is not None:
        frames_per_second = 60 / config.environment.frames_per_step if config.environment.frames_per_step > 1 else 5
        write_video(arguments.video, evaluator.frames, frames_per_second)
        print(f'video of one game: {arguments.video}')


if __name__ == '__main__':
    command_line.main(evaluate)
