"""Named shapes of `linear_scan` and `selective_scan`, shared by tests, tuning and benchmarks."""

import dataclasses


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
