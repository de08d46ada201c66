"""Workspace and product-key memory against their definitions in numpy fp64, and what a workspace may depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.nn import memory
from hydrax.ops.documents import document_positions
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

D, C, M = 16, 4, 6
WORKSPACE = {"slots": M, "rank": 3, "chunk": C, "write_slots": 2}
FP64 = 1e-12  # the same sums in another order
LENGTHS = (1, C - 1, C, C + 1, 3 * C + 5)


class Split:
    """A module as a function of its parameters, which are moved: slots are about as large as what is written."""

    def __init__(self, cls: type[nnx.Module], cfg: object, dtype: jnp.dtype = jnp.float32):
        self.graph, state = nnx.split(cls(D, cfg, rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(lambda a: jnp.asarray(a + 0.1 * rng.standard_normal(a.shape), dtype), state)

    def __call__(self, params: nnx.State, *args: object, form: str = "__call__", **kwargs: object) -> tuple:
        return getattr(nnx.merge(self.graph, params), form)(*args, **kwargs)

    def weights(self) -> dict[str, np.ndarray]:
        return {path[0]: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(self.params)}


def workspace(dtype: jnp.dtype = jnp.float32, **options: object) -> Split:
    return Split(memory.Workspace, build(memory.WorkspaceConfig, WORKSPACE | options), dtype)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(w: dict[str, np.ndarray], x: np.ndarray, k: int, blend: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y [T,D], slots [M,D] and running sum [D] of one document, straight from the equations."""
    slots, y, pending = w["slots"].copy(), [], []
    for t, token in enumerate(x):
        p = softmax((slots @ w["key"].T @ w["query"].T @ token) / np.sqrt(D))
        read = softmax(token @ w["gate"])[0] * (p @ slots)
        y.append(read @ w["value"] @ w["project"])
        pending.append(token)
        if (t + 1) % C == 0:
            mean, pending = np.mean(pending, 0), []
            for i in np.argsort((slots**2).sum(-1), kind="stable")[:k]:
                slots[i] = (1 - blend) * slots[i] + blend * softmax(mean @ w["gate"])[1] * mean
    return np.array(y), slots, np.sum(pending, 0) if pending else np.zeros(D)


@pytest.mark.parametrize(("options", "k", "blend"), [({}, 2, 0.1), ({"write_slots": None, "blend": 0.7}, 3, 0.7)])
def test_the_workspace_is_its_definition(options: dict, k: int, blend: float) -> None:
    with jax.enable_x64(True):
        module, x = workspace(jnp.float64, **options), normal(0, 9 * C + 2, D).astype(np.float64)
        y, slots, total = by_hand(module.weights(), x, k, blend)
        for form in ("recurrent", "__call__"):
            run = jax.jit(functools.partial(module, form=form))
            got, state = run(module.params, x[None], positions=jnp.arange(len(x))[None])
            assert_close(f"{form} y", got[0], y, FP64)
            assert_close(f"{form} slots", module.params["slots"][...] + state["slots"][0], slots, FP64)
            assert_close(f"{form} total", state["total"][0], total, FP64)


BEFORE = C + 2


def awkward(T: int) -> np.ndarray:
    """Rows of `BEFORE` + `T` tokens, cut there into two calls."""
    rows = [
        (BEFORE + T,),  # one document, continued by the second call
        (BEFORE + C - 2, *[1, C - 1] * T),  # a chunk completed across the call; short documents that fill blocks
        (2, C, C, C, 2 * C, C),  # documents of whole chunks that end inside blocks, one of them at the call
        (BEFORE - 1, 1, C, 1, C + 1, 2 * C + 1),  # documents that start at the call and at edges of blocks
        (BEFORE + min(T, C),),  # a continued document to the edge of a block, then padding
        (BEFORE + min(T, 2),),  # padding inside the chunk in progress
        (BEFORE,),  # padding alone
    ]
    ids = [np.repeat(np.arange(1, len(n) + 1), n)[: BEFORE + T] for n in rows]
    return np.stack([np.pad(i, (0, BEFORE + T - len(i))) for i in ids]).astype(np.int32)


def continued(module: Split, form: str, T: int, x: np.ndarray) -> tuple:
    """The second call on the rows of `awkward` as a function of (params, state, x), and these."""
    seg = awkward(T)
    positions, starts = inside(seg)
    first = {"positions": positions[:, :BEFORE], "segment_ids": seg[:, :BEFORE]}
    _, state = jax.jit(functools.partial(module, form="recurrent"))(module.params, x[:, :BEFORE], **first)
    real = seg[:, BEFORE:, None] != 0
    start = jnp.asarray(starts[:, BEFORE] & real[:, 0, 0])
    state = tree.where(start, jax.tree.map(jnp.zeros_like, state), state)

    def run(params: nnx.State, state: memory.State, x: jax.Array) -> tuple:
        facts = {"positions": positions[:, BEFORE:], "segment_ids": seg[:, BEFORE:]}
        y, state = module(params, x, state=state, form=form, **facts)
        return jnp.where(real, y, 0), state

    return run, (module.params, state, x[:, BEFORE:])


@pytest.mark.parametrize("T", LENGTHS)
def test_blocks_are_the_recurrence(T: int) -> None:
    """Outputs, final state and all gradients in fp64, from a state inside a document."""
    with jax.enable_x64(True):
        module, x = workspace(jnp.float64), jnp.asarray(normal(2, 7, BEFORE + T, D), jnp.float64)
        results = {}
        for form in ("recurrent", "__call__"):
            run, given = continued(module, form, T, x)

            @jax.jit
            def everything(*given: object, run: object = run) -> tuple:
                out, pullback = jax.vjp(run, *given)
                leaves, structure = jax.tree.flatten(out)
                weights = [jnp.asarray(normal(i, 3, *a.shape), a.dtype) for i, a in enumerate(leaves)]
                return out, jax.vmap(pullback)(jax.tree.unflatten(structure, weights))

            results[form] = everything(*given)
        for i, what in enumerate(("results", "gradients")):
            assert_trees_close(what, results["__call__"][i], results["recurrent"][i], FP64, floor=1e-3)


def test_gradients_are_those_of_the_function() -> None:
    """Also through what is written: along a random direction, against a central difference in fp64."""
    with jax.enable_x64(True):
        T, step = 3 * C + 5, 1e-6
        module, x = workspace(jnp.float64), jnp.asarray(normal(2, 7, BEFORE + T, D), jnp.float64)
        run, given = continued(module, "__call__", T, x)
        move = jax.tree.map(lambda a: jnp.asarray(normal(a.size, *a.shape), a.dtype), given)

        @jax.jit
        def loss(*given: object) -> jax.Array:
            return sum(jnp.sum(normal(i, *a.shape) * a) for i, a in enumerate(jax.tree.leaves(run(*given))))

        def at(by: float) -> jax.Array:
            return loss(*jax.tree.map(lambda a, d: a + by * d, given, move))

        _, slope = jax.jvp(loss, given, move)
        assert_close("slope", slope, (at(step) - at(-step)) / (2 * step), TOLERANCE["fp32_op"])
        written = jax.jit(jax.grad(lambda x: jnp.sum(run(*given[:2], x)[0][0, C:] ** 2)))(given[2])
        assert np.all(np.abs(written[0, 2 : C - 1]).max(-1) > 1e-6), "what is written has no gradient"


def test_packed_equals_separate() -> None:
    lengths = (1, C - 1, 2 * C, 3, C + 1, 3 * C + 2, C, 2)
    ends, longest = np.cumsum(lengths), max(lengths)
    module, x = workspace(), normal(3, ends[-1], D)
    seg = segments(lengths, ends[-1])[None]
    alone = np.stack([segments((n,), longest) for n in lengths])
    weights = normal(4, *x.shape)

    def apart(a: np.ndarray) -> np.ndarray:
        return np.stack([np.pad(d, ((0, longest - len(d)), (0, 0))) for d in np.split(a, ends[:-1])])

    @jax.jit
    def run(params: nnx.State, x: jax.Array, seg: jax.Array, weights: jax.Array) -> tuple:
        def loss(params: nnx.State, x: jax.Array) -> tuple:
            y, _ = module(params, x, positions=document_positions(seg), segment_ids=seg)
            return jnp.sum(weights * y), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (params_packed, x_packed), y_packed = run(module.params, x[None], seg, weights[None])
    (params_alone, x_alone), y_alone = run(module.params, apart(x), alone, apart(weights))
    assert_trees_close("parameter gradient", params_packed, params_alone, TOLERANCE["fp32_op"])
    for i, n in enumerate(lengths):
        at = slice(ends[i] - n, ends[i])
        assert_close(f"y of document {i}", y_packed[0, at], y_alone[i, :n], TOLERANCE["fp32_op"])
        assert_close(f"gradient of document {i}", x_packed[0, at], x_alone[i, :n], TOLERANCE["fp32_op"])


T = 5 * C + 3


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_future_does_not_change_the_past(size: float) -> None:
    """Row t of the batch has other tokens from t on; an output two chunks later depends on t."""
    module, x = workspace(), np.broadcast_to(normal(5, T, D), (T, T, D))
    positions = jnp.broadcast_to(jnp.arange(T), (T, T))
    run = jax.jit(lambda x: module(module.params, x, positions=positions)[0])
    y = run(x)
    future = np.triu(np.ones((T, T), bool))[..., None]
    other = run(np.where(future, size * normal(6, T, D), x))
    touched = run(np.where(np.eye(T, dtype=bool)[..., None], size * normal(6, T, D), x))
    for t in range(T):
        assert_equal(f"outputs before {t}", other[t, :t], y[t, :t])
        own = t // C * C + C  # the first token of the next chunk
        assert np.any(np.asarray(touched[t, t] != y[t, t])), f"output {t} does not depend on its own token"
        assert_equal(f"outputs of the chunk after {t}", touched[t, t + 1 : own], y[t, t + 1 : own])
        assert own >= T or np.all(np.any(np.asarray(touched[t, own:] != y[t, own:]), -1)), f"{t} is not written"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(T,), (1, 2 * C + 1, C, T - 3 * C - 2)], ids=["whole", "packed"])
def test_prefill_then_steps_at_every_split(lengths: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Row s of the batch prefills s tokens, right-padded, then decodes the others one by one."""
    module, seg = workspace(), segments(lengths, T)
    x = jnp.asarray(normal(7, T, D), dtype)
    positions, starts = (a[0] for a in inside(seg[None]))
    splits = np.arange(T + 1)
    index = splits[:, None] + np.arange(T)
    rest = np.minimum(index, T - 1)

    @jax.jit
    def decode(params: nnx.State, x: jax.Array) -> tuple:
        prefix = {
            "positions": np.broadcast_to(positions, rest.shape),
            "segment_ids": seg * (np.arange(T) < splits[:, None]),
        }
        state = nnx.merge(module.graph, params).init_state(T + 1, dtype)
        first, state = module(params, jnp.broadcast_to(x, (T + 1, T, D)), state=state, **prefix)

        def step(state: memory.State, inputs: tuple) -> tuple:
            x, position, start = inputs
            state = tree.where(start, jax.tree.map(jnp.zeros_like, state), state)
            y, state = module(params, x[:, None], positions=position[:, None], state=state)
            return state, y[:, 0]

        inputs = (x[rest], jnp.asarray(positions)[rest], jnp.asarray(starts)[rest])
        _, y = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), inputs))
        return first, jnp.moveaxis(y, 0, 1)

    full, state = jax.jit(module)(module.params, x[None], positions=positions[None], segment_ids=seg[None])
    assert full.dtype == dtype and state["slots"].dtype == state["total"].dtype == jnp.float32
    first, then = decode(module.params, x)
    tolerance = TOLERANCE["fp32_op" if dtype == jnp.float32 else "bf16_long"]
    for s in splits:
        assert_close(f"prefill of {s}", first[s, :s], full[0, :s], tolerance)
        assert_close(f"steps after {s}", then[s, : T - s], full[0, s:], tolerance)


def test_documents_padding_and_neighbours_do_not_leak() -> None:
    """In row i only document i has other tokens (0: the padding); everything else keeps every bit."""
    lengths = (C + 1, 1, 2 * C + 2, 3 * C)
    n = sum(lengths) + C
    module, seg = workspace(), np.broadcast_to(segments(lengths, n), (len(lengths) + 1, n))
    changed = seg == np.arange(len(seg))[:, None]
    facts = {"positions": inside(seg)[0], "segment_ids": seg}
    run = jax.jit(lambda x: module(module.params, x, **facts))
    x = np.broadcast_to(normal(8, n, D), (*seg.shape, D))
    y, state = run(x)
    other, other_state = run(np.where(changed[..., None], 100 * normal(9, n, D), x))
    for i in range(len(seg)):
        keep = ~changed[i] & (seg[i] != 0)
        assert_equal(f"outputs beside document {i}", other[i][keep], y[i][keep])
    for name in state:
        assert_equal(f"{name} with other documents", other_state[name][:-1], state[name][:-1])
        assert np.any(np.asarray(other_state[name][-1] != state[name][-1])) == (name == "slots")


def test_bf16_is_close_to_fp32() -> None:
    module, x = workspace(), jnp.asarray(normal(10, 2, 9 * C + 1, D), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    run = jax.jit(module)
    y, state = run(module.params, x, positions=positions)
    want, want_state = run(module.params, x.astype(jnp.float32), positions=positions)
    assert_close("y", y, want, TOLERANCE["bf16_long"])
    assert_trees_close("state", state, want_state, TOLERANCE["fp32_op"])  # fp32 in either case


def test_state_bytes() -> None:
    cfg = build(memory.WorkspaceConfig, {})
    assert cfg == memory.WorkspaceConfig(slots=64, rank=128, chunk=32, write_slots=None, blend=0.1)
    module = memory.Workspace(D, dataclasses.replace(cfg, slots=5), rngs=nnx.Rngs(0))
    assert module.write_slots == 3
    for dtype in (jnp.float32, jnp.bfloat16):
        state = module.init_state(3, dtype)
        assert tree.nbytes(state) == 3 * memory.state_bytes(module.cfg, D, jnp.dtype(dtype).itemsize)
        assert not any(np.any(a) for a in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("cls", "options", "key"),
    [
        (memory.WorkspaceConfig, {"slots": 8, "write_slots": 9}, "write_slots"),
        (memory.WorkspaceConfig, {"slots": 0}, "slots"),
        (memory.WorkspaceConfig, {"chunk": 0}, "chunk"),
        (memory.WorkspaceConfig, {"blend": 1.5}, "blend"),
        (memory.PKMConfig, {"rows": 3, "top_k": 4}, "top_k"),
        (memory.PKMConfig, {"value_dim": 1.5}, "value_dim"),
    ],
)
def test_bad_options(cls: type, options: dict, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(cls, options)
    assert error.value.key == key and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- product-key memory

PKM = {"rows": 5, "key_dim": 3, "top_k": 3, "value_dim": 7}


def brute_force(w: dict[str, jax.Array], x: jax.Array, k: int) -> jax.Array:
    """The k best of all rows² scores, each computed; [T,D] -> [T,D]."""
    halves = jnp.einsum("td,dhk->thk", x, w["query"])
    scores = jnp.stack([halves[:, 0] @ a + halves[:, 1] @ b for a in w["keys"][0] for b in w["keys"][1]], axis=-1)
    best = jnp.argsort(-scores, axis=-1)[:, :k]
    p = jax.nn.softmax(jnp.take_along_axis(scores, best, axis=-1))
    read = (p[..., None] * w["values"][best]).sum(1)
    return jax.nn.sigmoid(x @ w["gate"] - 2) * (read @ w["project"])


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_pkm_finds_the_best_of_all_keys(top_k: int) -> None:
    """Outputs and gradients, fp64, against all rows² keys."""
    with jax.enable_x64(True):
        module = Split(memory.PKM, build(memory.PKMConfig, PKM | {"top_k": top_k}), jnp.float64)
        x, weights = jnp.asarray(normal(11, 40, D), jnp.float64), normal(12, 40, D)

        def loss(params: nnx.State, x: jax.Array, reference: bool) -> tuple:
            w = {path[0]: v[...] for path, v in nnx.to_flat_state(params)}
            y = brute_force(w, x, top_k) if reference else module(params, x.reshape(2, 20, D)).reshape(40, D)
            return jnp.sum(weights * y), y

        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        (gradients, y), (want_gradients, want) = run(module.params, x, False), run(module.params, x, True)
        assert_close("y", y, want, FP64)
        assert_trees_close("gradient", gradients, want_gradients, FP64)


def test_pkm_tables_are_looked_up_in_the_compute_dtype() -> None:
    """And have neither weight decay nor a matrix optimiser."""
    module = Split(memory.PKM, build(memory.PKMConfig, PKM))
    y = module(module.params, jnp.asarray(normal(13, 1, 4, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and y.shape == (1, 4, D)
    for path, v in nnx.to_flat_state(module.params):
        looked_up = path[0] in ("keys", "values")
        assert v.get_metadata("decay") != looked_up and (v.get_metadata("matrix") is None) == looked_up
        assert v.get_metadata("cast")
