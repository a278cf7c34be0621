"""Finite Markov decision processes, solved exactly. NumPy in float64; nothing is sampled."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class MDP:
    """A finite Markov decision process whose rewards are deterministic given state and action.

    An episodic task is one whose last state leads to itself with reward 0, or back to the first one.

    Raises:
      ValueError: shapes that do not agree, rows of `transitions` that are no distributions, numbers that are not
        finite, or a discount outside of [0, 1).
    """

    transitions: Array  # [S, A, S] float64, p(y|x, a)
    rewards: Array  # [S, A] float64
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
            raise ValueError('rewards must be finite, and some are not')
        require_distributions('transitions', self.transitions)
        if not 0 <= self.discount < 1:
            raise ValueError(f'discount must lie in [0, 1), got {self.discount}')

    @property
    def num_states(self) -> int:
        return self.rewards.shape[0]

    @property
    def num_actions(self) -> int:
        return self.rewards.shape[1]

    @classmethod
    def random(
        cls, num_states: int, num_actions: int, seed: int, discount: float = 0.9, concentration: float = 1.0
    ) -> MDP:
        """Transitions from a Dirichlet distribution, rewards from a standard normal one.

        Args:
          num_states: S.
          num_actions: A.
          seed: of NumPy's default generator.
          discount: gamma.
          concentration: of the Dirichlet distribution; near 0 the transitions are almost deterministic.
        """
        rng = np.random.default_rng(seed)
        transitions = rng.dirichlet(np.full(num_states, concentration), size=(num_states, num_actions))
        return cls(transitions, rng.standard_normal((num_states, num_actions)), discount)

    @classmethod
    def chain(cls, num_states: int = 19, discount: float = 0.99) -> MDP:
        """The random walk of Sutton & Barto (2018, example 7.1), without end: action 0 steps left, action 1 right.

        A step off the left end pays -1, off the right end 1, and leads back to the middle, so that every state recurs.
        A uniform walk takes about (num_states / 2)^2 steps to an end: 100 for 19 states, the horizon of the discount.
        """
        steps = np.arange(num_states)[:, None] + np.array([-1, 1])  # [S, A]
        outside = (steps < 0) | (steps >= num_states)
        transitions = np.eye(num_states)[np.where(outside, num_states // 2, steps)]
        return cls(transitions, np.where(outside, [-1.0, 1.0], 0.0), discount)


def value(mdp: MDP, policy: ArrayLike) -> Array:
    """V of a policy [S, A], [S] float64: solves V = r + gamma P V.

    Raises:
      ValueError: the policy does not belong to this MDP.
    """
    policy = as_policies(mdp.rewards.shape, policy=policy)[0]
    return np.linalg.solve(
        np.eye(mdp.num_states) - mdp.discount * transition_matrix(mdp, policy), np.sum(policy * mdp.rewards, 1)
    )


def stationary_distribution(mdp: MDP, policy: ArrayLike) -> Array:
    """How often a policy [S, A] visits each state in the long run, [S] float64.

    Raises:
      ValueError: the policy does not belong to this MDP, or where it ends up depends on where it starts.
    """
    policy = as_policies(mdp.rewards.shape, policy=policy)[0]
    balance = np.vstack([np.eye(mdp.num_states) - transition_matrix(mdp, policy).T, np.ones(mdp.num_states)])
    distribution, _, rank, _ = np.linalg.lstsq(balance, np.eye(mdp.num_states + 1)[-1], rcond=None)
    if rank < mdp.num_states:
        raise ValueError('the policy has more than one stationary distribution; give weights of the states instead')
    return np.maximum(distribution, 0) / np.maximum(distribution, 0).sum()


def transition_matrix(mdp: MDP, weights: Array) -> Array:
    """[S, S]: the transitions under a policy, or any other weights [S, A] of the actions."""
    return np.einsum('xa,xay->xy', weights, mdp.transitions)


def as_policies(shape: tuple[int, ...], **policies: ArrayLike) -> list[Array]:
    """Policies, given by name, as float64 arrays of this shape [S, A]; raises ValueError for one that is not."""
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
    # Generous enough for what was computed in float32.
    wrong = ~(np.abs(sums - 1) < 1e-5) | ~(array >= 0).all(axis=-1)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f'{name}[{", ".join(map(str, index))}]' if index else name
        raise ValueError(
            f'{where} must be probabilities that sum to 1, got {array[index].tolist()} of sum {sums[index]:g}; '
            'divide by the sum'
        )
