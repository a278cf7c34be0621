"""Plays whole games with a checkpoint: python launch/evaluate.py --workdir runs/catch --episodes 100"""

from impala_jax.metrics import quiet_libraries

quiet_libraries()  # Before they are imported.

import json  # noqa: E402
from pathlib import Path  # noqa: E402

from impala_jax import command_line  # noqa: E402
from impala_jax.config import ConfigError  # noqa: E402
from impala_jax.evaluation import check_video  # noqa: E402
from impala_jax.evaluation import evaluate as play  # noqa: E402


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

    scores = play(
        arguments.workdir,
        episodes=arguments.episodes,
        num_envs=arguments.num_envs,
        greedy=arguments.greedy,
        seed=arguments.seed,
        video=arguments.video,
    )
    print(f'{scores["environment"]}: {scores["episodes"]} games at {scores["frames"]:,} frames')
    print('mean {mean_return:.2f}  standard error {stderr:.2f}  median {median_return:.2f}'.format(**scores))
    print(f'lowest {scores["min_return"]:.2f}  highest {scores["max_return"]:.2f}')
    if scores['human_normalised'] is not None:
        print(f'human-normalised {scores["human_normalised"]:.1f} %')
    for task, task_scores in scores.get('tasks', {}).items():
        print(f'{task}: ' + 'mean {mean_return:.2f}  standard error {stderr:.2f}'.format(**task_scores))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(scores, indent=2) + '\n')
    if arguments.video is not None:
        print(f'video of one game: {arguments.video}')


if __name__ == '__main__':
    command_line.main(evaluate)
