"""Named shapes of `ema`, shared by tests, tuning and benchmarks."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, with N modes for each of D channels."""

    B: int
    T: int
    D: int
    N: int
    complex: bool = False


CASES = {
    "real": Case(2, 67, 3, 4),
    "complex": Case(2, 67, 3, 4, complex=True),
    "short": Case(2, 15, 3, 4, complex=True),
    "even": Case(1, 64, 5, 1),
    "one_mode": Case(2, 33, 4, 1, complex=True),
    "one_token": Case(2, 1, 3, 4, complex=True),
}


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random arguments of `ema` by name, in fp64; some modes hardly decay, one is as good as gone."""
    rng, modes = np.random.default_rng(case.T), (case.D, case.N)
    x = {
        "x": rng.normal(size=(case.B, case.T, case.D)),
        "log_decay": -np.exp(rng.uniform(-6, 2, modes)),
        "write": rng.normal(size=modes),
        "read": rng.normal(size=modes),
        "initial_state": rng.normal(size=(case.B, *modes)),
    }
    x["log_decay"][0, 0] = -60
    if case.complex:
        x["angle"] = rng.uniform(0, 6.3, modes)
        x["read"] = x["read"] + 1j * rng.normal(size=modes)
        x["initial_state"] = x["initial_state"] + 1j * rng.normal(size=(case.B, *modes))
    return x
