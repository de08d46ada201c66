"""Vector decays of `linear_attention` and `delta_rule` on Hopper without one: kernels lowered for CUDA, and their
bodies run by numpy."""

from collections.abc import Iterable
from types import ModuleType

import numpy as np
import pytest

from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms, test_delta_gpu as delta, test_linear_gpu as linear
from tests.ops.emulated_gpu import emulated_gpu  # noqa: F401

OPS: dict[str, ModuleType] = {"linear_attention": linear, "delta_rule": delta}
CASES = {
    "one_token": (Case(2, 1, 1, 1, 64, 64, "vector"), linear.ONE_PASS),
    "odd": (Case(2, 65, 1, 1, 64, 64, "vector"), linear.ONE_PASS),
    "wide": (Case(1, 130, 1, 1, 128, 128, "vector"), linear.ONE_PASS),
    "grouped": (Case(1, 130, 1, 2, 64, 128, "vector"), linear.ONE_PASS),
    "wide_values": (Case(1, 70, 1, 1, 64, 256, "vector"), linear.ONE_PASS),
    "narrow_values": (Case(1, 130, 1, 1, 128, 64, "vector"), linear.ONE_PASS),
    "segments": (Case(1, 2048, 1, 1, 64, 64, "vector"), linear.SEGMENTS),
}
GATES = ms.SATURATED | {
    "slow": lambda shape: np.full(shape, -0.05),
    "one_block_slow": lambda shape: np.where(np.arange(shape[-1]) < 64, -0.05, -20.0) + np.zeros(shape),
}
"""With chunks that are done in one pass: everywhere, or in one block of channels of two."""


def _quick(names: Iterable[str], *quick: str) -> list:
    """All of them; only those named in `make test`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", _quick(CASES, "odd", "wide", "wide_values", "segments"))
def test_bodies_equal_the_recurrence(op: str, name: str, emulated_gpu: None) -> None:  # noqa: F811
    OPS[op].check_case(*CASES[name], name != "wide")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gate", _quick(GATES, "-10", "mixed", "bursts", "one_block_slow"))
def test_gates(op: str, gate: str, emulated_gpu: None) -> None:  # noqa: F811
    OPS[op].check_gates(GATES[gate], *CASES["wide" if gate == "one_block_slow" else "odd"])


@pytest.mark.parametrize(("op", "kernels"), [("linear_attention", (4, 6)), ("delta_rule", (4, 7))])
@pytest.mark.parametrize("packed", [True, False])
def test_forward_and_backward_lower_for_cuda(op: str, kernels: tuple, packed: bool) -> None:
    name = "wide" if packed else "segments"
    OPS[op].check_lowering(*CASES[name], packed, kernels[not packed])
