"""Any Atari game with the paper's settings (appendix G); for example, --environment.name atari/breakout."""

from impala_jax import Config, EnvironmentConfig, NetworkConfig


def get_config() -> Config:
    """Returns the configuration."""
    # The defaults of Config are the paper's.
    return Config(
        total_frames=200_000_000,
        environment=EnvironmentConfig(name='atari/breakout', preset='paper'),
        network=NetworkConfig(torso='shallow_atari'),
    )
