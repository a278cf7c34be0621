"""All 57 Atari games with one network, all 18 actions and the paper's settings (section 5.3, appendix G).

The paper's Atari agents are feed-forward; --network.core lstm adds memory.
"""

from impala_jax import ActorConfig, Config, EnvironmentConfig, EvaluatorConfig, NetworkConfig


def get_config() -> Config:
    """Returns the configuration."""
    # The defaults of Config are the paper's.
    return Config(
        total_frames=11_400_000_000,
        environment=EnvironmentConfig(name='atari57', preset='paper'),
        network=NetworkConfig(torso='deep'),
        actor=ActorConfig(num_actors=6, num_envs=19),  # two environments per game
        # Evaluating 57 games would delay the training; evaluate checkpoints with launch/evaluate.py instead.
        evaluator=EvaluatorConfig(episodes=0),
    )
