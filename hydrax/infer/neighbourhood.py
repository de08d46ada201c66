"""What windows with strides and dilations save on tiled hardware (arXiv 2504.16922), counted without running anything.

Query t of a row reads the keys from max(l - (w - 1), 0) to t, l = ⌊t/s⌋·s + s - 1 the leader of its group: `sim` counts
the tiles of keys that each tile of queries touches, against those of full attention.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Attributes:
    tiles: tiles of full attention over those that are touched: a bound of the speed-up.
    flops: pairs of full attention over visible pairs.
    waste: flops / tiles: work on pairs in touched tiles that nobody sees, as a factor >= the same of full attention.
    block_sparse: whether all touched tiles are full, apart from the causal diagonal.
    """

    tiles: float
    flops: float
    waste: float
    block_sparse: bool


def spans(T: int, w: int, s: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """[start, end) of the keys of every query. Without `causal`, the window keeps w keys at both ends of the row."""
    t = np.arange(T)
    if causal:
        leader = t // s * s + s - 1
        return np.maximum(leader - (w - 1), 0), t + 1
    leader = np.minimum(t // s * s + s // 2, T - 1)
    start = np.clip(leader - w // 2, 0, max(T - w, 0))
    return start, np.minimum(start + w, T)


def sim(T: int, w: int, s: int, delta: int, causal: bool, Tq: int, Tkv: int) -> Simulation:
    """The simulation of T tokens, window w, stride s, dilation delta, tiles of Tq queries by Tkv keys.

    A dilation is folded out first: delta rows of every delta-th token, each with its own windows and tiles.

    Raises:
      ValueError: a size below 1, or a stride above the window.
    """
    if min(T, w, s, delta, Tq, Tkv) < 1 or s > w:
        raise ValueError(f"sim: T, w, s, delta, Tq, Tkv = {(T, w, s, delta, Tq, Tkv)}: expected sizes >= 1 and s <= w")
    rows = [-(-(T - r) // delta) for r in range(min(delta, T))]
    touched, seen, partial = (sum(x) for x in zip(*(_count(n, w, s, causal, Tq, Tkv) for n in rows), strict=True))
    dense, pairs, _ = _count(T, T, 1, causal, Tq, Tkv) if causal else (-(-T // Tq) * -(-T // Tkv), T * T, 0)
    tiles, flops = dense / touched, pairs / seen
    return Simulation(tiles, flops, flops / tiles, partial == 0)


def _count(T: int, w: int, s: int, causal: bool, Tq: int, Tkv: int) -> tuple[int, int, int]:
    """Touched tiles, visible pairs, and tiles that are neither full nor on the diagonal."""
    start, end = spans(T, w, s, causal)
    touched = partial = 0
    for first in range(0, T, Tq):
        own = slice(first, first + Tq)
        low, high = start[own].min() // Tkv, -(-end[own].max() // Tkv)
        touched += high - low
        for tile in range(low, high):
            a, b = tile * Tkv, min((tile + 1) * Tkv, T)
            full = (start[own] <= a).all() and (end[own] >= b).all()
            diagonal = causal and b > first
            inside = (start[own] <= a).all()  # on the diagonal only the triangle may be missing
            partial += not (full or (diagonal and inside))
    return int(touched), int((end - start).sum()), partial
