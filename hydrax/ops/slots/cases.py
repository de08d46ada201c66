"""Named shapes of `slot_attention`, shared by tests, tuning and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, with M slots per head."""

    B: int
    T: int
    H: int
    K: int
    V: int
    M: int


CASES = {
    "odd": Case(2, 65, 2, 8, 16, 8),
    "short": Case(2, 63, 1, 8, 8, 16),
    "even": Case(2, 64, 2, 8, 8, 4),
    "long": Case(1, 257, 2, 8, 8, 8),
    "one_token": Case(2, 1, 2, 8, 16, 8),
}
