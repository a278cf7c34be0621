"""All 57 Atari games with one network and all 18 actions, the paper's settings (section 5.3, appendix G).

The paper's agents are feed-forward on Atari; --network.core lstm gives this one a memory.
"""

from impala_jax import ActorConfig, Config, EnvironmentConfig, EvaluatorConfig, NetworkConfig


def get_config() -> Config:
    # The defaults of Config are the paper's.
    return Config(
        total_frames=11_400_000_000,
        environment=EnvironmentConfig(name='atari57', preset='paper'),
        network=NetworkConfig(torso='deep'),
        actor=ActorConfig(num_actors=6, num_envs=19),  # Two environments a game
        # An evaluation of 57 games would keep up the training: score the checkpoints with launch/evaluate.py.
        evaluator=EvaluatorConfig(episodes=0),
    )
