"""The mixture of experts against a loop over all experts, and what no token, document or padding may influence."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.nn.ffn import FFN
from hydrax.nn.moe import MoE, MoEConfig, state_bytes
from hydrax.ops.documents import document_positions
from hydrax.parallel.mesh import MeshConfig, make_mesh
from hydrax.parallel.rules import batch_sharding, partition
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

D, E, T, C = 8, 6, 13, 3
ONES = np.ones((2, T), np.int32)
SEG = np.asarray([[1] * 13, [1] * 4 + [2] * 7 + [0] * 2], np.int32)
X, H, CT = np.random.default_rng(0).normal(size=(3, 2, T, D)).astype(np.float32)

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "raw_gates": {"top_k": 1, "renorm": False, "kind": "relu2", "scale": 2.5, "groups": 3, "top_groups": 1},
    "all": {"top_k": E, "shared": 2},
    "softmax_bias": {"bias": True, "z_loss": 0.0},
    "groups": {"router": "sigmoid", "bias": True, "groups": 3, "top_groups": 2, "scale": 2.5},
    "groups_of_one": {"groups": E, "top_groups": 2, "balance": 0.0, "router_at": "pre_attn"},
    "shared_gate": {"shared": 1, "shared_gate": True, "kind": "geglu"},
    "capacity": {"capacity": 0.8, "bias": True},
    "chunk": {"granularity": "chunk", "chunk": C},
    "chunk_pre_attn": {"granularity": "chunk", "chunk": C, "router_at": "pre_attn", "bias": True, "router": "sigmoid"},
    "chunk_capacity": {"granularity": "chunk", "chunk": C, "capacity": 1.0},
}

Params = dict[str, jax.Array]


class Layer:
    """A small layer as a function of its parameters, drawn so large that routing matters."""

    def __init__(self, **options: Any):
        self.cfg = build(MoEConfig, {"experts": E, "width": 5, **options})
        self.graph, state = nnx.split(nnx.eval_shape(lambda: MoE(D, self.cfg, rngs=nnx.Rngs(0))))
        self.flat = {"/".join(path): v for path, v in nnx.to_flat_state(state)}
        rng = np.random.default_rng(1)
        self.params = {k: jnp.asarray(0.4 * rng.normal(size=v.shape), jnp.float32) for k, v in self.flat.items()}

    def __call__(self, params: Params, x: Any, h: Any, seg: Any, positions: Any = None, state: Any = None) -> tuple:
        flat = [(tuple(k.split("/")), v.replace(params[k])) for k, v in self.flat.items()]
        positions = document_positions(jnp.asarray(seg)) if positions is None else jnp.asarray(positions)
        return nnx.merge(self.graph, nnx.from_flat_state(flat))(
            jnp.asarray(x),
            positions=positions,
            segment_ids=jnp.asarray(seg),
            router_input=jnp.asarray(h) if self.cfg.router_at == "pre_attn" else None,
            state=state,
        )

    @functools.cached_property
    def gradients(self) -> Callable:
        """(params, x, h, seg, ct) -> gradients with respect to the first three, (y, losses), compiled once."""

        def objective(params: Params, x: jax.Array, h: jax.Array, seg: jax.Array, ct: jax.Array) -> tuple:
            y, _, losses = self(params, x, h, seg)
            return objective_of(y, losses, seg, ct), (y, losses)

        return jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))

    def y(self, x: Any = X, h: Any = H, seg: Any = SEG, params: Params | None = None) -> jax.Array:
        return self.gradients(params or self.params, x, h, seg, CT)[1][0]

    def losses(self, x: Any = X, seg: Any = SEG, **params: jax.Array) -> dict[str, jax.Array]:
        return self.gradients(self.params | params, x, H, seg, CT)[1][1]


def objective_of(y: jax.Array, losses: dict[str, jax.Array], seg: Any, ct: Any) -> jax.Array:
    """Of real tokens; losses weigh enough for their gradients to be seen."""
    return jnp.sum(jnp.where(jnp.asarray(seg)[..., None] != 0, ct * y, 0)) + 50 * sum(losses.values())


@functools.cache
def layer(name: str) -> Layer:
    return Layer(**OPTIONS[name])


# ------------------------------------------------------------------------------------------------------ the definition


def at_least(scores: jax.Array, n: int) -> jax.Array:
    """Which of the last axis are among the n largest."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1) < n


def chunk_logits(p: Params, h: jax.Array, seg: np.ndarray, cfg: MoEConfig) -> jax.Array:
    """The logits of every token from a plain mean over the tokens of the chunk before its own."""
    rows = []
    for b, t in np.ndindex(*seg.shape):
        first = np.flatnonzero(seg[b] == seg[b, t])[0]
        c = (t - first) // cfg.chunk
        begin = first + (c - 1) * cfg.chunk
        rows.append(p["first"] if c == 0 else h[b, begin : begin + cfg.chunk].mean(0))
    return jnp.stack(rows).reshape(h.shape) @ p["router"]


def oracle(p: Params, x: jax.Array, h: jax.Array, seg: np.ndarray, cfg: MoEConfig) -> tuple[jax.Array, dict, jax.Array]:
    """Every expert on every token, with a gate of zero unless it is chosen; losses; load per expert."""
    valid = jnp.asarray(seg != 0)[..., None]
    h = h if cfg.router_at == "pre_attn" else x
    z = h @ p["router"] if cfg.granularity == "token" else chunk_logits(p, h, seg, cfg)
    e = jnp.exp(z)
    s = e / e.sum(-1, keepdims=True) if cfg.router == "softmax" else 1 / (1 + 1 / e)
    rank = jax.lax.stop_gradient(s + p.get("bias", 0))
    groups = rank.reshape(*rank.shape[:-1], cfg.groups, -1)
    best = at_least(jnp.sort(groups, axis=-1)[..., -2:].sum(-1), cfg.top_groups)
    chosen = at_least(jnp.where(best[..., None], groups, -jnp.inf).reshape(rank.shape), cfg.top_k)
    gates = cfg.scale * jnp.where(chosen, s, 0) / (jnp.where(chosen, s, 0).sum(-1, keepdims=True) if cfg.renorm else 1)
    if cfg.capacity is not None:
        gates *= jnp.cumsum(chosen, axis=1) <= np.ceil(cfg.capacity * cfg.top_k * x.shape[1] / cfg.experts)
    y = sum(gates[..., i : i + 1] * ffn(p, "experts/{}", x, cfg.kind, i) for i in range(cfg.experts))
    if cfg.shared:
        weight = 1 / (1 + jnp.exp(-x @ p["shared_gate/kernel"])) if cfg.shared_gate else 1
        y += weight * ffn(p, "shared/{}/kernel", x, cfg.kind)
    load = jnp.where(valid, chosen, 0).sum((0, 1))
    shares = jnp.where(valid, s / s.sum(-1, keepdims=True), 0).sum((0, 1)) / valid.sum()
    z2 = jnp.where(valid, jnp.log(e.sum(-1, keepdims=True)) ** 2, 0).sum() / valid.sum()
    terms = {}
    if cfg.balance:
        terms["balance"] = cfg.balance * cfg.experts * (load / load.sum() * shares).sum()
    if cfg.z_loss and cfg.router == "softmax":
        terms["router_z"] = cfg.z_loss * z2
    return y, terms, load


def ffn(p: Params, name: str, x: jax.Array, kind: str, at: Any = ...) -> jax.Array:
    act = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "relu2": lambda a: jnp.maximum(a, 0) ** 2}[kind]
    up, down = (p[name.format(n)][at] for n in ("up", "down"))
    inner = act(x @ up) if kind == "relu2" else act(x @ p[name.format("gate")][at]) * (x @ up)
    return inner @ down


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_a_loop_over_experts(name: str) -> None:
    made = layer(name)

    def objective(p: Params, x: jax.Array, h: jax.Array) -> tuple[jax.Array, Any]:
        y, losses, load = oracle(p, x, h, SEG, made.cfg)
        return objective_of(y, losses, SEG, CT), (y, losses, load)

    actual, (y, losses) = made.gradients(made.params, X, H, SEG, CT)
    with jax.enable_x64(True):
        given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (made.params, X, H))
        expected, (y64, losses64, load) = jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(*given)
        load = np.asarray(load)
    if made.cfg.bias:
        expected[0]["bias"] = load - load.mean()
    real = (SEG != 0)[..., None]
    assert load.sum() == made.cfg.top_k * real.sum() and (np.ptp(load) > 0 or made.cfg.top_k == E)
    assert_close("y", jnp.where(real, y, 0), np.where(real, y64, 0), TOLERANCE["fp32_op"])
    assert_trees_close("losses", losses, losses64, TOLERANCE["fp32_op"])
    assert_trees_close("gradient", actual, expected, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["groups", "shared_gate", "capacity"])
def test_bf16_rounds_no_router(name: str) -> None:
    """On inputs and weights that bf16 holds, both choose the same experts."""
    made = layer(name)
    low = {k: v.astype(jnp.bfloat16) if made.flat[k].get_metadata("cast") else v for k, v in made.params.items()}
    x, h = (jnp.asarray(a, jnp.bfloat16) for a in (X, H))
    grads, (y, losses) = made.gradients(low, x, h, SEG, CT)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (low, x, h))
    grads32, (y32, losses32) = made.gradients(*wide, SEG, CT)
    assert y.dtype == jnp.bfloat16 and all(v.dtype == jnp.float32 for v in losses.values())
    assert_close("y", y, y32, TOLERANCE["bf16_gradient"])  # three products in a chain, each rounded
    assert_trees_close("losses", losses, losses32, TOLERANCE["fp32_op"])
    assert_trees_close("gradient", grads, grads32, TOLERANCE["bf16_gate_gradient"])


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_one_expert_is_a_dense_ffn(capacity: float | None) -> None:
    made, dense = Layer(experts=1, top_k=1, capacity=capacity), FFN(D, 5, "swiglu", rngs=nnx.Rngs(3))
    weights = {f"experts/{name}": getattr(dense, name).kernel[...][None] for name in ("gate", "up", "down")}
    assert_close("y", made.y(params=made.params | weights), dense(jnp.asarray(X)), TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize("name", ["softmax", "chunk"])
def test_enough_capacity_drops_nothing(name: str) -> None:
    ample, given = Layer(**OPTIONS[name], capacity=float(E)), layer(name)
    results = (made.gradients(given.params, X, H, SEG, CT) for made in (ample, given))
    assert_trees_close("gradient, y and losses", *results, TOLERANCE["fp32_op"])


def test_a_full_expert_drops_the_latest_tokens_of_each_row() -> None:
    """Three slots; all tokens want expert 2, but the third token of row 0 wants expert 4."""
    x = X.copy()
    x[..., :2] = 1, 0
    x[0, 2, :2] = 0, 1
    made, alone = (Layer(top_k=1, renorm=False, capacity=c) for c in (1.2, None))
    params = made.params | {"router": jnp.zeros((D, E)).at[0, 2].set(20).at[1, 4].set(20)}
    y, everything = (m.y(x, seg=ONES, params=params) for m in (made, alone))
    for row, kept in ((0, 4), (1, 3)):
        assert_close("kept", y[row, :kept], everything[row, :kept], TOLERANCE["fp32_op"])
        assert_equal("dropped", y[row, kept:], np.zeros((T - kept, D)))


# -------------------------------------------------------------------------------------------------- who influences whom


@pytest.mark.parametrize("name", OPTIONS)
def test_the_future_and_other_rows_change_nothing(name: str) -> None:
    made, before = layer(name), layer(name).y(seg=ONES)
    for t in (1, 5, 9):
        noise = np.zeros_like(X)
        noise[0, t:] = CT[0, t:]
        after = made.y(X + noise, H + noise, ONES)
        assert_close("past", after[0, :t], before[0, :t], 1e-6)
        assert_close("row 1", after[1], before[1], 1e-6)
        assert made.cfg.capacity is not None or np.abs(after[0, t:] - before[0, t:]).min(0).max() > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_neither_packing_nor_padding_counts(name: str) -> None:
    """Two documents in one row beside a row of padding, or a row for each: the same outputs, gradients and statistics.

    With capacity, packed documents compete for slots; the statistics are those of all that was asked for.
    """
    made, a = layer(name), 5
    packed = np.stack([np.repeat([1, 2], [a, T - a]), np.zeros(T)]).astype(np.int32)
    apart = (np.arange(T) < [[a], [T - a]]).astype(np.int32)

    def spread(x: np.ndarray) -> np.ndarray:
        """The documents of row 0 as rows; what is in place of padding is arbitrary."""
        return np.stack([np.concatenate([x[0, :a], 9 * x[1, a:]]), np.concatenate([x[0, a:], 9 * x[1, :a]])])

    def joined(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[0, :a], x[1, : T - a]])

    (p, *inputs), (y, losses) = made.gradients(made.params, X, H, packed, CT)
    (p2, *inputs2), (y2, losses2) = made.gradients(made.params, spread(X), spread(H), apart, spread(CT))
    assert_trees_close("losses", losses2, losses, TOLERANCE["fp32_op"])
    if made.cfg.bias:
        assert_equal("load", p2["bias"], p["bias"])
    if made.cfg.capacity is None:
        assert_close("y", joined(y2), y[0], TOLERANCE["fp32_op"])
        assert_trees_close("gradient", p2, p, TOLERANCE["fp32_op"])
        for of, of2 in zip(inputs, inputs2, strict=True):
            assert_close("gradient of inputs", joined(of2), of[0], TOLERANCE["fp32_op"])


# ---------------------------------------------------------------------------------------------------------------- state


@functools.cache
def continued(name: str) -> Callable:
    made = layer(name)
    return jax.jit(functools.partial(made, made.params))


@pytest.mark.parametrize("name", ["chunk", "chunk_pre_attn"])
def test_any_split_of_the_tokens_gives_the_same(name: str) -> None:
    """Both parts are filled up with padding, behind which the state waits."""
    places = np.asarray(document_positions(jnp.asarray(SEG)))
    zero = jax.tree.map(jnp.zeros_like, continued(name)(X, H, SEG, places)[1])
    whole, end, _ = continued(name)(X, H, SEG, places, zero)
    for t in range(1, T):
        first, state, _ = continued(name)(X, H, np.where(np.arange(T) < t, SEG, 0), places, zero)
        x, h, seg, at = (np.roll(a, -t, axis=1) for a in (X, H, SEG, places))
        then, state, _ = continued(name)(x, h, np.where(np.arange(T) < T - t, seg, 0), at, state)
        y = np.concatenate([first[:, :t], then[:, : T - t]], axis=1)
        assert_close(f"y, split at {t}", y[SEG != 0], np.asarray(whole)[SEG != 0], TOLERANCE["fp32_op"])
        assert_trees_close(f"state, split at {t}", state, end, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["chunk", "chunk_pre_attn"])
def test_single_steps_give_what_one_pass_gives(name: str) -> None:
    """After a prefill padded on the right, which leaves rows at different positions."""
    whole, rows = np.asarray(layer(name).y(seg=ONES)), np.arange(2)
    prefill = (np.arange(T) < [[5], [2]]).astype(np.int32)
    _, state, _ = continued(name)(X, H, prefill, np.stack([np.arange(T, dtype=np.int32)] * 2))
    for step in range(8):
        at = np.asarray([5, 2], np.int32) + step
        x, h = (a[rows, at][:, None] for a in (X, H))
        y, state, _ = continued(name)(x, h, ONES[:, :1], at[:, None], state)
        assert_close("y", y[:, 0], whole[rows, at], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["softmax", "chunk"])
def test_state_bytes_are_those_of_the_state(name: str) -> None:
    made = layer(name)
    initial = nnx.eval_shape(lambda: MoE(D, made.cfg, rngs=nnx.Rngs(0))).init_state(2, jnp.bfloat16)
    final = jax.eval_shape(made, made.params, X, H, SEG)[1]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, final)
    assert tree.nbytes(initial) == tree.nbytes(final) == 2 * state_bytes(made.cfg, D, 2)
    assert bool(initial) == (name == "chunk")


# -------------------------------------------------------------------------------------------------- balance of the load


def test_the_bias_gradient_is_a_count_and_nothing_else() -> None:
    """Whatever the loss and its scale; over microbatches it adds; no other gradient and no output knows of it."""
    made, plain = layer("softmax_bias"), layer("softmax")
    logits = X.astype(np.float64) @ np.asarray(made.params["router"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-(p + np.asarray(made.params["bias"])), axis=-1)[..., :2][SEG != 0]
    load = np.bincount(best.ravel(), minlength=E)

    def excess(scale: float, seg: np.ndarray) -> jax.Array:
        return made.gradients(made.params, X, H, seg, scale * CT)[0][0]["bias"]

    for scale in (1.0, -7.0, 0.0):
        assert_equal("excess", excess(scale, SEG), (load - load.mean()).astype(np.float32))
    halves = [excess(1.0, np.where(np.arange(2)[:, None] == row, SEG, 0)) for row in range(2)]
    assert_close("microbatches", sum(halves), load - load.mean(), 1e-6)

    level = made.params | {"bias": jnp.full((E,), 0.25)}  # changes no choice
    (biased, *inputs), (y, _) = made.gradients(level, X, H, SEG, CT)
    biased.pop("bias")
    level.pop("bias")
    without = Layer(z_loss=0.0)
    assert_equal("y", y, plain.y(params=level))
    assert_trees_close("gradient", ((biased, *inputs)), without.gradients(level, X, H, SEG, CT)[0], 1e-6)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_losses_of_a_uniform_and_of_a_collapsed_router(router: str) -> None:
    made = Layer(router=router, balance=0.03, z_loss=0.07, top_k=1, renorm=False)
    losses = made.losses(router=jnp.zeros((D, E)))
    assert_close("balance", losses.pop("balance"), 0.03, TOLERANCE["fp32_op"])
    expected = {"router_z": 0.07 * np.log(E) ** 2} if router == "softmax" else {}
    assert_trees_close("rest", losses, expected, TOLERANCE["fp32_op"])
    losses = made.losses(np.ones_like(X), router=jnp.full((D, E), -50.0).at[:, 1].set(50.0))
    assert_close("balance", losses["balance"], 0.03 * E, TOLERANCE["fp32_op"])


def test_a_batch_of_padding_has_losses_of_zero() -> None:
    assert layer("softmax").losses(seg=0 * SEG) == {"balance": 0.0, "router_z": 0.0}


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("name", ["groups", "capacity", "chunk"])
def test_lowers_for_gpus_and_never_adds_in_an_order_that_hardware_chooses(name: str) -> None:
    made = layer(name)
    arguments = (made.params, *(jnp.asarray(a, jnp.bfloat16) for a in (X, H)), jnp.asarray(SEG), jnp.asarray(CT))
    jax.export.export(made.gradients, platforms=["cuda"])(*arguments)
    program = str(jax.make_jaxpr(made.gradients)(*arguments))
    adding = re.findall(r":(\w+)\[[^=]*\] = scatter-add", program)
    assert "sort" in program and not [dtype for dtype in adding if not dtype.startswith("i")]


@pytest.mark.parametrize("name", ["groups", "capacity"])
def test_fp32_is_multiplied_in_full(name: str) -> None:
    made = layer(name)
    program = str(jax.make_jaxpr(made.gradients)(made.params, X, H, SEG, CT))
    precisions = re.findall(r"precision=(.*)", program)
    assert len(precisions) > 6 and all("HIGHEST" in p for p in precisions)


@pytest.mark.parametrize("name", ["groups", "capacity"])
def test_a_mesh_changes_no_result(name: str) -> None:
    made, mesh = layer(name), make_mesh(build(MeshConfig, {"fsdp": 4, "expert": 2}))
    batch = [np.concatenate([a, a[:, ::-1], -a, 2 * a]) for a in (X, H)]
    seg, ct = np.concatenate([SEG, ONES, SEG[::-1], ONES]), np.concatenate([CT] * 4)
    placed = {
        k: jax.device_put(v, NamedSharding(mesh, partition(made.flat[k].get_metadata("axes"), v.shape, mesh)))
        for k, v in made.params.items()
    }
    assert len(placed["experts/up"].sharding.device_set) == 8
    single = made.gradients(made.params, *batch, seg, ct)
    with jax.set_mesh(mesh):
        sharded = made.gradients(placed, *jax.device_put((*batch, seg, ct), batch_sharding(mesh)))
    assert_trees_close("gradient, y and losses", sharded, single, TOLERANCE["fp32_op"])


def test_parameters_say_how_they_are_initialised_and_optimised() -> None:
    cfg = MoEConfig(experts=16, width=32, bias=True)
    moe = nnx.jit(lambda: MoE(64, cfg, rngs=nnx.Rngs(0)))()
    for weight, axes, fan_in in (
        (moe.experts.gate, ("experts", "embed", "mlp"), 64),
        (moe.experts.up, ("experts", "embed", "mlp"), 64),
        (moe.experts.down, ("experts", "mlp", "embed"), 32),
    ):
        assert weight.get_metadata("axes") == axes and weight.get_metadata("matrix") == ((-2,), (-1,))
        assert weight.get_metadata("cast") and weight.get_metadata("decay")
        assert weight.get_metadata("residual") == (fan_in == 32)
        np.testing.assert_allclose(np.std(weight[...], axis=(1, 2)) * fan_in**0.5, 1, rtol=0.1)
    np.testing.assert_allclose(np.std(moe.router[...]), 0.02, rtol=0.1)
    assert not moe.router.get_metadata("cast") and moe.router.get_metadata("rule") == "gradient"
    assert moe.bias.get_metadata("rule") == "balance" and not moe.bias[...].any()


def test_experts_are_as_wide_as_a_dense_ffn_unless_told() -> None:
    for width, expected in ((None, 256), (24, 24)):
        moe = nnx.eval_shape(lambda w=width: MoE(64, MoEConfig(shared=3, width=w), rngs=nnx.Rngs(0)))
        assert moe.experts.up.shape == (8, 64, expected)
        assert moe.shared.up.kernel.shape == (64, 3 * expected)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("top_k", {"top_k": 7}),
        ("top_k", {"groups": 3, "top_groups": 1, "top_k": 3}),
        ("groups", {"groups": 4}),
        ("top_groups", {"groups": 2, "top_groups": 3}),
        ("shared_gate", {"shared_gate": True}),
        ("renorm", {"top_k": 1}),
        ("kind", {"kind": "relu3"}),
        ("router", {"router": "top"}),
        ("experts", {"experts": 0}),
        ("width", {"width": 0}),
        ("scale", {"scale": 0.0}),
        ("capacity", {"capacity": 0.0}),
        ("balance", {"balance": -0.1}),
        ("z_loss", {"z_loss": "much"}),
        ("shared", {"shared": -1}),
        ("chunk", {"chunk": 0}),
        ("granularity", {"granularity": "word"}),
        ("router_at", {"router_at": "head"}),
        ("bias_rate", {"bias_rate": 0.1}),
    ],
)
def test_bad_options_name_their_key(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        build(MoEConfig, {"experts": E, **options}, "moe")
    assert error.value.key == f"moe.{key}" and "\n" not in str(error.value)


@pytest.mark.parametrize(("router_at", "h"), [("ffn", X), ("pre_attn", None)])
def test_a_router_input_must_be_meant(router_at: str, h: np.ndarray | None) -> None:
    moe = MoE(D, build(MoEConfig, {"width": 5, "router_at": router_at}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="router_input"):
        moe(jnp.asarray(X), positions=document_positions(jnp.asarray(SEG)), router_input=h)
