"""One of two mixers per document: the choice against its formula, what it may see, and what both parts share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.mixers import Context
from tests.models.small import D, Layer, Params, below, layers, normal, sigmoid, silu
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

T, P, WIDTH = 14, 3, 6
X = normal("x", 4, T, D)
SEG = jnp.asarray([[1] * T, [1] * 6 + [2] * 8, [3] * 2 + [1] * 4 + [2] * 6 + [0] * 2, [0] * T], jnp.int32)
DOCUMENTS = [(0, 0, 14), (1, 0, 6), (1, 6, 14), (2, 0, 2), (2, 2, 6), (2, 6, 12)]
ROUTER = ("hidden/kernel", "hidden/bias", "choice/kernel", "choice/bias")


@functools.cache
def layer(**options: Any) -> Layer:
    """Its router chooses by large numbers, so that some documents go each way."""
    options = {"prefix": P, "width": WIDTH, **options}
    swa = {"heads": 2, "key_dim": 4, "window": 2, "sinks": True}
    (spec,) = layers("x", blocks={"x": {"mixer": "route(attn,swa)", "options": options}}, mixers={"swa": swa})
    made = Layer.of(spec.mix)
    made.params.update({name: 5 * made.params[name] for name in ROUTER} | {"choice/bias": jnp.zeros(1)})
    return made


@functools.partial(jax.jit, static_argnums=0)
def outputs(made: Layer, params: Params, x: Array = X, seg: Array = SEG) -> tuple[Array, Array, Array]:
    """y, and what it would be if all documents chose the full part or the sparse one, the prefix included."""
    mixer, ctx = made.merge(params), Context.of(x, seg)
    full, sparse = (mixer.out(part.mix(x, ctx, None)[0]) for part in (mixer.full, mixer.sparse))
    return mixer(x, ctx)[0], full, sparse


def shares(params: Params, x: Array = X) -> list[float]:
    """p of every document that has a prefix."""
    p = {name: np.asarray(params[name], np.float64) for name in ROUTER}
    found = []
    for row, start, end in DOCUMENTS:
        if end - start > P:
            mean = np.asarray(x[row, start : start + P], np.float64).mean(0)
            inner = silu(mean @ p["hidden/kernel"] + p["hidden/bias"])
            found.append(float(sigmoid(inner @ p["choice/kernel"] + p["choice/bias"])[0]))
    return found


def full_tokens(chosen: list[bool]) -> np.ndarray:
    """[B,T]: what the full part mixes, the prefixes and the documents that chose it."""
    found, rest = np.zeros(SEG.shape, bool), iter(chosen)
    for row, start, end in DOCUMENTS:
        found[row, start : start + P] = True
        if end - start > P:
            found[row, start + P : end] = next(rest)
    return found


def biased(params: Params, bias: float) -> Params:
    """The router always says σ(bias)."""
    return {**params, "choice/kernel": jnp.zeros((WIDTH, 1)), "choice/bias": jnp.full((1,), bias)}


def test_documents_choose_by_the_mean_of_their_prefix():
    made = layer()
    y, full, sparse = outputs(made, made.params)
    chosen = [p > 0.5 for p in shares(made.params)]
    assert set(chosen) == {False, True}, "the test needs both"
    want = np.where(full_tokens(chosen)[..., None], full, sparse)
    real = np.asarray(SEG) != 0
    assert_equal("y", np.asarray(y)[real], want[real])


@pytest.mark.parametrize(("bias", "full"), [(1e-4, True), (0.0, False), (-1e-4, False), (50.0, True), (-50.0, False)])
def test_the_threshold_is_a_half(bias: float, full: bool):
    made = layer()
    y, all_full, sparse = outputs(made, biased(made.params, bias))
    want = np.where(full_tokens([full] * 5)[..., None], all_full, sparse)
    assert_equal("y", np.asarray(y)[np.asarray(SEG) != 0], want[np.asarray(SEG) != 0])


@pytest.mark.parametrize("tie", [True, False])
def test_the_parts_are_the_layers_of_their_mixers(tie: bool):
    """With the parameters that both have: those of the full part, if tied."""
    made = layer(tie=tie)
    params = made.params
    _, full, sparse = outputs(made, params)
    specs = layers(
        "x",
        blocks={"x": {"mixer": "route(attn,swa)"}},
        mixers={"swa": {"heads": 2, "key_dim": 4, "window": 2, "sinks": True}},
    )
    common = {"project/kernel": params["project/kernel"]}
    own = [below(params, "full/"), below(params, "full/" if tie else "sparse/") | below(params, "sparse/")]
    for mix, given, want in zip(specs[0].mix.members, own, (full, sparse), strict=True):
        single = Layer.of(mix)
        given = {path: p for path, p in (common | given).items() if path in single.params}
        assert given.keys() == single.params.keys()
        y, _ = jax.jit(lambda p, single=single: single(p, X, segment_ids=SEG))(given)
        assert_close(str(mix.label), y, want, TOLERANCE["fp32_op"])


def test_parts_may_have_other_heads_of_the_same_width():
    """They meet as the full part's heads, under its projection."""
    mixers = {"swa": {"heads": 4, "key_dim": 3, "value_dim": 2, "window": 2}}
    block = {"mixer": "route(attn,swa)", "options": {"prefix": P, "width": WIDTH}}
    (spec,) = layers("x", blocks={"x": block}, mixers=mixers)
    made, single = Layer.of(spec.mix), Layer.of(spec.mix.members[1])
    rows = made.params["project/kernel"]
    assert rows.shape == (2, 4, D)
    own = below(made.params, "sparse/") | {"project/kernel": rows.reshape(4, 2, D)}
    want, _ = jax.jit(lambda p: single(p, X, segment_ids=SEG))(own)
    y, *_ = outputs(made, biased(made.params, -50.0))
    sparse = (np.asarray(SEG) != 0) & ~full_tokens([False] * 5)
    assert_close("y", np.asarray(y)[sparse], np.asarray(want)[sparse], TOLERANCE["fp32_op"])


def test_tied_parameters_are_one_set():
    tied, apart = layer(), layer(tie=False)
    attention = {f"qkv/{name}/kernel" for name in "qkv"}
    router = {"project/kernel", "sparse/sinks", *ROUTER}
    assert tied.params.keys() == router | {f"full/{path}" for path in attention}
    assert apart.params.keys() == tied.params.keys() | {f"sparse/{path}" for path in attention}


def test_what_one_part_has_alone_leaves_the_rest_tied():
    """A norm, a bias or another width of one part unties nothing else."""
    mixers = {
        "attn": {"heads": 2, "key_dim": 4, "qk_norm": "head"},
        "swa": {"heads": 2, "kv_heads": 1, "key_dim": 4, "window": 2, "bias": True},
    }
    (spec,) = layers("x", blocks={"x": {"mixer": "route(attn,swa)"}}, mixers=mixers)
    own = {path for path in Layer.of(spec.mix).params if path.startswith("sparse/")}
    assert own == {f"sparse/qkv/{name}" for name in ("q/bias", "k/kernel", "k/bias", "v/kernel", "v/bias")}


def test_the_choice_never_looks_ahead():
    """Other tokens from P on leave the choice, and every token from j on leaves what was before it."""
    made = layer()
    y, *_ = outputs(made, made.params)
    chosen = full_tokens([p > 0.5 for p in shares(made.params)])
    for j in (P, P + 2):
        late = np.zeros((4, T, 1), bool)
        for row, start, end in DOCUMENTS:
            late[row, start + j : end] = True
        x = jnp.where(late, 3 * normal("other", 4, T, D), X)
        changed, full, sparse = outputs(made, made.params, x)
        real = np.asarray(SEG) != 0
        assert_equal("y", np.asarray(changed)[real], np.where(chosen[..., None], full, sparse)[real])
        before = real & ~late[..., 0]
        assert_equal("y before", np.asarray(changed)[before], np.asarray(y)[before])


def test_a_prefix_of_another_document_changes_nothing():
    made = layer()
    y, *_ = outputs(made, made.params)
    x = X.at[1, :6].set(normal("other", 6, D)).at[2, :6].set(normal("others", 6, D))
    changed, *_ = outputs(made, made.params, x)
    assert_equal("y", changed[1, 6:], y[1, 6:])
    assert_equal("y", changed[2, 6:12], y[2, 6:12])


def test_gradients_reach_the_router_as_if_it_had_blended():
    """dL/dp = Σ_{t>=P} dL/dy_t · (y^full_t - y^sparse_t) for every document, whatever it chose."""
    made = layer()
    weights = normal("cotangent", 4, T, D) * (SEG != 0)[..., None]
    _, full, sparse = outputs(made, made.params)
    grads = jax.jit(jax.grad(lambda p: jnp.vdot(weights, made(p, X, segment_ids=SEG)[0])))(made.params)
    per_token = np.einsum("btd,btd->bt", np.asarray(weights, np.float64), np.asarray(full - sparse, np.float64))
    p, at = np.asarray(shares(made.params)), [d for d in DOCUMENTS if d[2] - d[1] > P]
    by_p = np.array([per_token[row, start + P : end].sum() for row, start, end in at])
    assert_close("choice/bias", grads["choice/bias"], [np.sum(by_p * p * (1 - p))], TOLERANCE["fp32_op"])
    assert all(np.any(np.asarray(g) != 0) for g in grads.values())


def test_a_loss_holds_the_share_of_full_tokens():
    made = layer(weight=2.0, target=0.25)

    @jax.jit
    def loss(params: Params, seg: Array) -> Array:
        records: dict[str, Any] = {}
        made(params, X, segment_ids=seg, records=records)
        return records["route"]

    counts = [end - start - P for _, start, end in DOCUMENTS if end - start > P]
    mean = np.average(shares(made.params), weights=counts)
    assert_close("loss", loss(made.params, SEG), 2.0 * (mean - 0.25) ** 2, TOLERANCE["fp32_op"])
    assert float(loss(made.params, jnp.where(jnp.arange(T) < P, 1, 0) * jnp.ones_like(SEG))) == 0.0
    records: dict[str, Any] = {}
    bare = layer()
    jax.eval_shape(lambda: bare(bare.params, X, records=records))
    assert "route" not in records


@pytest.mark.parametrize("split", [P - 1, P + 4])
def test_decoding_keeps_the_choice(split: int):
    """The sum over the prefix continues from call to call; rows choose both ways."""
    made = layer()

    @jax.jit
    def run(params: Params) -> Array:
        mixer = made.merge(params)
        first = X[:, :split]
        y, state = mixer(first, Context.of(first), mixer.init_state(4, T, jnp.float32))

        def step(state: Any, inputs: tuple) -> tuple[Any, Array]:
            x, t = inputs
            y, state = mixer(x[:, None], Context(jnp.full((4, 1), t)), state)
            return state, y[:, 0]

        rest = (X[:, split:].swapaxes(0, 1), jnp.arange(split, T, dtype=jnp.int32))
        return jnp.concatenate([y, jax.lax.scan(step, state, rest)[1].swapaxes(0, 1)], axis=1)

    y, full, sparse = outputs(made, made.params, X, jnp.ones_like(SEG))
    assert_close("y", run(made.params), y, TOLERANCE["fp32_op"])
    last = [bool(jnp.all(y[:, -1] == other[:, -1], axis=-1).any()) for other in (full, sparse)]
    assert last == [True, True], "the test needs both"
