"""A host's program without JAX, under its supervisor: python -m tests.helpers.pod_program HOST HOSTS FOLDER END

END: `finishes`, `fails`, `follows` (waits for the file `go` in the folder, then fails as one whose update failed), or
`hangs`.
"""

import sys
import time
from pathlib import Path

from impala_jax.runtimes import supervisor
from impala_jax.runtimes.channel import Channel
from impala_jax.system import stop_watch


def program(host: int, num_hosts: int, folder: Path, end: str, address: str) -> None:
    channel = Channel(address)
    port_file = folder / 'port'
    if host == 0:
        (folder / 'port.new').write_text(str(channel.port))
        (folder / 'port.new').rename(port_file)
    while not port_file.exists():
        time.sleep(0.01)
    names = [f'machine{i}' for i in range(num_hosts)]
    channel.joined(host, names, ('localhost', int(port_file.read_text())), 'token')
    (folder / f'joined{host}').touch()
    while end in ('fails', 'follows') and not (folder / 'go').exists():
        time.sleep(0.01)
    if end == 'finishes':
        sys.exit(0)
    if end in ('fails', 'follows'):
        channel.ended('the update failed' if end == 'follows' else 'the emulator is on fire', end == 'follows')
        sys.exit(1)
    time.sleep(60)


if __name__ == '__main__':
    if '--supervisor' in sys.argv:
        program(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[-1])
    else:
        supervisor._ENDING_S, supervisor._CONNECT_S, stop_watch.STOPPED_S = 1.0, 5.0, 1.0
        sys.exit(supervisor.supervise([sys.executable, *sys.argv]))
