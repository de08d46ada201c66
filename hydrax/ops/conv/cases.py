"""Named shapes of `short_conv`, shared by tests, tuning and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: W taps over the channel dimensions C, with or without bias and activation."""

    B: int
    T: int
    C: tuple[int, ...]
    W: int
    bias: bool = False
    activation: str | None = None


CASES = {
    "plain": Case(2, 17, (5,), 4),
    "bias_silu": Case(2, 16, (2, 3), 4, True, "silu"),
    "long": Case(1, 33, (3,), 9, False, "silu"),
    "wider_than_row": Case(2, 2, (3,), 4, True),
    "one_token": Case(2, 1, (2, 2), 4, False, "silu"),
    "one_tap": Case(1, 5, (3,), 1),
}
