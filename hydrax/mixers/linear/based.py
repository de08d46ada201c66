"""Based (arXiv 2402.18668): linear attention whose features make the exponential's Taylor polynomial of degree 2.

    o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s + s²/2,      s = K^-½ q_t·k_j

It is `taylor` without positions: in the paper's models short convolutions and windows of attention, layers of their
own, tell the order (configs/recipes/based.py).
"""

import dataclasses
from typing import TypeAlias

from hydrax.mixers.linear import taylor
from hydrax.nn.position import Rope


@dataclasses.dataclass(frozen=True)
class Config(taylor.Config):
    rope: Rope = dataclasses.field(default_factory=lambda: Rope(fraction=0.0))


class Based(taylor.Taylor):
    """y = W_o o."""

    Config: TypeAlias = Config
