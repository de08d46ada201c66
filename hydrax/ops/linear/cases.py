"""Named shapes of `linear_attention`, and random inputs of the ops with a matrix state; for tests and examinations."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; `decay` is "none", "constant", "scalar" or "vector"."""

    B: int
    T: int
    H: int
    Hv: int
    K: int
    V: int
    decay: str


CASES = {
    "none": Case(2, 65, 2, 2, 8, 16, "none"),
    "constant": Case(2, 63, 2, 2, 8, 8, "constant"),
    "scalar": Case(2, 64, 2, 2, 8, 16, "scalar"),
    "scalar_grouped": Case(2, 65, 1, 4, 8, 8, "scalar"),
    "vector": Case(2, 65, 2, 2, 8, 16, "vector"),
    "vector_grouped": Case(1, 257, 2, 4, 8, 8, "vector"),
    "one_token": Case(2, 1, 2, 2, 8, 8, "scalar"),
}

KERNELS = {
    "none": Case(2, 257, 2, 2, 128, 128, "none"),
    "constant": Case(2, 300, 2, 2, 64, 64, "constant"),
    "scalar": Case(2, 1000, 2, 2, 128, 128, "scalar"),
    "grouped": Case(2, 300, 1, 4, 64, 128, "scalar"),
    "narrow values": Case(2, 130, 2, 2, 128, 64, "scalar"),
    "wide values": Case(1, 200, 1, 2, 128, 256, "scalar"),
    "one long row": Case(1, 2048, 1, 1, 128, 128, "scalar"),
    "vector": Case(2, 300, 2, 2, 64, 64, "vector"),
    "wide vector": Case(1, 1000, 2, 2, 128, 128, "vector"),
    "one token": Case(3, 1, 1, 2, 128, 128, "vector"),
}
"""What kernels are examined on. Without decay keys are wider than a chunk is long: with 64 keys of 64 channels and β up
to 2, the delta rule amplifies the rounding of bf16 beyond the tolerance, by XLA even more than by the kernels."""


def inputs(case: Case, *, beta: bool) -> dict[str, np.ndarray]:
    """Random arguments of the op by name, in fp64; keys have norm 1, betas lie in (0, 2)."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, case.B, case.T, case.H, case.K))
    x = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    x["v"] = rng.normal(size=(case.B, case.T, case.Hv, case.V))
    if beta:
        x["beta"] = rng.uniform(0, 2, size=(case.B, case.T, case.Hv))
    shapes = {
        "constant": (case.Hv,),
        "scalar": (case.B, case.T, case.Hv),
        "vector": (case.B, case.T, case.H, case.K),
    }
    if case.decay in shapes:
        x["log_decay"] = -np.logaddexp(0, rng.normal(size=shapes[case.decay]))
    return x | {"initial_state": rng.normal(size=(case.B, case.Hv, case.K, case.V))}


def documents(B: int, T: int) -> np.ndarray:
    """Row 0: documents of one token, edges beside and on multiples of 16, padding. The others: one edge, at 31."""
    t = np.arange(T)
    ids = np.stack([np.searchsorted([1, 2, 16, 17, 48], t, side="right"), *[3 + (t >= 31)] * (B - 1)])
    ids[0, max(T - 5, 1) :] = -1
    return (ids + 1).astype(np.int32)
