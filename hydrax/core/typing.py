"""The legend of dimension letters, and the array aliases used in signatures.

Letters, everywhere in hydrax (einsums use them in lower case):

    B  batch                    T  tokens (queries)        S  keys of a cache or a row
    D  model width              H  query/key heads         Hv value heads, a multiple of H
    K  key width per head       V  value width per head    R  value heads per key head, Hv / H
    C  tokens of a chunk        N  chunks of a row         W  taps of a short convolution
    L  layers                   F  inner width of an FFN    M  slots of a memory
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
"""Any nesting of dicts, lists, tuples and dataclasses with arrays at the leaves."""

ArrayLike = jax.Array | np.ndarray

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int", "PyTree"]
