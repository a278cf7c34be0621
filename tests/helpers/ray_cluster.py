"""A cluster of Ray on this machine, whose nodes come and go, in a process of its own.

`python tests/helpers/ray_cluster.py FOLDER` starts a head node without CPUs, for the learner, and prints its address.
Each line of standard input is a command, which is answered by a line: `add CPUS [PYTHONPATH]`, `remove`, which kills
the node that was added last, or `behead`, which kills the head's server for good. The cluster ends with standard input.
"""

import sys

from ray.cluster_utils import Cluster


def main(folder):
    cluster = Cluster()
    common = {'temp_dir': folder, 'include_dashboard': False, 'object_store_memory': 100 * 2**20}
    cluster.add_node(num_cpus=0, **common)
    nodes = []
    print(cluster.address, flush=True)
    for line in sys.stdin:
        match line.split():
            case ['add', cpus, *path]:
                variables = {'PYTHONPATH': path[0]} if path else None
                nodes.append(cluster.add_node(num_cpus=int(cpus), env_vars=variables, **common))
            case ['remove']:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            case ['behead']:
                cluster.head_node.kill_gcs_server()
        print('done', flush=True)
    for node in [*nodes, cluster.head_node]:
        cluster.remove_node(node, allow_graceful=False)


if __name__ == '__main__':
    main(sys.argv[1])
