"""The summary at the end of a run."""

from impala_jax.rundir.files import EVALUATIONS, METRICS
from impala_jax.rundir.rows import append_row
from impala_jax.rundir.summary import print_summary, summary


def test_the_summary_says_what_there_is(tmp_path, capsys):
    workdir = tmp_path / 'a run'
    workdir.mkdir()
    assert '--workdir' in summary(workdir)
    append_row(workdir / METRICS, {'frames': 640, 'wall_time_s': 1.0, 'episodes': 0})
    assert 'no training episode' in summary(workdir)
    append_row(
        workdir / METRICS,
        {'frames': 1_280_000, 'wall_time_s': 754.0, 'episodes': 400, 'episode_return_last_100': 19.256},
    )
    append_row(
        workdir / EVALUATIONS,
        {
            'frames': 1_280_000,
            'learner_steps': 1,
            'episodes': 20,
            'mean_return': 20.5,
            'median_return': 21.0,
            'stderr': 0.2,
        },
    )
    print_summary(workdir)
    text = capsys.readouterr().out
    assert '1,280,000 frames in 12 min 34 s' in text
    assert '19.26, mean of the last 100 training episodes' in text
    assert '20.50, mean of 20 episodes, standard error 0.20, median 21.00 (at 1,280,000 frames)' in text
    assert text.splitlines()[-1].endswith(f"impala evaluate --workdir '{workdir}' --episodes 100")
