"""Games of MinAtar in JAX: Atari's Breakout and Space Invaders on a board of 10 x 10 cells.

The rules are those of Young and Tian (2019), "MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible
Reinforcement Learning Experiments", as in version 1.0.15 of the package of the authors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival
from impala_jax.types import Array, ArraySpec, EnvironmentSpec, PyTree

_SIZE = 10
_CELLS = np.arange(_SIZE)
_LEFT, _RIGHT, _FIRE = 1, 3, 5
_NUM_ACTIONS = 6  # No-op, left, up, right, down and fire, in every game.


class Game(Protocol):
    """Rules of a game, as pure functions without randomness; a state is a PyTree of arrays."""

    num_channels: int

    def start(self, side: Array) -> Any:
        """Returns the state at the start of an episode; `side` is a random bool."""
        ...

    def act(self, state: Any, action: Array) -> tuple[Any, Array, Array]:
        """Takes a step: the next state, the reward and whether the game is over."""
        ...

    def planes(self, state: Any) -> list[Array]:
        """Returns where the objects of each kind are, bool [10, 10] per channel."""
        ...


class MinAtarState(NamedTuple):
    """State of an episode."""

    game: PyTree
    last_action: Array  # int32, action that was executed in the last step.


class MinAtar:
    """A game with sticky actions.

    The observation is [10, 10, channels] uint8, with a 1 where there is an object of the kind of the channel. All games
    have the same six actions. A step repeats the action of the last step with probability `sticky`. The first step of
    an episode repeats a no-op instead (in the package, the last action of the previous episode). Episodes have no time
    limit: they end when the game is lost.

    Args:
      game: The rules.
      sticky: Probability with which the last action is repeated.
    """

    def __init__(self, game: Game, sticky: float = 0.1):
        self._game, self._sticky = game, sticky
        shape = (_SIZE, _SIZE, game.num_channels)
        self.spec = EnvironmentSpec(ArraySpec(shape, np.dtype(np.uint8), bounds=(0, 1)), _NUM_ACTIONS)

    def reset(self, key: Array) -> tuple[MinAtarState, Array]:
        """See `Task.reset`."""
        return self.start(jax.random.bernoulli(key))

    def step(self, state: MinAtarState, action: Array, key: Array) -> tuple[MinAtarState, Arrival]:
        """See `Task.step`."""
        return self.act(state, action, jax.random.bernoulli(key, self._sticky))

    def start(self, side: Array) -> tuple[MinAtarState, Array]:
        """Starts an episode without randomness; see `Game.start`."""
        state = MinAtarState(self._game.start(side), jnp.int32(0))
        return state, self._observation(state)

    def act(self, state: MinAtarState, action: Array, repeat: Array) -> tuple[MinAtarState, Arrival]:
        """Takes a step without randomness; `repeat`, bool, states whether the last action is repeated."""
        action = jnp.where(repeat, state.last_action, action)
        game, reward, terminated = self._game.act(state.game, action)
        state = MinAtarState(game, action)
        return state, Arrival(self._observation(state), jnp.float32(reward), terminated)

    def _observation(self, state: MinAtarState) -> Array:
        return jnp.stack(self._game.planes(state.game), axis=-1).astype(jnp.uint8)


class BreakoutState(NamedTuple):
    """State of Breakout; integers are int32."""

    paddle: Array  # Column of the paddle, which is in the last row.
    ball: Array  # [2], row and column.
    last_ball: Array  # [2], row and column one step before.
    velocity: Array  # [2], -1 or 1 each: change of the row and of the column per step.
    bricks: Array  # [10, 10] bool
    touched: Array  # bool, whether the ball met a brick in the last step; it then passes through the next one.


class Breakout:
    """The ball moves diagonally and breaks bricks, with reward 1 each; the game ends when it passes the paddle.

    The channels are paddle, ball, trail (the previous position of the ball) and bricks. When all bricks are broken,
    three new rows appear as the ball reaches the last row.
    """

    num_channels = 4
    _WALL = np.broadcast_to(((_CELLS >= 1) & (_CELLS <= 3))[:, None], (_SIZE, _SIZE))

    def start(self, side: Array) -> BreakoutState:
        """See `Game.start`: the ball enters from the left, or from the right if `side` is True."""
        ball = jnp.array([3, 0], jnp.int32) + jnp.array([0, _SIZE - 1], jnp.int32) * side
        velocity = jnp.array([1, 1], jnp.int32) - jnp.array([0, 2], jnp.int32) * side
        return BreakoutState(jnp.int32(4), ball, ball, velocity, jnp.array(self._WALL), jnp.bool_(False))

    def act(self, state: BreakoutState, action: Array) -> tuple[BreakoutState, Array, Array]:
        """See `Game.act`."""
        paddle = _moved(state.paddle, action)
        row, column = state.ball + state.velocity
        at_side = (column < 0) | (column >= _SIZE)
        at_top = row < 0
        row, column = jnp.maximum(row, 0), jnp.clip(column, 0, _SIZE - 1)
        cell = _cell(row, column)

        touches = (state.bricks & cell).any() & ~at_top
        breaks = touches & ~state.touched
        at_bottom = (row == _SIZE - 1) & ~touches
        # The ball bounces back in the direction from which it comes if it is about to pass the edge of the paddle.
        above = at_bottom & (state.ball[1] == paddle)
        edge = at_bottom & ~above & (column == paddle)
        returned = breaks | above | edge

        bricks = state.bricks & ~(cell & breaks)
        bricks |= self._WALL & at_bottom & ~bricks.any()
        turns = jnp.stack([at_top | returned, at_side | edge])
        ball = jnp.where(jnp.array([True, False]) & returned, state.ball, jnp.stack([row, column]))
        velocity = state.velocity * jnp.where(turns, -1, 1)
        state = BreakoutState(paddle, ball, state.ball, velocity, bricks, touches)
        return state, breaks, at_bottom & ~above & ~edge

    def planes(self, state: BreakoutState) -> list[Array]:
        """See `Game.planes`."""
        return [_cell(_SIZE - 1, state.paddle), _cell(*state.ball), _cell(*state.last_ball), state.bricks]


class InvadersState(NamedTuple):
    """State of Space Invaders; integers are int32."""

    cannon: Array  # Column of the cannon, which is in the last row.
    bullets: Array  # [10, 10] bool, of the cannon.
    bombs: Array  # [10, 10] bool, bullets of the aliens.
    aliens: Array  # [10, 10] bool
    to_right: Array  # bool, whether the aliens move to the right.
    interval: Array  # Longest number of steps between two moves of the aliens.
    until_move: Array  # Number of steps until the aliens move.
    until_bomb: Array  # Number of steps until an alien shoots.
    until_ready: Array  # Number of steps until the cannon can shoot.


class SpaceInvaders:
    """A cannon shoots at aliens, with reward 1 each; the game ends when an alien or its bullet hits the cannon.

    The channels are cannon, aliens, aliens that move to the left, aliens that move to the right, bullets of the cannon
    and bullets of the aliens. The fewer aliens are left, the faster they move. After a wave of aliens comes the next
    one, which moves more often, down to every six steps. There is no randomness but that of the actions.
    """

    num_channels = 6
    _WAVE = ((_CELLS < 4)[:, None]) & (_CELLS >= 2) & (_CELLS < 8)
    _INTERVAL, _SHORTEST_INTERVAL = 12, 6
    _BOMB_INTERVAL, _RELOADING = 10, 5

    def start(self, side: Array) -> InvadersState:
        """See `Game.start`; all episodes start alike."""
        none, interval = jnp.zeros((_SIZE, _SIZE), bool), jnp.int32(self._INTERVAL)
        return InvadersState(
            cannon=jnp.int32(5),
            bullets=none,
            bombs=none,
            aliens=jnp.array(self._WAVE),
            to_right=jnp.bool_(False),
            interval=interval,
            until_move=interval,
            until_bomb=jnp.int32(self._BOMB_INTERVAL),
            until_ready=jnp.int32(0),
        )

    def act(self, state: InvadersState, action: Array) -> tuple[InvadersState, Array, Array]:
        """See `Game.act`."""
        cannon = _moved(state.cannon, action)
        here = _cell(_SIZE - 1, cannon)
        fires = (action == _FIRE) & (state.until_ready == 0)
        # A new bullet appears above the cannon.
        bullets = _shifted(state.bullets, -1) | (_cell(_SIZE - 2, cannon) & fires)
        bombs = _shifted(state.bombs, 1)
        lost = ((bombs | state.aliens) & here).any()

        moves = state.until_move == 0
        edge = jnp.where(state.to_right, state.aliens[:, -1], state.aliens[:, 0]).any()
        # At the edge, aliens move down and turn. Those that leave the last row have won, and reappear at the top.
        descends = moves & edge
        sideways = jnp.where(state.to_right, jnp.roll(state.aliens, 1, axis=1), jnp.roll(state.aliens, -1, axis=1))
        aliens = jnp.where(edge, jnp.roll(state.aliens, 1, axis=0), sideways)
        aliens = jnp.where(moves, aliens, state.aliens)
        lost |= (descends & state.aliens[-1].any()) | (moves & (aliens & here).any())

        shoots = state.until_bomb == 0
        bombs |= _nearest_alien(aliens, cannon) & shoots

        hit = aliens & bullets
        aliens, bullets = aliens & ~hit, bullets & ~hit
        cleared = ~aliens.any()
        aliens |= self._WAVE & cleared
        faster = cleared & (state.interval > self._SHORTEST_INTERVAL)
        pause = jnp.minimum(state.aliens.sum(dtype=jnp.int32), state.interval)
        state = InvadersState(
            cannon=cannon,
            bullets=bullets,
            bombs=bombs,
            aliens=aliens,
            to_right=state.to_right ^ descends,
            interval=state.interval - faster,
            until_move=jnp.where(moves, pause - 1, state.until_move - 1),
            until_bomb=jnp.where(shoots, self._BOMB_INTERVAL - 1, state.until_bomb - 1),
            until_ready=jnp.where(fires, self._RELOADING - 1, jnp.maximum(state.until_ready - 1, 0)),
        )
        return state, hit.sum(), lost

    def planes(self, state: InvadersState) -> list[Array]:
        """See `Game.planes`."""
        cannon, to_right = _cell(_SIZE - 1, state.cannon), state.to_right
        left, right = state.aliens & ~to_right, state.aliens & to_right
        return [cannon, state.aliens, left, right, state.bullets, state.bombs]


def _nearest_alien(aliens: Array, column: Array) -> Array:
    """The lowest alien of the nearest column that has one, the left one of two, as bool [10, 10]."""
    distances = jnp.where(aliens.any(axis=0), jnp.abs(_CELLS - column), _SIZE)
    in_column = aliens & (_CELLS == distances.argmin())[None]
    return in_column & (_CELLS == jnp.where(in_column.any(axis=1), _CELLS, -1).max())[:, None]


def _moved(column: Array, action: Array) -> Array:
    step = jnp.int32(action == _RIGHT) - jnp.int32(action == _LEFT)
    return jnp.clip(column + step, 0, _SIZE - 1)


def _shifted(cells: Array, rows: int) -> Array:
    """Moves objects by one row down, or up if `rows` is -1; those that leave the board disappear."""
    empty = jnp.zeros((1, _SIZE), bool)
    return jnp.concatenate([empty, cells[:-1]] if rows == 1 else [cells[1:], empty])


def _cell(row: Array | int, column: Array) -> Array:
    """The board with one cell set, bool [10, 10]."""
    return (_CELLS == row)[:, None] & (_CELLS == column)[None]


GAMES: dict[str, Callable[[], Game]] = {'breakout': Breakout, 'space_invaders': SpaceInvaders}
"""Functions that build the rules of a game, by its name."""
