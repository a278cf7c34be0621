"""Settings for all tests: eight CPU devices, no silent broadcasting, and a counted skip for what is not installed."""

import importlib.util
import os
import signal
import sys
import tempfile
import warnings

# JAX reads these when it is imported; subprocesses of tests inherit them.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Else programs that are started under nohup, or by a shell in the background, would ignore them until `begin`.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# What tests, their subprocesses and the workers of pytest-xdist compile is shared among them, and with nobody else.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix='impala_jax_tests_', ignore_cleanup_errors=True)
    os.environ['XDG_CACHE_HOME'] = _CACHE.name

# TensorFlow Probability, which RLax imports, refuses an old TensorFlow that was imported before it.
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import rlax  # noqa: F401

import jax  # noqa: E402
import pytest  # noqa: E402

from impala_jax.kernels import compilation_cache  # noqa: E402

compilation_cache.enable_cache()
jax.config.update('jax_numpy_rank_promotion', 'raise')
pytest.register_assert_rewrite('tests.helpers')  # Else their assertions would not show values.

_MODULES = {
    'launchpad': ('launchpad', 'reverb'),
    'ray': ('ray',),
    'atari': ('ale_py', 'gymnasium'),
    'dmlab': ('deepmind_lab',),
    'gymnax': ('gymnax', 'seaborn', 'six'),
    'notebooks': ('nbclient', 'ipykernel', 'matplotlib'),
}


# Folders whose files take longest. The workers of pytest-xdist take file by file, and would wait for the last one.
_FIRST = ('runs', 'runtimes', 'tests', 'studies', 'system', 'evaluation', 'kernels')


def pytest_collection_modifyitems(items):
    """Begins with long tests, and skips those whose marker names something that this machine lacks."""
    items.sort(key=lambda item: (*_FIRST, item.path.parent.name).index(item.path.parent.name))
    reasons = {}
    for marker, modules in _MODULES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            reasons[marker] = f'{" and ".join(missing)} not installed'
    if jax.default_backend() != 'gpu':
        reasons['gpu'] = f'JAX runs on {jax.default_backend()} here'
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def call(monkeypatch, capsys):
    """Function that runs `impala NAME ARGUMENTS` in this process: exit status, output, and its reason or errors."""

    from impala_jax.cli import main as cli
    from tests.helpers.programs import ROOT

    def call(name, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', ['impala', name, *map(str, arguments)])
        # Commands silence other libraries for their whole process, which is this one.
        monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        reason = ended.value.code if isinstance(ended.value.code, str) else output.err.strip()
        status = 1 if isinstance(ended.value.code, str) else ended.value.code
        return status, output.out, reason

    return call
