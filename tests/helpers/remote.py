"""A learner that serves actors on other machines, in this process: its gate, its announcement, and actors that join."""

import contextlib
import socket
import threading

import impala_jax
from impala_jax import environments
from impala_jax.config import Config
from impala_jax.runtimes.gate import Gate
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.supervisor import free_port

CONFIG = Config(
    environment=impala_jax.EnvironmentConfig(name='catch'),
    network=impala_jax.NetworkConfig(torso='mlp', mlp_sizes=(8,)),
    learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=10),
    actor=impala_jax.ActorConfig(num_actors=0, num_envs=2),
    serve_actors=5000,
    timeout_s=20.0,
)
SPEC = environments.spec(CONFIG.environment)
SECRET = b'a secret that only the tests know'
BEHIND = {}  # the address of the Reverb server behind each gate


@contextlib.contextmanager
def server(config=CONFIG, suffix='-test'):
    """The address of the gate of a server with a run's tables, in this process."""
    import reverb

    from impala_jax.runtimes import reverb_tables

    server = reverb.Server(reverb_tables.tables(host_share(config), suffix, config.serve_actors is not None))
    port = free_port()
    gate = Gate(port, SECRET, f'localhost:{server.port}')
    BEHIND[f'localhost:{port}'] = f'localhost:{server.port}'
    try:
        yield f'localhost:{port}'
    finally:
        gate.close()
        server.stop()


def announce(address, config=CONFIG, spec=SPEC, suffix='-test'):
    """Announces the run at the address, as its learner does."""
    import reverb

    from impala_jax.runtimes import reverb_actors

    reverb_actors.announce(reverb.Client(BEHIND[address]), SECRET, config, spec, suffix).close()


def join(address, adapt=lambda config: config, stop=None, wait_s=0.0, secret=SECRET, imports=()):
    """Runs one actor that joins the learner at the address."""
    from impala_jax.runtimes import reverb_actors

    stop = stop or threading.Event()
    reverb_actors.run(address, 1, stop, secret=lambda: secret, adapt=adapt, imports=imports, wait_s=wait_s)


class Echo:
    """A server behind a gate, which counts its connections."""

    def __init__(self):
        self.num_connections = 0
        self.listener = socket.create_server(('localhost', 0))
        self.address = f'localhost:{self.listener.getsockname()[1]}'
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listener.accept()
                self.num_connections += 1
                threading.Thread(target=self._echo, args=(connected,), daemon=True).start()

    def _echo(self, connected):
        with connected:
            while data := connected.recv(1000):
                connected.sendall(data)
