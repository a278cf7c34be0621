"""Finite Markov decision processes and their exact solutions, in NumPy with float64 and without sampling."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class MDP:
    """A finite Markov decision process whose rewards are deterministic given state and action.

    In an episodic task, the last state leads to itself with reward 0, or back to the first state.

    Args:
      transitions: Probabilities p(y|x, a) of the next states, [S, A, S] float64.
      rewards: Rewards, [S, A] float64.
      discount: Discount gamma, in [0, 1).

    Raises:
      ValueError: Shapes do not agree, rows of `transitions` are not probability distributions, numbers are not finite,
        or the discount is outside [0, 1).
    """

    transitions: Array
    rewards: Array
    discount: float = 0.9

    def __post_init__(self):
        for name in ('transitions', 'rewards'):
            array = np.array(getattr(self, name), np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        shape = self.transitions.shape
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
            raise ValueError(f'transitions must be [S, A, S], p(y|x, a), got shape {shape}')
        if self.rewards.shape != shape[:2]:
            raise ValueError(f'rewards must be [S, A] = {shape[:2]} to fit transitions, got shape {self.rewards.shape}')
        if not np.isfinite(self.rewards).all():
            raise ValueError('rewards must be finite')
        require_distributions('transitions', self.transitions)
        if not 0 <= self.discount < 1:
            raise ValueError(f'discount must lie in [0, 1), got {self.discount}')

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.rewards.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.rewards.shape[1]

    @classmethod
    def random(
        cls, num_states: int, num_actions: int, seed: int, discount: float = 0.9, concentration: float = 1.0
    ) -> MDP:
        """Samples transitions from a Dirichlet distribution and rewards from a standard normal distribution.

        Args:
          num_states: Number of states S.
          num_actions: Number of actions A.
          seed: Seed for NumPy's default generator.
          discount: Discount gamma, in [0, 1).
          concentration: Concentration of the Dirichlet distribution; near 0 the transitions are almost deterministic.
        """
        rng = np.random.default_rng(seed)
        transitions = rng.dirichlet(np.full(num_states, concentration), size=(num_states, num_actions))
        return cls(transitions, rng.standard_normal((num_states, num_actions)), discount)

    @classmethod
    def chain(cls, num_states: int = 19, discount: float = 0.99) -> MDP:
        """Returns a continuing version of the random walk in Sutton & Barto (2018, example 7.1).

        Action 0 steps left, action 1 right. A step off the left end has reward -1, off the right end 1, and leads back
        to the middle, so every state is recurrent. A uniform walk takes about (num_states / 2)^2 steps to an end: 100
        for 19 states, which is the horizon of the default discount.

        Args:
          num_states: Number of states.
          discount: Discount gamma, in [0, 1).
        """
        steps = np.arange(num_states)[:, None] + np.array([-1, 1])  # [S, A]
        outside = (steps < 0) | (steps >= num_states)
        transitions = np.eye(num_states)[np.where(outside, num_states // 2, steps)]
        return cls(transitions, np.where(outside, [-1.0, 1.0], 0.0), discount)


def value(mdp: MDP, policy: ArrayLike) -> Array:
    """Computes the value function of a policy by solving V = r + gamma P V.

    Args:
      mdp: The MDP.
      policy: Policy, [S, A].

    Returns:
      V, [S] float64.

    Raises:
      ValueError: The policy does not fit this MDP.
    """
    policy = as_policies(mdp.rewards.shape, policy=policy)[0]
    return np.linalg.solve(
        np.eye(mdp.num_states) - mdp.discount * transition_matrix(mdp, policy), np.sum(policy * mdp.rewards, 1)
    )


def stationary_distribution(mdp: MDP, policy: ArrayLike) -> Array:
    """Computes the stationary distribution of the states under a policy.

    Args:
      mdp: The MDP.
      policy: Policy, [S, A].

    Returns:
      State probabilities, [S] float64.

    Raises:
      ValueError: The policy does not fit this MDP, or has more than one stationary distribution.
    """
    policy = as_policies(mdp.rewards.shape, policy=policy)[0]
    balance = np.vstack([np.eye(mdp.num_states) - transition_matrix(mdp, policy).T, np.ones(mdp.num_states)])
    distribution, _, rank, _ = np.linalg.lstsq(balance, np.eye(mdp.num_states + 1)[-1], rcond=None)
    if rank < mdp.num_states:
        raise ValueError('the policy has more than one stationary distribution; pass weights for the states instead')
    return np.maximum(distribution, 0) / np.maximum(distribution, 0).sum()


def transition_matrix(mdp: MDP, weights: Array) -> Array:
    """Computes transitions between states, [S, S], under a policy or other weights of the actions, [S, A]."""
    return np.einsum('xa,xay->xy', weights, mdp.transitions)


def as_policies(shape: tuple[int, ...], **policies: ArrayLike) -> list[Array]:
    """Converts policies to float64 arrays, [S, A].

    Args:
      shape: The expected shape (S, A).
      **policies: Policies by name.

    Raises:
      ValueError: A policy has a different shape, or its rows are not probability distributions.
    """
    arrays = []
    for name, policy in policies.items():
        array = np.asarray(policy, np.float64)
        if array.ndim != 2:
            raise ValueError(f'{name} must be a policy [S, A], got shape {array.shape}')
        if array.shape != shape:
            raise ValueError(f'{name} must be [S, A] = {shape}, got shape {array.shape}')
        require_distributions(name, array)
        arrays.append(array)
    return arrays


def require_distributions(name: str, array: Array) -> None:
    """Raises ValueError unless each row, along the last axis, is a probability distribution."""
    sums = array.sum(axis=-1)
    # The tolerance allows for values computed in float32.
    wrong = ~(np.abs(sums - 1) < 1e-5) | ~(array >= 0).all(axis=-1)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f'{name}[{", ".join(map(str, index))}]' if index else name
        raise ValueError(
            f'{where} must be probabilities that sum to 1, got {array[index].tolist()} of sum {sums[index]:g}; '
            'divide by the sum'
        )
