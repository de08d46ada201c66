"""Named shapes of `attention`, shared by tests, tuning and benchmarks."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; `documents`: packed rows with right padding; `bias`: shape of its first two dimensions; `ends`: random
    ones of keys, some of which live for ever and some not at all."""

    B: int
    T: int
    H: int
    Hk: int
    K: int
    V: int
    window: int | None = None
    sink_tokens: int = 0
    sinks: bool = False
    softcap: float | None = None
    bias: tuple[int, int] | None = None
    documents: bool = False
    dilation: int = 1
    ends: bool = False
    key_bias: bool = False


CASES = {
    "causal": Case(2, 33, 6, 2, 8, 8),
    "value_wider": Case(2, 31, 4, 1, 8, 16),
    "documents": Case(2, 33, 2, 1, 8, 8, documents=True),
    "window": Case(2, 45, 2, 1, 8, 8, window=5),
    "window_sink_tokens": Case(2, 45, 2, 1, 8, 8, window=5, sink_tokens=2, documents=True),
    "window_sinks": Case(2, 45, 4, 2, 8, 8, window=9, sinks=True, documents=True),
    "softcap_bias": Case(2, 33, 4, 2, 8, 8, softcap=2.0, bias=(1, 4), documents=True),
    "window_bias": Case(2, 32, 2, 2, 8, 8, window=7, bias=(2, 1)),
    "one_token": Case(2, 1, 4, 2, 8, 8, sinks=True),
    "dilation": Case(2, 33, 2, 1, 8, 8, window=13, dilation=3, documents=True),
    "dilation_ends": Case(2, 33, 2, 2, 8, 8, dilation=2, ends=True, key_bias=True, sinks=True),
    "dilation_ends_apart": Case(2, 33, 4, 2, 8, 8, dilation=3, ends=True, key_bias=True, sinks=True, documents=True),
    "ends": Case(2, 33, 4, 2, 8, 8, ends=True, key_bias=True, softcap=5.0, documents=True),
    "ends_window": Case(2, 45, 4, 2, 8, 8, window=9, ends=True, key_bias=True, sinks=True),
}

KERNELS = {
    "causal": Case(2, 300, 4, 2, 64, 64),
    "window": Case(1, 700, 2, 1, 128, 128, window=150),
    "sinks": Case(1, 257, 2, 2, 128, 64, window=40, sinks=True),
    "wider": Case(1, 500, 2, 2, 64, 128),
    "sink_tokens": Case(2, 700, 4, 2, 128, 128, window=150, sink_tokens=4, sinks=True),
    "dilation": Case(1, 600, 2, 1, 64, 64, window=200, dilation=3),
    "ends": Case(2, 900, 8, 2, 128, 128, ends=True, key_bias=True),
    "ends_window": Case(1, 500, 2, 2, 64, 64, window=200, ends=True, sinks=True),
}
"""What kernels are examined on."""


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random arrays of `attention` by name, in fp64."""
    normal = np.random.default_rng(0).normal
    x = {
        "q": normal(size=(case.B, case.T, case.H, case.K)) * 2,
        "k": normal(size=(case.B, case.T, case.Hk, case.K)),
        "v": normal(size=(case.B, case.T, case.Hk, case.V)),
    }
    if case.sinks:
        x["sinks"] = normal(size=case.H) + 1
    if case.bias is not None:
        x["bias"] = normal(size=(*case.bias, case.T, case.T))
    if case.key_bias:
        x["key_bias"] = normal(size=(case.B, case.T, case.Hk))
    return x


def lifetimes(case: Case) -> np.ndarray:
    """Ends of keys, int32 [B,T,Hk]: between one before the first position and far beyond the last."""
    return np.random.default_rng(1).integers(-1, 2 * case.T, size=(case.B, case.T, case.Hk), dtype=np.int32)
