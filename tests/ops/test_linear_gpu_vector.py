"""`linear_attention` with vector decays on Hopper without one: kernels lowered for CUDA, bodies run by numpy."""

import numpy as np
import pytest

from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms, test_linear_gpu as hopper
from tests.ops.emulated_gpu import emulated_gpu  # noqa: F401

CASES = {
    "one_token": (Case(2, 1, 1, 1, 64, 64, "vector"), hopper.ONE_PASS),
    "odd": (Case(2, 65, 1, 1, 64, 64, "vector"), hopper.ONE_PASS),
    "wide": (Case(1, 130, 1, 1, 128, 128, "vector"), hopper.ONE_PASS),
    "grouped": (Case(1, 130, 1, 2, 64, 128, "vector"), hopper.ONE_PASS),
    "wide_values": (Case(1, 70, 1, 1, 64, 256, "vector"), hopper.ONE_PASS),
    "narrow_values": (Case(1, 130, 1, 1, 128, 64, "vector"), hopper.ONE_PASS),
    "segments": (Case(1, 1024, 1, 1, 64, 64, "vector"), hopper.SEGMENTS),
}
GATES = {"fp32": ("q", "k", "v"), "bf16": ("q", "k", "v", "log_decay")}
SLOW = {
    "slow": lambda shape: np.full(shape, -0.05),
    "one_block_slow": lambda shape: np.where(np.arange(shape[-1]) < 64, -0.05, -20.0) + np.zeros(shape),
}
"""Decays for which products are direct: everywhere, or in one block of channels of two."""


@pytest.mark.parametrize(
    ("name", "packed"),
    [(name, name == "segments") for name in CASES] + [("odd", True), ("wide", True)],
)
def test_bodies_equal_the_recurrence(name: str, packed: bool, emulated_gpu: None) -> None:  # noqa: F811
    hopper.check_case(*CASES[name], packed)


def test_gates_in_bf16(emulated_gpu: None) -> None:  # noqa: F811
    hopper.check_case(*CASES["odd"], True, GATES["bf16"])


@pytest.mark.parametrize("gate", ms.SATURATED)
def test_saturated_gates(gate: str, emulated_gpu: None) -> None:  # noqa: F811
    hopper.check_gates(ms.SATURATED[gate], *CASES["odd"])


@pytest.mark.parametrize("gate", SLOW)
def test_direct_products(gate: str, emulated_gpu: None) -> None:  # noqa: F811
    hopper.check_gates(SLOW[gate], *CASES["wide"])


@pytest.mark.parametrize(
    ("name", "packed", "gates", "kernels"), [("wide", True, "fp32", 2), ("segments", False, "bf16", 4)]
)
def test_forward_and_backward_lower_for_cuda(name: str, packed: bool, gates: str, kernels: int) -> None:
    hopper.check_lowering(*CASES[name], packed, kernels, GATES[gates])
