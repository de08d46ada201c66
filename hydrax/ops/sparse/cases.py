"""Named shapes of `block_topk_attention`, on which its kernels are examined."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chosen:
    """G choices of n blocks of `block` tokens each, for H query heads and Hk heads of keys."""

    B: int
    T: int
    H: int
    Hk: int
    G: int
    K: int
    V: int
    n: int
    block: int


KERNELS = {
    "by heads of keys": Chosen(1, 1024, 8, 2, 2, 64, 64, 4, 64),
    "by query heads": Chosen(1, 640, 4, 2, 4, 128, 128, 3, 128),
    "by large groups": Chosen(1, 1024, 16, 1, 1, 64, 64, 8, 64),
}


def inputs(case: Chosen) -> dict[str, np.ndarray]:
    """Random arrays by name, in fp64; a query chooses its own block and others, some of which do not exist yet."""
    rng = np.random.default_rng(0)
    x = {
        "q": rng.normal(size=(case.B, case.T, case.H, case.K)),
        "k": rng.normal(size=(case.B, case.T, case.Hk, case.K)),
        "v": rng.normal(size=(case.B, case.T, case.Hk, case.V)),
    }
    idx = rng.integers(-1, case.T // case.block, (case.B, case.T, case.G, case.n)).astype(np.int32)
    idx[..., 0] = (np.arange(case.T) // case.block)[:, None]
    return x | {"idx": idx}
