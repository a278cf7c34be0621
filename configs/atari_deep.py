"""Any Atari game with the paper's deep residual network and LSTM: --environment.name atari/breakout"""

from impala_jax import Config, EnvironmentConfig, NetworkConfig


def get_config() -> Config:
    return Config(
        total_frames=200_000_000,
        environment=EnvironmentConfig(name='atari/breakout', preset='paper'),
        network=NetworkConfig(torso='deep', core='lstm'),
    )
