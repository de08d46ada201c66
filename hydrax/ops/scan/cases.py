"""Named shapes of `linear_scan` and `selective_scan`, shared by tests, tuning and benchmarks."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """`linear_scan` over the channels C."""

    B: int
    T: int
    C: tuple[int, ...]
    complex: bool = False


@dataclasses.dataclass(frozen=True)
class Selective:
    """`selective_scan` with N states for each of D channels."""

    B: int
    T: int
    D: int
    N: int


CASES: dict[str, Linear | Selective] = {
    "linear": Linear(2, 65, (5,)),
    "linear_heads": Linear(2, 63, (2, 3)),
    "linear_complex": Linear(2, 64, (4,), complex=True),
    "linear_long": Linear(1, 257, (4,)),
    "linear_one_token": Linear(2, 1, (4,)),
    "selective": Selective(2, 65, 5, 4),
    "selective_one_state": Selective(2, 63, 6, 1),
    "selective_even": Selective(2, 64, 3, 8),
    "selective_long": Selective(1, 257, 4, 4),
    "selective_one_token": Selective(2, 1, 4, 4),
}

KERNELS = {
    "rows": Linear(2, 1000, (2, 128)),
    "one long row": Linear(1, 4096, (256,)),
    "one token": Linear(2, 1, (128,)),
}
"""What kernels of `linear_scan` are examined on."""


def inputs(case: Linear) -> dict[str, np.ndarray]:
    """Random arguments of `linear_scan` by name, in fp64, with real decays; some of these are 0."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, size=(case.B, case.T, *case.C)), rng.normal(size=(case.B, case.T, *case.C))
    a = np.where(rng.uniform(size=a.shape) < 0.01, 0, a)
    return {"a": a, "b": b, "initial_state": rng.normal(size=(case.B, *case.C))}
