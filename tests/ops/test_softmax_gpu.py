"""`attention` on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.pallas.tuning import Tuning
from hydrax.ops.softmax import attention, gpu
from hydrax.ops.softmax.cases import Case
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.ops.test_softmax import cotangents, documents, evaluate, inputs, options_of, oracle
from tests.tolerances import TOLERANCE, assert_close, assert_equal

CASES = {
    "documents": Case(1, 250, 2, 1, 64, 64, documents=True),
    "window": Case(1, 256, 1, 1, 64, 128, window=100),
    "sinks": Case(1, 129, 1, 1, 128, 64, window=40, sinks=True, documents=True),
    "sink_tokens": Case(1, 300, 2, 1, 64, 64, window=40, sink_tokens=3, documents=True),
    "dilation": Case(1, 270, 2, 1, 64, 64, window=91, dilation=3, documents=True),
    "ends": Case(1, 200, 4, 2, 64, 64, ends=True, key_bias=True, documents=True),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention` can run its kernels, whatever the device."""
    monkeypatch.setattr("hydrax.ops.softmax.hopper_refusal", lambda *_: None)
    monkeypatch.setattr(gpu, "TUNING", {jax.devices()[0].device_kind: Tuning()})


def check_case(case: Case) -> None:
    """Outputs, lse and all gradients against the oracle in fp64."""
    arrays, ids = inputs(case, jnp.bfloat16)
    do, dlse = cotangents(case)
    do = np.asarray(jnp.asarray(do, jnp.bfloat16), np.float64)
    actual, expected = evaluate(case, arrays, ids, do, dlse, impl="pallas_gpu"), oracle(case, arrays, ids, do, dlse)
    assert actual.keys() == expected.keys()
    nothing = np.isneginf(expected["lse"])
    assert_equal("rows that see nothing", np.isneginf(actual["lse"]), nothing)
    if case.documents:
        assert not actual["o"][np.asarray(ids) == 0].any()
    for what, value in expected.items():
        kept = ~nothing if what == "lse" else ...
        tolerance = TOLERANCE["bf16_gradient" if what[0] == "d" else "bf16_output"]
        assert_close(what, actual[what][kept], value[kept], tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("documents", "ends") else [pytest.mark.slow]) for n in CASES]
)
@pytest.mark.usefixtures("emulated_gpu")
def test_bodies_equal_the_definition(name: str) -> None:
    check_case(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_lower_for_cuda(name: str) -> None:
    case = CASES[name]
    arrays, ids = inputs(case, jnp.bfloat16)

    def run(arrays: dict, ids: jax.Array | None) -> dict:
        f = lambda arrays: attention(**arrays, segment_ids=ids, **options_of(case), impl="pallas_gpu").sum()  # noqa: E731
        return jax.grad(f)(arrays)

    assert lowered_kernels(run, arrays, ids) == 3


@pytest.mark.parametrize(
    "rules",
    [
        {"segment_ids": jnp.asarray(np.repeat([[1, 2]], 256, axis=1), jnp.int32)},
        {"ends": jnp.asarray(np.repeat([255, 2**30], 256)[None, :, None], jnp.int32)},
    ],
    ids=["documents", "ends"],
)
@pytest.mark.usefixtures("emulated_gpu")
def test_blocks_that_no_query_sees_are_not_read(rules: dict) -> None:
    """NaN in the values of keys that are gone would show."""
    arrays, _ = inputs(Case(1, 512, 1, 1, 64, 64), jnp.bfloat16)
    poisoned = arrays | {"v": arrays["v"].at[:, :256].set(jnp.nan)}
    o = attention(**poisoned, **rules, impl="pallas_gpu")
    assert np.isnan(o[:, :256]).all()
    assert_equal("o", o[:, 256:], attention(**arrays, **rules, impl="pallas_gpu")[:, 256:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 4, "dilation": 3}, "it has no dilation"),
        ({"softcap": 2.0}, "it has no softcap"),
        ({"bias": jnp.zeros((1, 1, 8, 8))}, "it gives no gradient of a bias"),
        ({"kv_positions": jnp.arange(8)[None]}, "it serves self-attention only"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict, message: str) -> None:
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"impl = 'pallas_gpu' cannot serve: {message}"):
        attention(x, x, x, impl="pallas_gpu", **changes)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (jnp.zeros((1, 8, 1, 64)), "float32"),
        (jnp.zeros((1, 8, 1, 80), jnp.bfloat16), "K, V = 80, 80"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(q: jax.Array, message: str) -> None:
    assert message in gpu.refusal(q, q, q)


def test_what_cudnn_serves_well_does_not_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN forms a dense mask of documents, and knows no lives of keys."""
    taken = []
    monkeypatch.setattr("hydrax.ops.softmax.on_one_device", lambda: True)
    monkeypatch.setattr("hydrax.ops.softmax._cudnn_refusal", lambda *_: None)
    monkeypatch.setattr(
        "hydrax.ops.softmax.select", lambda op, impl, forms, default, shape: taken.append(default) or forms["xla"]
    )
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    attention(x, x, x)
    attention(x, x, x, segment_ids=documents(Case(1, 8, 1, 1, 64, 64)))
    monkeypatch.setattr("hydrax.ops.softmax._cudnn_refusal", lambda *_: "no")
    attention(x, x, x, ends=jnp.full((1, 8, 1), 4))
    assert taken == ["cudnn", "pallas_gpu", "pallas_gpu"]
