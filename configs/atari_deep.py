"""Any Atari game with the paper's deep residual network; for example, --environment.name atari/breakout.

The paper's Atari agents are feed-forward; --network.core lstm adds memory.
"""

from impala_jax import Config, EnvironmentConfig, NetworkConfig


def get_config() -> Config:
    """Returns the configuration."""
    return Config(
        total_frames=200_000_000,
        environment=EnvironmentConfig(name='atari/breakout', preset='paper'),
        network=NetworkConfig(torso='deep'),
    )
