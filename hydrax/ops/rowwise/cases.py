"""Named shapes of `glu` and `rms_norm`, shared by tests and examinations."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: rows of the last dimension of C; with a weight, with a gate."""

    B: int
    T: int
    C: tuple[int, ...]
    weight: bool = False
    gate: bool = False
    activation: str | None = "silu"
    mean: bool = True


NORMS = {
    "gated": Case(2, 1024, (4, 128), weight=True, gate=True),
    "sigmoid": Case(1, 999, (64, 64), weight=True, gate=True, activation="sigmoid"),
    "weight": Case(2, 1000, (8, 128), weight=True),
    "L2": Case(2, 1024, (4, 128), mean=False),
}
"""What the kernels of `rms_norm` are examined on."""

PRODUCTS = {str(name): Case(2, 500, (1024,), gate=True, activation=name) for name in ("silu", "relu", "gelu", None)}
"""What the kernel of `glu` is examined on."""


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random arguments by name, in fp64; some rows are nearly zero."""
    rng = np.random.default_rng(0)
    shape = (case.B, case.T, *case.C)
    x = {"x": rng.normal(size=shape)}
    x["x"][:, 0] *= 1e-3
    if case.weight:
        x["weight"] = 1 + 0.1 * rng.normal(size=case.C[-1:])
    return x | ({"gate": 3 * rng.normal(size=shape)} if case.gate else {})
