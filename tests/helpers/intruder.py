"""Another user's program at the port of a Reverb server: python -m tests.helpers.intruder ADDRESS FROM TO

It asks for a checkpoint, reads what is in the table FROM, and writes to the table TO: copies, items that were altered,
and items that nobody expects. Prints how many it wrote.
"""

import os
import sys

import numpy as np

NOBODY = 65534


def write(client, table, *columns):
    """An item whose columns are lists of one array per step."""
    writer = client.trajectory_writer(num_keep_alive_refs=2, validate_items=False)
    for step in zip(*columns, strict=True):
        writer.append(list(step))
    writer.create_item(table, 1.0, [column[-len(columns[0]) :] for column in writer.history])
    writer.flush(timeout_ms=20_000)


def altered(leaves):
    """Copies that each differ in one array, and say that they are later items of their writer.

    A float becomes 1,137,101, as an episode's return.
    """
    *arrays, seal = leaves
    for i, array in enumerate(arrays):
        later = seal.copy()
        later[17:25] = np.frombuffer((1_000_000 + i).to_bytes(8, 'little'), np.uint8)
        for made in (array * 0 + 1_137_101, array + 1):
            yield [*arrays[:i], np.asarray(made).astype(array.dtype), *arrays[i + 1 :], later]


def malformed(leaves):
    """Lists of columns."""
    yield [[np.zeros(3, np.float32)]]
    yield [[np.array(b'text')], [np.array([['x', 'yy']])]]
    yield [[leaf, leaf] for leaf in leaves]  # two steps
    yield [[leaf] for leaf in leaves[:-1]]
    yield [[leaf] for leaf in [*leaves, leaves[0]]]
    yield [[leaf.astype(np.complex64)] for leaf in leaves]
    yield [[leaf[None]] for leaf in leaves]
    yield [[np.zeros([0, 5], np.float32)]]
    yield [[np.zeros(100_000_000, np.uint8)]]


def main(address, source, target):
    import reverb

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    client = reverb.Client(address)
    tables = client.server_info(timeout=20)
    # Each start has names of its own.
    source, target = (next(table for table in tables if table.partition('-')[0] == name) for name in (source, target))
    try:
        print('checkpoint', client.checkpoint())
    except ValueError as error:
        print('refused:', error)
    (sample,) = client.sample(source, 1, emit_timesteps=False)
    leaves = [np.asarray(column)[0] for column in sample.data]
    items = [[[leaf] for leaf in leaves]] * 2 + list(malformed(leaves))
    items += [[[leaf] for leaf in copy] for copy in altered(leaves)]
    for columns in items:
        write(client, target, *columns)
    print(len(items))


if __name__ == '__main__':
    main(*sys.argv[1:])
