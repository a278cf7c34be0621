"""Every wait in the package has a time-out, or a reason here why it cannot hang."""

import ast

from tests.helpers.programs import ROOT

PACKAGE = ROOT / 'impala_jax'
# Methods that wait without limit if they are called without arguments.
METHODS = {'accept', 'acquire', 'communicate', 'get', 'join', 'recv', 'result', 'shutdown', 'wait'}
# Functions that wait without limit if they have no keyword `timeout`, and no more than this number of arguments.
FUNCTIONS = {
    'concurrent.futures.as_completed': 1,
    'concurrent.futures.wait': 1,
    'connection.wait': 1,
    'ray.get': 1,
    'select.select': 3,
    'subprocess.call': 99,
    'subprocess.check_call': 99,
    'subprocess.check_output': 99,
    'subprocess.run': 99,
}

# What may be called without a time-out, and why it cannot hang; {module: {'function: call': reason}}.
LIMITED = {
    'cli/doctor.py': {
        'diagnose: future.result': 'each check is a process with a time-out',
        'diagnose: pool.shutdown': 'has wait=False',
    },
    'cli/pbt.py': {'end: process.wait': 'after SIGKILL'},
    'environments/processes.py': {
        'ProcessVectorEnvironment.close: worker.join': 'has a deadline inside, after which it kills',
        '_Worker.start: self.join': 'has a deadline inside, after which it kills',
        '_Worker._next_message: self._connection.recv': 'after poll; the socket has a time-out for the rest',
    },
    'environments/suites.py': {
        'SuiteVectorEnvironment.close: self._pool.shutdown': 'its calls are limited, as below',
        'SuiteVectorEnvironment._call: concurrent.futures.wait': 'each part has workers, whose answers are limited',
        'SuiteVectorEnvironment._call: future.result': 'the futures are done',
    },
    'environments/worker.py': {
        '_answer_requests: connection.recv': 'idle until a request; the kernel ends it with the parent',
    },
    'runtimes/control.py': {
        'Server._accept: self._listener.accept': 'a daemon thread, idle until a node connects',
        'Server._listen: connection.recv': 'a daemon thread, idle until a message or the end of the connection',
        'Server._announce: self._control.stop.wait': 'a daemon thread, idle until the run ends',
        'Server._announce: self._control.learner_ended.wait': 'a daemon thread, idle until the run ends',
        'Link._listen: self._connection.recv': 'a daemon thread, idle until a message or the end of the connection',
    },
    'runtimes/gate.py': {
        'Gate._accept: self._listener.accept': 'a daemon thread, idle until an actor connects; `close` wakes it',
        'Gate._accept: self._handshakes.acquire': 'has blocking=False',
        'Tunnel._accept: self._listener.accept': 'a daemon thread, idle until a client connects; `close` wakes it',
        '_Pipes._run: back.join': 'a daemon thread; each direction shuts both sockets down',
    },
    'runtimes/launchpad.py': {'_ReverbNode._serve: control.stop.wait': 'a server, idle until the run ends'},
    'runtimes/launchpad_launch.py': {'launch: manager.wait': 'in a daemon thread, whose joins are limited'},
    'runtimes/pod.py': {
        'preflight: jax.distributed.shutdown': 'the supervisor limits it',
        'failures_reported: jax.distributed.shutdown': 'the supervisor limits it',
    },
    'runtimes/reverb_actors.py': {'_Joined.act: threads.join': 'NodeThreads.join has a limit inside'},
    'runtimes/reverb_transport.py': {
        'ReverbTrajectoryQueue.get_batch: reader.get': 'has the limit timeout_s inside',
        'ReverbParameterStore._run: self._requests.get': 'a daemon thread, idle until a request',
    },
    'runtimes/run.py': {'run: jax.distributed.shutdown': 'the supervisor limits it'},
    'runtimes/supervisor.py': {
        'simulate: host.wait': 'after SIGKILL',
        '_Supervisor._wait: self._program.wait': 'a daemon thread; the supervisor ends the program',
        '_Supervisor._connect: self._listener.accept': 'the listener has a time-out',
    },
    'runtimes/threads.py': {'saved_at_the_end: threads.join': 'NodeThreads.join has a limit inside'},
    'studies/ablation.py': {
        '_run_sweep: pool.shutdown': 'processes end within seconds of `stop.close()`; a stopped one is killed',
    },
    'system/keeper.py': {'keep: select.select': 'idle until the parent closes its end or ends'},
    'system/stopping.py': {'_release: logging.shutdown': 'in a daemon thread, whose join is limited'},
}


def waits(source):
    """Functions and calls of a module that wait without limit."""
    found = []

    def visit(node, path):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            path = [*path, node.name]
        if isinstance(node, ast.Call) and not any(keyword.arg == 'timeout' for keyword in node.keywords):
            name = ast.unparse(node.func)
            method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
            if (method and not node.args) or len(node.args) <= FUNCTIONS.get(name, -1):
                found.append(f'{".".join(path)}: {name}')
        for child in ast.iter_child_nodes(node):
            visit(child, path)

    visit(ast.parse(source), [])
    return found


def test_every_wait_is_limited():
    found = {
        path.relative_to(PACKAGE).as_posix(): set(calls)
        for path in PACKAGE.rglob('*.py')
        if (calls := waits(path.read_text()))
    }
    assert found == {module: set(calls) for module, calls in LIMITED.items()}  # Reasons without a call are outdated.


def test_waits_are_found():
    source = (
        'def f():\n  thread.join()\n  ",".join(a)\n  queue.get(timeout=1)\n  {}.get(1)\nselect.select([], [], [])\n'
    )
    assert waits(source) == ['f: thread.join', ': select.select']
