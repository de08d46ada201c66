"""Named shapes of `short_conv`, shared by tests, tuning and benchmarks."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: W taps, `dilation` tokens apart, over the channels C, with or without bias and activation."""

    B: int
    T: int
    C: tuple[int, ...]
    W: int
    bias: bool = False
    activation: str | None = None
    dilation: int = 1


CASES = {
    "plain": Case(2, 17, (5,), 4),
    "bias_silu": Case(2, 16, (2, 3), 4, True, "silu"),
    "long": Case(1, 33, (3,), 9, False, "silu"),
    "wider_than_row": Case(2, 2, (3,), 4, True),
    "one_token": Case(2, 1, (2, 2), 4, False, "silu"),
    "one_tap": Case(1, 5, (3,), 1),
    "apart": Case(2, 23, (3,), 4, True, "silu", 3),
    "apart_wider_than_row": Case(2, 4, (3,), 3, dilation=4),
}

KERNELS = {
    "rows": Case(2, 1000, (2, 128), 4, True, "silu"),
    "eight taps": Case(1, 500, (128,), 8, False, "silu"),
    "one token": Case(2, 1, (128,), 4, False, "silu"),
}
"""What kernels are examined on."""


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random arguments of `short_conv` by name, in fp64."""
    rng = np.random.default_rng(0)
    x = {"x": rng.normal(size=(case.B, case.T, *case.C)), "w": rng.normal(size=(case.W, *case.C))}
    if case.bias:
        x["b"] = rng.normal(size=case.C)
    return x | {"initial_state": rng.normal(size=(case.B, case.dilation * (case.W - 1), *case.C))}
