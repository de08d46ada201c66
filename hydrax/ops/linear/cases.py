"""Named shapes of `linear_attention`, shared by tests, tuning and benchmarks."""

import dataclasses


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
