"""`attention`: every form against an oracle written out in numpy fp64, with gradients derived by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention, cases, merge
from hydrax.ops.softmax.cases import CASES, Case
from tests.tolerances import TOLERANCE, assert_close, assert_equal

FORMS = {"recurrent": {}, "xla": {}, "chunked": {"chunk_size": 8}}  # 8 divides one of the lengths
OPTIONS = ("window", "sink_tokens", "softcap", "dilation")


def inputs(case: Case, dtype: jnp.dtype = jnp.float32) -> tuple[dict, jax.Array | None]:
    """Random arrays of the case by argument name, and its segment ids."""
    arrays = {name: jnp.asarray(x, dtype if name in "qkv" else jnp.float32) for name, x in cases.inputs(case).items()}
    return arrays, documents(case) if case.documents else None


def documents(case: Case) -> jax.Array:
    """Rows of two or three documents; the last row ends in padding."""
    ids = np.ones((case.B, case.T), np.int32)
    ids[:, case.T // 3 :] = 2
    ids[-1, case.T // 2 :] = 7
    ids[-1, case.T - 4 :] = 0
    return jnp.asarray(ids)


def mask_of(case: Case, ids: np.ndarray) -> np.ndarray:
    """Visible pairs [B,H,T,S], by the words of the definition."""
    mask = np.zeros((case.B, case.H, case.T, case.T), bool)
    ends = cases.lifetimes(case).repeat(case.H // case.Hk, axis=2)
    for b in range(case.B):
        firsts = [np.flatnonzero(ids[b] == i)[0] for i in ids[b]]
        for t in range(case.T):
            for s in range(t + 1):
                first = firsts[s]
                near = case.window is None or t - s < case.window or s - first < case.sink_tokens
                near = near and (t - s) % case.dilation == 0
                alive = not case.ends or t - first <= ends[b, s]
                mask[b, :, t, s] = alive & (near and ids[b, t] == ids[b, s] != 0)
    return mask


def oracle(case: Case, arrays: dict, ids: jax.Array | None, do: np.ndarray, dlse: np.ndarray) -> dict:
    """Output, lse and every gradient in fp64, the key/value heads repeated."""
    x = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    R = case.H // case.Hk
    k, v = (np.repeat(x[name], R, axis=2) for name in "kv")
    scores = np.einsum("bthk,bshk->bhts", x["q"], k) / np.sqrt(case.K) + x.get("bias", 0)
    if case.key_bias:
        scores = scores + np.moveaxis(np.repeat(x["key_bias"], R, axis=2), 1, 2)[:, :, None]
    z = scores if case.softcap is None else case.softcap * np.tanh(scores / case.softcap)
    mask = mask_of(case, np.ones((case.B, case.T)) if ids is None else np.asarray(ids))
    sink = np.exp(x["sinks"])[None, :, None] if case.sinks else 0.0
    e = np.where(mask, np.exp(z), 0)
    total = e.sum(-1) + sink
    P = e / np.where(total > 0, total, 1)[..., None]
    o = np.einsum("bhts,bshv->bthv", P, v)
    with np.errstate(divide="ignore"):
        lse = np.log(total)

    dP, dl = np.einsum("bthv,bshv->bhts", do, v), np.moveaxis(dlse, 2, 1)
    pull = dl - (P * dP).sum(-1)  # of one unit of log-weight
    dz = P * (dP + pull[..., None])
    dscores = dz if case.softcap is None else dz * (1 - np.tanh(scores / case.softcap) ** 2)
    fold = (case.B, case.T, case.Hk, R, -1)
    result = {
        "o": o,
        "lse": np.moveaxis(lse, 1, 2),
        "dq": np.einsum("bhts,bshk->bthk", dscores, k) / np.sqrt(case.K),
        "dk": (np.einsum("bhts,bthk->bshk", dscores, x["q"]) / np.sqrt(case.K)).reshape(fold).sum(3),
        "dv": np.einsum("bhts,bthv->bshv", P, do).reshape(fold).sum(3),
    }
    if case.sinks:
        result["dsinks"] = (sink / total * pull).sum((0, 2))
    if case.bias is not None:
        alone = tuple(i for i in range(2) if case.bias[i] == 1)
        result["dbias"] = dscores.sum(alone, keepdims=True)
    if case.key_bias:
        result["dkey_bias"] = np.moveaxis(dscores.sum(2), 1, 2).reshape(case.B, case.T, case.Hk, R).sum(3)
    return result


def options_of(case: Case) -> dict:
    options = {name: getattr(case, name) for name in OPTIONS}
    return options | ({"ends": jnp.asarray(cases.lifetimes(case))} if case.ends else {})


def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    normal = np.random.default_rng(1).normal
    return normal(size=(case.B, case.T, case.H, case.V)), normal(size=(case.B, case.T, case.H))


def evaluate(case: Case, arrays: dict, ids: jax.Array | None, do: np.ndarray, dlse: np.ndarray, **how: object) -> dict:
    """What `oracle` returns, from `attention`."""
    options = options_of(case)

    @jax.jit
    def run(arrays: dict, ids: jax.Array | None, cotangent: tuple) -> tuple:
        f = functools.partial(attention, segment_ids=ids, return_lse=True, **options, **how)
        out, pullback = jax.vjp(lambda arrays: f(**arrays), arrays)
        return out, pullback(cotangent)[0]

    (o, lse), gradients = run(arrays, ids, (jnp.asarray(do, arrays["v"].dtype), jnp.asarray(dlse, jnp.float32)))
    return jax.device_get({"o": o, "lse": lse} | {f"d{name}": g for name, g in gradients.items()})


@functools.cache
def expected(name: str) -> dict:
    return oracle(CASES[name], *inputs(CASES[name]), *cotangents(CASES[name]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_match_the_oracle(name: str, form: str) -> None:
    case = CASES[name]
    actual = evaluate(case, *inputs(case), *cotangents(case), impl=form, **FORMS[form])
    assert actual.keys() == expected(name).keys()
    nothing = np.isneginf(expected(name)["lse"])
    assert_equal("rows that see nothing", np.isneginf(actual["lse"]), nothing)
    assert nothing.any() == ((case.documents or case.ends) and not case.sinks)
    for what, value in expected(name).items():
        if what == "lse":
            assert_close(what, actual[what][~nothing], value[~nothing], TOLERANCE["fp32_op"])
        else:
            assert_close(what, actual[what], value, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("form", ["xla", "chunked"])
def test_bf16_operands_keep_fp32_softmax(form: str) -> None:
    case = CASES["causal"]
    arrays, ids = inputs(case, jnp.bfloat16)
    do, dlse = cotangents(case)
    do = np.asarray(jnp.asarray(do, jnp.bfloat16), np.float64)
    actual = evaluate(case, arrays, ids, do, dlse, impl=form, **FORMS[form])
    assert (actual["o"].dtype, actual["lse"].dtype) == (jnp.bfloat16, jnp.float32)
    for what, value in oracle(case, arrays, ids, do, dlse).items():
        assert_close(what, actual[what], value, TOLERANCE["bf16_gradient" if what[0] == "d" else "bf16_output"])


def test_bf16_gradients_of_many_blocks_add_up_in_fp32() -> None:
    """64 blocks contribute to the gradient of a key; summed in bf16 they would miss the tolerance."""
    case = Case(1, 256, 2, 1, 16, 16)
    arrays, _ = inputs(case, jnp.bfloat16)
    do = np.asarray(jnp.asarray(cotangents(case)[0], jnp.bfloat16), np.float64)
    dlse = np.zeros((case.B, case.T, case.H))
    actual = evaluate(case, arrays, None, do, dlse, impl="chunked", chunk_size=4)
    blockless = evaluate(case, arrays, None, do, dlse, impl="xla")
    for what in ("dq", "dk", "dv"):
        assert_close(what, actual[what], blockless[what], TOLERANCE["bf16_output"])


@pytest.mark.parametrize("form", FORMS)
def test_padding_gives_zeros_and_takes_no_gradient(form: str) -> None:
    case = CASES["documents"]
    actual = evaluate(case, *inputs(case), *cotangents(case), impl=form, **FORMS[form])
    padding = np.asarray(documents(case)) == 0
    for what in ("o", "dq", "dk", "dv"):
        assert np.all(np.asarray(actual[what])[padding] == 0), what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["causal", "window"])
def test_the_future_leaves_the_past_bit_equal(name: str, form: str) -> None:
    case, t = CASES[name], 19
    arrays, _ = inputs(case)
    later = {key: x.at[:, t:].set(1e3 * x[:, t:] + 1) for key, x in arrays.items()}
    f = jax.jit(functools.partial(attention, window=case.window, impl=form, **FORMS[form]))
    before, after = f(**arrays), f(**later)
    assert_equal("past", after[:, :t], before[:, :t])
    assert not np.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("form", ["xla", "chunked"])
def test_a_window_as_long_as_the_row_is_causal_attention(form: str) -> None:
    arrays, _ = inputs(CASES["causal"])
    T, f = CASES["causal"].T, functools.partial(attention, **arrays, impl=form, **FORMS[form])
    wide, causal, narrow = jax.jit(lambda: (f(window=T), f(), f(window=T - 1)))()
    assert_close("o", wide, causal, TOLERANCE["fp32_op"])
    assert not np.allclose(narrow[:, -1], wide[:, -1])


def test_a_window_of_one_key_returns_the_value() -> None:
    arrays, _ = inputs(CASES["causal"])
    o = jax.jit(functools.partial(attention, window=1, impl="chunked", chunk_size=8))(**arrays)
    assert_close("o", o, np.repeat(arrays["v"], 3, axis=2), TOLERANCE["fp32_op"])


def test_a_sink_is_a_key_of_value_zero() -> None:
    arrays, _ = inputs(CASES["causal"])
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    B, T, H, K = q.shape
    q = q.at[..., 0].set(1.0)  # with an extra key along channel 0 every query scores it alike
    places = {"positions": jnp.tile(jnp.arange(T), (B, 1)), "kv_positions": jnp.tile(jnp.arange(-1, T), (B, 1))}
    sink_key = jnp.zeros((B, 1, k.shape[2], K)).at[..., 0].set(0.3 * K**0.5)
    longer_k, longer_v = jnp.concatenate([sink_key, k], axis=1), jnp.pad(v, ((0, 0), (1, 0), (0, 0), (0, 0)))
    longer = jax.jit(attention)(q, longer_k, longer_v, **places)
    assert_close("o", jax.jit(attention)(q, k, v, sinks=jnp.full(H, 0.3)), longer, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_a_cache_may_stand_anywhere(form: str) -> None:
    """The last queries of a row over its keys in another order, with empty slots between them, are the full pass."""
    case, t = CASES["window_sink_tokens"], 30
    arrays, ids = inputs(case)
    options = {name: getattr(case, name) for name in OPTIONS}
    full = jax.jit(functools.partial(attention, **options))(**arrays, segment_ids=ids)
    order = np.random.default_rng(0).permutation(case.T + 5)

    def slots(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2))[:, order])

    position = np.stack([[i - list(row).index(row[i]) for i in range(case.T)] for row in np.asarray(ids)])
    o = jax.jit(functools.partial(attention, impl=form, **FORMS[form], **options))(
        arrays["q"][:, t:],
        slots(np.asarray(arrays["k"])),
        slots(np.asarray(arrays["v"])),
        segment_ids=ids[:, t:],
        positions=jnp.asarray(position[:, t:]),
        kv_segment_ids=slots(np.asarray(ids)),
        kv_positions=slots(position),
    )
    assert_close("o", o, full[:, t:], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("form", ["xla", "chunked"])
def test_merging_two_key_ranges_is_attention_to_all(form: str) -> None:
    """The second range is invisible to the first queries: their lse of -inf must not reach a gradient."""
    case, half = CASES["causal"], 14
    arrays, _ = inputs(case)
    do, dlse = (jnp.asarray(x, jnp.float32) for x in cotangents(case))

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        return attention(q, k, v, impl="xla", return_lse=True)

    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        places = jnp.tile(jnp.arange(case.T), (case.B, 1))
        ranges = (slice(0, half), slice(half, None))
        run = functools.partial(attention, q, positions=places, impl=form, return_lse=True, **FORMS[form])
        return merge(*(run(k[:, r], v[:, r], kv_positions=places[:, r]) for r in ranges))

    def both(f: object) -> list:
        out, pullback = jax.vjp(f, arrays["q"], arrays["k"], arrays["v"])
        return [*out, *pullback((do, dlse))]

    actual, reference = jax.jit(lambda: (both(merged), both(whole)))()
    for name, a, e in zip(("o", "lse", "dq", "dk", "dv"), actual, reference, strict=True):
        assert_close(name, a, e, TOLERANCE["fp32_op"])


def test_merging_parts_that_see_nothing_gives_zero() -> None:
    o, lse = jnp.zeros((1, 2, 1, 4)), jnp.full((1, 2, 1), -jnp.inf)

    @jax.jit
    def run(o: jax.Array, lse: jax.Array) -> tuple:
        merged, pullback = jax.vjp(lambda o, lse: merge((o, lse), (o, lse)), o, lse)
        return merged, pullback((jnp.ones_like(o), jnp.ones_like(lse)))

    merged, gradients = run(o, lse)
    assert_equal("o", merged[0], o)
    assert_equal("lse", merged[1], lse)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("window", [None, 64])
def test_chunked_stores_no_scores(window: int | None) -> None:
    """Temporary memory of a forward and backward pass is a fraction of one T×T buffer."""
    T = 2048
    x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)

    def bytes_of(impl: str) -> int:
        f = jax.grad(lambda q, k, v: attention(q, k, v, window=window, impl=impl).sum(), argnums=(0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of("xla") >= 4 * T * T
    assert bytes_of("chunked") < 4 * T * T / 3


def test_a_named_form_that_cannot_serve_says_why() -> None:
    arrays, _ = inputs(CASES["causal"])
    with pytest.raises(ValueError, match="impl = 'cudnn' cannot serve: it runs on NVIDIA GPUs only"):
        attention(**arrays, impl="cudnn")
    with pytest.raises(ValueError, match="expected one of recurrent, xla, chunked, cudnn"):
        attention(**arrays, impl="flash")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"case": "value_wider"}, "V = K"),
        ({"case": "documents"}, "segment_ids"),
        ({"case": "softcap_bias", "documents": False}, "softcap"),
        ({"case": "window_sinks", "documents": False}, "sinks"),
        ({"case": "window_sink_tokens", "documents": False}, "sink_tokens"),
        ({"case": "window_bias"}, "bias"),
        ({"case": "dilation", "documents": False}, "dilation"),
        ({"case": "ends", "documents": False, "softcap": None}, "ends"),
        ({"return_lse": True}, "lse"),
        ({"keys": 20}, "cache"),
        ({"case": "causal"}, "even number of tokens"),
    ],
)
def test_cudnn_refuses_what_it_would_compute_wrongly(
    monkeypatch: pytest.MonkeyPatch, change: dict, reason: str
) -> None:
    """As on a GPU: each refusal is met before the kernel is reached."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = CASES[change.get("case", "causal")]
    arrays, ids = inputs(case, change.get("dtype", jnp.bfloat16))
    options = options_of(case) | {"return_lse": change.get("return_lse", False)}
    options["softcap"] = change.get("softcap", case.softcap)
    arrays |= {name: arrays[name][:, : change.get("keys")] for name in "kv"}
    with pytest.raises(ValueError, match=f"'cudnn' cannot serve: it .*{reason}"):
        attention(**arrays, segment_ids=ids if change.get("documents", True) else None, impl="cudnn", **options)


def test_shapes_that_do_not_fit_are_named() -> None:
    arrays, ids = inputs(CASES["documents"])
    with pytest.raises(ValueError, match="window = 0"):
        attention(**arrays, window=0)
    with pytest.raises(ValueError, match="H = R·Hk"):
        attention(
            **arrays
            | {"q": arrays["q"][:, :, :1], "k": jnp.tile(arrays["k"], (1, 1, 2, 1))}
            | {"v": jnp.tile(arrays["v"], (1, 1, 2, 1))}
        )
    with pytest.raises(ValueError, match="both or neither"):
        attention(arrays["q"][:, -1:], arrays["k"], arrays["v"], segment_ids=ids[:, -1:])
