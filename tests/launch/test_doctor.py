"""`launch.doctor` finds kernels that are wrong, and says how to leave them out."""

import dataclasses
from collections.abc import Callable

import jax
import pytest

from hydrax.core.typing import Array
from hydrax.eval import doctor
from hydrax.ops import table
from hydrax.ops.scan import linear_scan
from hydrax.ops.scan.cases import Linear
from tests.launch.conftest import run


def test_without_kernels_it_says_that_xla_is_used() -> None:
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert "linear_attention pallas_gpu does not serve: the device is 'cpu': expected a Hopper GPU" in outcome.out
    assert outcome.out.splitlines()[-1] == "No kernel serves 'cpu': plain XLA is used."


def by(kernel: Callable) -> Callable:
    """`linear_scan`, of which `kernel` takes the place of its kernels."""

    def op(*, impl: str, **x: Array) -> tuple[Array, Array]:
        return (linear_scan if impl == "recurrent" else kernel)(
            **x, impl="recurrent" if impl == "recurrent" else "chunked"
        )

    return op


def wrong_output(**x: Array) -> tuple[Array, Array]:
    h, last = linear_scan(**x)
    return 1.1 * h, last


def wrong_gradient(a: Array, **x: Array) -> tuple[Array, Array]:
    """Forgets that its decays have a gradient."""
    return linear_scan(jax.lax.stop_gradient(a), **x)


def not_finite(**x: Array) -> tuple[Array, Array]:
    h, last = linear_scan(**x)
    return h / 0, last


def broken(**x: Array) -> tuple[Array, Array]:
    raise RuntimeError("ptxas: out of registers")


def refusing(**x: Array) -> tuple[Array, Array]:
    raise ValueError("linear_scan: impl = 'pallas_gpu' cannot serve: it is Sunday")


@pytest.mark.parametrize(
    ("kernel", "code", "said"),
    [
        (linear_scan, 0, ["All kernels that serve this device are right."]),
        (wrong_output, 1, ["wrong", "o 1.0e-01", '--config.model.impl="linear_scan=chunked"']),
        (wrong_gradient, 1, ["wrong", "da 1.0e+00", '--config.model.impl="linear_scan=chunked"']),
        (not_finite, 1, ["wrong", "o nan", '--config.model.impl="linear_scan=chunked"']),
        (broken, 1, ["failed", "RuntimeError: ptxas: out of registers", '--config.model.impl="linear_scan=chunked"']),
        (refusing, 0, ["linear_scan pallas_gpu does not serve: it is Sunday", "plain XLA is used"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_wrong_is_found(kernel: Callable, code: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = dataclasses.replace(
        doctor.SUBJECTS["linear_scan"], op=by(kernel), cases={"tiny": Linear(2, 33, (4,))}, dtypes=("float32",)
    )
    monkeypatch.setitem(doctor.SUBJECTS, "linear_scan", subject)
    outcome = run("doctor", "--ops=linear_scan")
    assert (outcome.code, outcome.err) == (code, "")
    assert all(text in outcome.out for text in said), outcome.out


def test_what_it_cannot_examine_is_refused() -> None:
    outcome = run("doctor", "--ops=linear_scan,sorting")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: ops = 'sorting': expected some of {', '.join(doctor.SUBJECTS)}\n"


def test_every_kernel_is_examined() -> None:
    kernels = {(op, name) for op, forms in table.OPS.items() for name in forms if name.startswith("pallas")}
    assert {(what.op, what.kernel) for what in doctor.examinations([])} == kernels
