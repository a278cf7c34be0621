"""Commands in this process, and a run that takes a second."""

TINY = (
    '--runtime threads --total-frames 400 --learner.batch-size 4 --learner.unroll-length 10 --learner.num-devices 1 '
    '--actor.num-actors 1 --actor.num-envs 4 --evaluator.episodes 2 --network.mlp-sizes 8'
).split()


def train(call, workdir, *arguments, config='configs/catch.py'):
    """Exit status, output and reason of a run of TINY, by the fixture `call`."""
    return call('train', '--config', config, '--workdir', workdir, *TINY, *arguments)


def write(path, text):
    """The path, where the text now stands."""
    path.write_text(text)
    return path
