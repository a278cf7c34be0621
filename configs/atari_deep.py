"""Any Atari game with the paper's deep residual network: --environment.name atari/breakout

The paper's agents are feed-forward on Atari; --network.core lstm gives this one a memory.
"""

from impala_jax import Config, EnvironmentConfig, NetworkConfig


def get_config() -> Config:
    return Config(
        total_frames=200_000_000,
        environment=EnvironmentConfig(name='atari/breakout', preset='paper'),
        network=NetworkConfig(torso='deep'),
    )
