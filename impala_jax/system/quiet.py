"""Log levels and warning filters for the libraries that this package uses."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings

from impala_jax.system.machine import expand_home, open_standard_streams


def quiet_libraries() -> None:
    """Silences log messages and warnings of other libraries, but not errors; to be called before importing them."""
    open_standard_streams()
    if expand_home('~') is None:
        os.environ.setdefault('KERAS_HOME', os.devnull)  # Keras, imported by Reverb, would create a folder named `~`.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # TensorFlow and XLA: errors only
    os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
    os.environ.setdefault('GLOG_minloglevel', '2')
    for name in ('absl', 'flax', 'h5py', 'jax', 'matplotlib', 'orbax', 'tensorflow'):
        logging.getLogger(name).setLevel(logging.ERROR)
    # 'No GPU/TPU found' is expected on CPU machines, but a GPU that is present and unused should be reported.
    xla_bridge = logging.getLogger('jax._src.xla_bridge')
    xla_bridge.setLevel(logging.WARNING)
    xla_bridge.addFilter(_is_error_or_unused_gpu)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings('ignore', category=category)
    # Child processes (ffmpeg, workers) execute a new program at once, so JAX's warning does not apply.
    warnings.filterwarnings('ignore', message=r'os\.fork\(\) was called')
    libraries = (
        'absl ale_py chex distrax flax gym gymnasium jax jaxlib launchpad numpy optax orbax portpicker reverb rlax '
        'tensorboardX tensorflow tensorflow_probability tensorstore tree'
    ).replace(' ', '|')
    warnings.filterwarnings('ignore', module=rf'({libraries})(\.|$)')
    warnings.filterwarnings('ignore', message=r'(\x1b\[\d+m)?WARN: ')  # gymnasium, attributed to its caller
    if importlib.util.find_spec('ale_py'):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # suppresses the banner


def _is_error_or_unused_gpu(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or 'may be present' in record.getMessage()
