"""Attention to chosen blocks on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops import dispatch
from hydrax.ops.documents import document_positions
from hydrax.ops.pallas.tuning import Tuning
from hydrax.ops.softmax import cases, forms, gpu, live
from hydrax.ops.softmax.cases import Case
from hydrax.ops.sparse import blocks, compress, pooled
from hydrax.ops.sparse.gpu import ORDERS, block_topk_attention, refusal
from hydrax.ops.sparse.span_scores import Choice
from hydrax.ops.sparse.tokens import rows_and_keys
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.ops.test_softmax import documents
from tests.tolerances import TOLERANCE, assert_close, assert_equal

BY_QUERY_HEAD = "heads_apart"
CASES = {
    "heads": (Case(1, 150, 8, 1, 64, 64), 64),  # as many that thread blocks share the rows of a block of keys
    "documents": (Case(1, 270, 2, 2, 64, 64, documents=True), 64),
    BY_QUERY_HEAD: (Case(1, 200, 2, 1, 64, 64), 64),
    "wide": (Case(1, 600, 2, 1, 64, 64), 256),
}
QUICK = ("heads-tokens", "documents-blocks")
LARGE = {
    "groups": (Case(2, 1000, 16, 1, 128, 128), 64),
    "groups_documents": (Case(1, 900, 6, 2, 64, 64, documents=True), 128),
}
"""For a device."""
CHOSEN = 2


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TUNING", {jax.devices()[0].device_kind: Tuning()})


def problem(name: str) -> tuple[dict, jax.Array, jax.Array | None]:
    """q, k, v; random blocks of the past, some of them none or double; documents."""
    case, size = (CASES | LARGE)[name]
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in cases.inputs(case).items()}
    heads = case.H if name == BY_QUERY_HEAD else case.Hk
    own = np.arange(case.T)[None, :, None, None] // size
    idx = np.random.default_rng(2).integers(-1, own + 1, size=(case.B, case.T, heads, CHOSEN))
    return arrays, jnp.asarray(idx, jnp.int32), documents(case) if case.documents else None


def run(
    arrays: dict, idx: jax.Array, ids: jax.Array | None, cotangent: tuple, *, size: int, order: str = "tokens"
) -> tuple:
    f = functools.partial(block_topk_attention, idx=idx, segment_ids=ids, block_size=size, order=order)
    out, pullback = jax.vjp(lambda arrays: f(**arrays), arrays)
    return out, pullback(cotangent)[0]


def definition(arrays: dict, idx: jax.Array, ids: jax.Array | None, cotangent: tuple, *, size: int) -> tuple:
    """The same in fp32, with a mask of every pair."""
    T, H = idx.shape[1], arrays["q"].shape[2]
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    mask = (s <= t) & (idx[..., None] == s // size).any(3).swapaxes(1, 2)[..., :, :]
    if ids is not None:
        mask &= ((ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None])[:, None]
    mask = jnp.repeat(mask, H // mask.shape[1], axis=1)

    def f(arrays: dict) -> tuple:
        q, k, v = (
            x.astype(jnp.float32)
            for x in (arrays["q"], *(jnp.repeat(arrays[n], H // arrays[n].shape[2], axis=2) for n in "kv"))
        )
        z = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5, -1e30)
        some = mask.any(-1)
        p = jnp.where(some[..., None], jax.nn.softmax(z, -1), 0)
        lse = jnp.where(some, jax.nn.logsumexp(z, -1), -jnp.inf)
        return jnp.einsum("bhts,bshv->bthv", p, v), lse.swapaxes(1, 2)

    out, pullback = jax.vjp(f, arrays)
    return out, pullback(cotangent)[0]


def check_case(name: str, order: str) -> None:
    """Outputs, lse and all gradients."""
    case, size = (CASES | LARGE)[name]
    arrays, idx, ids = problem(name)
    normal = np.random.default_rng(1).normal
    do = jnp.asarray(normal(size=(case.B, case.T, case.H, case.V)), jnp.bfloat16)
    dlse = jnp.asarray(normal(size=(case.B, case.T, case.H)), jnp.float32)
    (o, lse), gradients = jax.device_get(run(arrays, idx, ids, (do, dlse), size=size, order=order))
    (o_, lse_), gradients_ = jax.device_get(definition(arrays, idx, ids, (do.astype(jnp.float32), dlse), size=size))
    nothing = np.isneginf(lse_)
    assert nothing.any()
    assert_equal("rows that see nothing", np.isneginf(lse), nothing)
    assert not o[nothing].any()
    assert_close("o", o, o_, TOLERANCE["bf16_output"])
    assert_close("lse", lse[~nothing], lse_[~nothing], TOLERANCE["bf16_output"])
    for what, value in gradients_.items():
        assert_close(f"d{what}", gradients[what], value, TOLERANCE["bf16_gradient"])


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=[pytest.mark.slow] * (f"{name}-{order}" not in QUICK))
        for name in CASES
        for order in ORDERS
    ],
)
@pytest.mark.usefixtures("emulated_gpu")
def test_bodies_equal_the_definition(name: str, order: str) -> None:
    check_case(name, order)


LENGTH, STRIDE = 8, 4


def span_problem(T: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """q, k and v in fp32 (what bf16 holds), and documents of which one is shorter than a span."""
    arrays = cases.inputs(Case(1, T, 4, 2, 64, 64))
    lengths = (T // 2 + 1, LENGTH - 1, T // 4, T - T // 2 - T // 4 - LENGTH - 5, 5)
    ids = jnp.asarray(np.repeat([1, 2, 3, 4, 0], lengths)[None], jnp.int32)
    return {n: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for n, x in arrays.items()}, ids


def span_attention(arrays: dict, ids: jax.Array, *, dtype: jnp.dtype | None, chunk_size: int = 512) -> tuple:
    """Attention to the means of spans, rounded as kernels want them, and blocks chosen by it."""
    positions, choice = document_positions(ids), Choice(8, LENGTH, STRIDE, first=1, local=1, count=4, pool="sum")
    sums = [pooled.block_sums(arrays[n], STRIDE, positions, ids) for n in "kv"]
    means, values = (pooled.pooled_keys(x, STRIDE, LENGTH) for x in sums)
    k, v = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (means.x, values.x))
    keys = forms.Keys(k, v, means.numbers * STRIDE + LENGTH - 1, means.segment_ids)
    queries = forms.Queries(arrays["q"].reshape(*arrays["q"].shape[:2], 2, 2, -1), positions, ids)
    rules = forms.Rules(64**-0.5, None, None, 0, aligned=False)
    return compress.span_attention(queries, keys, sums[0], choice, rules, dtype=dtype, chunk_size=chunk_size)


def span_results(arrays: dict, ids: jax.Array, **how: Any) -> dict[str, np.ndarray]:
    """Outputs, choices and gradients."""

    def loss(arrays: dict) -> tuple[jax.Array, tuple]:
        o, idx = span_attention(arrays, ids, **how)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=o.shape), jnp.bfloat16)
        return (o * weights).sum(), (o, idx)

    gradients, (o, idx) = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(arrays))
    return {"o": o, "idx": idx} | {f"d{n}": x for n, x in gradients.items()}


def test_prefixes_of_spans_give_what_all_of_them_give() -> None:
    arrays, ids = span_problem(96)
    whole, pieces = (span_results(arrays, ids, dtype=None, chunk_size=n) for n in (512, 8))
    assert_equal("idx", pieces.pop("idx"), whole.pop("idx"))
    for what, value in whole.items():
        assert_close(what, pieces[what], value, TOLERANCE["fp32_op"])


def check_spans(T: int) -> None:
    """What the kernels give of spans, against all scores at once in fp32."""
    arrays, ids = span_problem(T)
    want, got = (span_results(arrays, ids, dtype=dtype) for dtype in (None, jnp.dtype(jnp.bfloat16)))
    assert_equal("idx", got.pop("idx"), want.pop("idx"))
    assert not got["o"][np.asarray(ids) == 0].any()
    for what, value in got.items():
        assert_close(what, value, want[what], TOLERANCE["bf16_output" if what == "o" else "bf16_gradient"])


@pytest.mark.usefixtures("emulated_gpu")
def test_kernels_of_spans_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hopper_refusal", lambda *_: None)
    monkeypatch.setattr(dispatch, "on_one_device", lambda: True)
    check_spans(140)


@pytest.mark.parametrize("lengths", [(128, 72), (100, 100)])
@pytest.mark.usefixtures("emulated_gpu")
def test_blocks_of_documents_are_those_of_the_row_where_these_are_aligned(lengths: tuple[int, int]) -> None:
    """The form of the op gives what another does, whatever the documents."""
    arrays = {n: x[:, :200] for n, x in problem("wide")[0].items()}
    ids = jnp.asarray(np.repeat([1, 2], lengths)[None], jnp.int32)
    own = np.concatenate([np.arange(n) for n in lengths]) // 64
    idx = np.random.default_rng(2).integers(-1, own[None, :, None, None] + 1, size=(1, 200, 1, CHOSEN))
    facts = {"idx": jnp.asarray(idx, jnp.int32), "block_size": 64, "segment_ids": ids, "return_lse": True}
    want = blocks.block_topk_attention(**arrays, **facts, impl="masked")
    queries, keys = rows_and_keys(*arrays.values(), ids, jnp.asarray(document_positions(ids)), None, None)
    rules = forms.Rules(64**-0.5, None, None, 0, aligned=True)
    o, lse = blocks.FORMS["pallas_gpu"](queries, keys, facts["idx"], rules, 64, None)
    assert_close("o", o.reshape(want[0].shape), want[0], TOLERANCE["bf16_output"])
    some = np.isfinite(want[1])
    assert_close("lse", lse.reshape(some.shape)[some], want[1][some], TOLERANCE["bf16_output"])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*CASES, "groups_documents"])
def test_forward_and_backward_lower_for_cuda(name: str, order: str) -> None:
    case, size = (CASES | LARGE)[name]
    arrays, idx, ids = problem(name)
    o = jnp.zeros((case.B, case.T, case.H, case.V), jnp.bfloat16)
    cotangent = o, o[..., 0].astype(jnp.float32)
    both = functools.partial(run, size=size, order=order)
    assert lowered_kernels(both, arrays, idx, ids, cotangent) == {"tokens": 3, "blocks": 6}[order]


def test_words_have_a_bit_for_each_chosen_block() -> None:
    idx = jnp.asarray([[[[0, 3, -1, 3]], [[31, 32, 40, -1]]]])
    words = np.asarray(live.words(idx, 41)).view(np.uint32)
    assert words.tolist() == [[[[9, 2**31], [0, 1 + 2**8]]]]


@pytest.mark.parametrize(
    ("size", "tokens", "message"), [(96, 8, "blocks of 96: expected 64 or"), (64, 4, "self-attention only")]
)
def test_what_cannot_be_served_is_refused(size: int, tokens: int, message: str) -> None:
    q, k = jnp.zeros((1, 8, 1, 64), jnp.bfloat16), jnp.zeros((1, tokens, 1, 64), jnp.bfloat16)
    assert message in refusal(q, k, k, size)
