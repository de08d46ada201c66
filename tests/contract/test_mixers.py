"""The contract: what every row of `hydrax.mixers.TABLE` must satisfy. To register a mixer is to pass this file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core import tree
from tests.contract.cases import CHUNK, VARIANTS, Case, D, case, inside, is_float, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow, id="fp32"), pytest.param(jnp.bfloat16, id="bf16")]
)
PACKED = (1, 8, 1, 6, 5)
ROWS = pytest.mark.parametrize(
    "lengths", [pytest.param(None, marks=pytest.mark.slow, id="whole"), pytest.param(PACKED, id="packed")]
)
SPLIT = pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        pytest.param(PACKED, jnp.float32, id="packed-fp32"),
        pytest.param(None, jnp.bfloat16, marks=pytest.mark.slow, id="whole-bf16"),
        pytest.param(None, jnp.float32, marks=pytest.mark.slow, id="whole-fp32"),
        pytest.param(PACKED, jnp.bfloat16, marks=pytest.mark.slow, id="packed-bf16"),
    ],
)
"""`make test` runs every mixer on packed rows, `make test-all` on all kinds of rows."""


@pytest.fixture(params=mixers.names())
def name(request) -> str:
    return request.param


@pytest.fixture
def mixer(name: str) -> Case:
    return case(name)


OTHERS = [pytest.param((name, i), marks=pytest.mark.slow) for name in VARIANTS for i in range(len(VARIANTS[name]))]


@pytest.fixture(params=[*((name, None) for name in mixers.names()), *OTHERS], ids=str)
def variant(request) -> Case:
    """A mixer with the options of the table, or with others that take another path through it."""
    return case(*request.param)


# ---------------------------------------------------------------------------------------------- (a) forms agree

BEFORE, AFTER = 7, 37
COTANGENTS = 8


def awkward(before: int, after: int, chunk: int) -> np.ndarray:
    """Rows of `before` + `after` tokens, cut after `before` into two calls."""
    rows = [
        (before + after,),  # one document, continued by the second call
        (1, before - 1, *edges(after, chunk)),  # boundaries at the call, chunk edges, single tokens
        (before + min(after, chunk), max(after - chunk - 4, 0)),  # a continued document to a chunk edge, padding
    ]
    return np.stack([segments([n for n in lengths if n], before + after) for lengths in rows])


def edges(tokens: int, chunk: int) -> list[int]:
    """Lengths of documents: single tokens that start a chunk, and what is left of that chunk."""
    lengths = [1, chunk - 1] * -(-tokens // chunk)
    return np.diff(np.minimum(np.cumsum([0, *lengths]), tokens)).tolist()


def forms_inputs(mixer: Case, seg: np.ndarray):
    """Parameters, the state after a first call, and x of the second; in fp64, but exact in bf16."""
    B, T = seg.shape

    def rounded(a):  # by NumPy: XLA may skip a conversion there and back
        return np.asarray(a).astype(jnp.bfloat16).astype(np.float32)

    before, x = (rounded(normal(i, B, n, D)) for i, n in ((1, BEFORE), (2, T - BEFORE)))
    params = {n: rounded(p) if n in mixer.cast_names else np.asarray(p) for n, p in mixer.params.items()}
    _, state = jax.jit(lambda p, x: mixer(p, x, seg[:, :BEFORE], state=mixer.init(B, T)))(params, before)
    state = jax.tree.map(lambda a: rounded(a).astype(np.float64) if is_float(a) else np.asarray(a), state)
    params = jax.tree.map(lambda a: rounded(a).astype(np.float64), params)
    return params, state, x.astype(np.float64)


def forms_run(mixer: Case, seg: np.ndarray, impl: str | None, params, state, x, count: int = COTANGENTS):
    """A function of the differentiable inputs, and these inputs: parameters, float leaves of the state, x.

    It gives output and final state of a call that continues the state, gradients for several cotangents of both
    (those of a bias are sums over tokens that nearly cancel for an unlucky one), and the scalar that belongs to the
    first cotangent.
    """
    positions, starts = inside(seg)
    facts = {"positions": positions[:, BEFORE:], "starts": starts[:, BEFORE], "impl": impl}
    leaves, structure = jax.tree.flatten(state)

    def run(params, memory, x):
        given = [memory.get(i, leaf) for i, leaf in enumerate(leaves)]
        y, new = mixer(params, x, seg[:, BEFORE:], state=jax.tree.unflatten(structure, given), **facts)
        return [y * real, *(leaf for leaf in jax.tree.leaves(new) if is_float(leaf))], (y * real, new)

    @jax.jit
    def all_results(params, memory, x):
        results, pullback, (y, new) = jax.vjp(run, params, memory, x, has_aux=True)
        cotangents = [normal(i, count, *r.shape).astype(r.dtype) for i, r in enumerate(results)]
        total = sum(jnp.sum(w[0] * r) for w, r in zip(cotangents, results, strict=True))
        return total, {"y": y, "state": new, "gradient": jax.vmap(pullback)(cotangents)}

    real = (seg[:, BEFORE:, None] != 0).astype(x.dtype)
    return all_results, (params, {i: leaf for i, leaf in enumerate(leaves) if is_float(leaf)}, x)


def in_fp32(inputs):
    return jax.tree.map(lambda a: np.asarray(a, np.float32) if is_float(a) else a, inputs)


def slope(run, inputs, told=()) -> tuple[float, float]:
    """The derivative of the scalar along a random direction: by a central difference, and by the gradients.

    Not of the parameters `told`, whose gradient is a count and no derivative.
    """
    direction = jax.tree.map(lambda a: normal(a.size, *a.shape).astype(a.dtype), inputs)
    direction = (direction[0] | {name: 0 * direction[0][name] for name in told}, *direction[1:])
    step = 1e-7

    def moved(by: float) -> float:
        return float(run(*jax.tree.map(lambda a, d: a + by * d, inputs, direction))[0])

    products = jax.tree.map(lambda g, d: np.sum(np.asarray(g)[0] * d), run(*inputs)[1]["gradient"], direction)
    return (moved(step) - moved(-step)) / (2 * step), sum(jax.tree.leaves(products))


def test_forms_agree(variant: Case):
    """Output, final state and all gradients equal those of the recurrence, which is the definition, in fp64."""
    mixer, seg = variant, awkward(BEFORE, AFTER, CHUNK)
    with jax.enable_x64(True):
        inputs = forms_inputs(mixer, seg)
        run, given = forms_run(mixer, seg, "recurrent", *inputs)
        want = run(*given)[1]
        assert_close("gradient of the recurrence", *slope(run, given, mixer.told_names), TOLERANCE["fp32_op"])
    params, state, x = in_fp32(inputs)
    for impl in ("chunked", None):
        run, given = forms_run(mixer, seg, impl, params, state, x)
        for name, value in run(*given)[1].items():
            assert_trees_close(f"{impl} fp32 {name}", value, want[name], TOLERANCE["fp32_op"])

    @jax.jit
    def in_bf16(params, state, x):
        state = jax.tree.map(lambda a, like: a.astype(like.dtype), state, mixer.init(1, 1, jnp.bfloat16))
        return mixer.cast(jnp.bfloat16, params), state, x.astype(jnp.bfloat16)

    run, given = forms_run(mixer, seg, None, *in_bf16(params, state, x))
    got = run(*given)[1]
    assert got["y"].dtype == jnp.bfloat16
    for name, value in got.items():
        assert_trees_close(f"bf16 {name}", value, want[name], TOLERANCE["bf16_long"])


LENGTHS = (1, 63, 64, 65, 257)
EVERYWHERE = {"attn", "gdn"}
"""Keys and values, and a matrix state. Others meet all lengths, and long rows, in `make test-all`."""


LONG = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERYWHERE else pytest.mark.slow) for n in mixers.names()]
)


@LONG
def test_every_length(name: str):
    """Chunks of the default size, documents at their edges: output, state and gradients equal the fp64 recurrence."""
    mixer, longest = case(name, chunk_size=64), max(LENGTHS)
    rows = [awkward(BEFORE, n, 64) for n in LENGTHS]
    padded = np.stack([np.pad(seg, ((0, 0), (0, BEFORE + longest - seg.shape[1]))) for seg in rows])
    weights = normal(20, len(rows[0]), longest, D)

    def run(params, memory, x, seg, positions, starts, impl=None):
        facts = {"positions": positions[:, BEFORE:], "starts": starts[:, BEFORE], "impl": impl}

        def call(params, memory, x):
            given = jax.tree.unflatten(structure, [memory.get(i, leaf) for i, leaf in enumerate(leaves)])
            y, new = mixer(params, x, seg[:, BEFORE:], state=given, **facts)
            return [y * (seg[:, BEFORE:, None] != 0), *filter(is_float, jax.tree.leaves(new))]

        results, pullback = jax.vjp(call, params, memory, x)
        states = [normal(i, *r.shape).astype(r.dtype) for i, r in enumerate(results[1:])]
        dparams, dmemory, dx = pullback([weights[:, : x.shape[1]].astype(x.dtype), *states])
        return {"tokens": (results[0], dx), "rest": (results[1:], dparams, dmemory)}

    with jax.enable_x64(True):
        params, state, x = forms_inputs(mixer, padded[-1])
        leaves, structure = jax.tree.flatten(state)
        memory = {i: leaf for i, leaf in enumerate(leaves) if is_float(leaf)}
        reference = jax.jit(jax.vmap(functools.partial(run, impl="recurrent"), in_axes=(None, None, None, 0, 0, 0)))
        inner = (np.stack(a) for a in zip(*map(inside, padded), strict=True))
        want = jax.tree.map(np.asarray, reference(params, memory, x, padded, *inner))
    params, memory, x = in_fp32((params, memory, x))
    for i, (n, seg) in enumerate(zip(LENGTHS, rows, strict=True)):
        got = jax.jit(run)(params, memory, x[:, :n], seg, *inside(seg))
        expected = {
            "tokens": tuple(a[i][:, :n] for a in want["tokens"]),
            "rest": jax.tree.map(lambda a, i=i: a[i], want["rest"]),
        }
        assert_trees_close(f"{n} tokens", got, expected, TOLERANCE["fp32_op"])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [16, 32, 128, 256])
def test_the_chunk_size_does_not_change_results(name: str, chunk_size: int):
    """Outputs, states and gradients with another chunk size are those of chunks of 64 tokens."""
    seg = awkward(BEFORE, 300, 64)
    inputs = None
    for size in (64, chunk_size):
        mixer = case(name, chunk_size=size)
        if inputs is None:
            with jax.enable_x64(True):
                inputs = forms_inputs(mixer, seg)
        params, state, x = in_fp32(inputs)
        run, given = forms_run(mixer, seg, None, params, state, x, count=2)
        result = run(*given)[1]
        want = result if size == 64 else want
    assert_trees_close(f"chunks of {chunk_size}", result, want, TOLERANCE["fp32_op"])


@LONG
def test_long_rows_in_bf16(mixer: Case):
    T = 513
    params, x = mixer.cast(jnp.bfloat16), jnp.asarray(normal(3, 1, T, D), jnp.bfloat16)
    y, _ = jax.jit(mixer)(params, x)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    y_ref, _ = jax.jit(lambda *a: mixer(*a, impl="recurrent"))(*wide)
    assert_close("first half", y[:, : T // 2], y_ref[:, : T // 2], TOLERANCE["bf16_long"])
    assert_close("last tokens", y[:, -32:], y_ref[:, -32:], TOLERANCE["bf16_long"])


# ------------------------------------------------------------------------- (b) prefill, continue, step at every split

T = 21  # > CHUNK, and longer than the window and sinks of every tiny config
SPLITS = np.arange(T + 1)
INDEX = SPLITS[:, None] + np.arange(T)  # [T+1,T]: row s holds the tokens s, s+1, ...; those >= T do not exist
REST = np.minimum(INDEX, T - 1)
PREFIX = np.arange(T) < SPLITS[:, None]


def split_row(lengths: tuple[int, ...] | None):
    """Ids, positions and starts [T] of the row that is split; one document if no lengths are given."""
    seg = segments(lengths or (T,), T)
    positions, starts = inside(seg[None])
    return seg, positions[0], starts[0]


@SPLIT
def test_prefill_then_steps_at_every_split(mixer: Case, lengths: tuple[int, ...] | None, dtype: jnp.dtype):
    """Row s of the batch prefills s tokens, right-padded, then decodes the others one by one."""
    seg, positions, starts = split_row(lengths)
    starts = starts & (np.arange(T) > 0)  # token 0 continues the empty state

    @jax.jit
    def decode(params, x):
        state = mixer.init(T + 1, 2 * T, dtype)
        first, state = mixer(params, jnp.broadcast_to(x, (T + 1, T, D)), np.where(PREFIX, seg, 0), state=state)

        def step(state, inputs):
            x_t, position, start = inputs
            y, state = mixer(params, x_t[:, None], positions=position[:, None], starts=start, state=state)
            return state, y[:, 0]

        rest = (x[REST], positions[REST], starts[REST] & (INDEX < T))
        _, y = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), rest))
        return first, jnp.moveaxis(y, 0, 1)

    params, x = mixer.cast(dtype), jnp.asarray(normal(4, T, D), dtype)
    full, _ = jax.jit(lambda p, x: mixer(p, x[None], None if lengths is None else seg[None]))(params, x)
    first, rest = decode(params, x)
    tolerance = TOLERANCE["fp32_op" if dtype == jnp.float32 else "bf16_long"]
    for s in SPLITS:
        assert_close(f"prefill of {s}", first[s, :s], full[0, :s], tolerance)
        assert_close(f"steps after {s}", rest[s, : T - s], full[0, s:], tolerance)


@ROWS
def test_two_calls_equal_one_at_every_split(mixer: Case, lengths: tuple[int, ...] | None):
    """A second call of many tokens continues the first, wherever the row is cut."""
    seg, positions, starts = split_row(lengths)

    @jax.jit
    def two_calls(params, x):
        state = mixer.init(T + 1, T, x.dtype)
        _, state = mixer(params, jnp.broadcast_to(x, (T + 1, T, D)), np.where(PREFIX, seg, 0), state=state)
        facts = {"positions": positions[REST], "starts": starts[REST][:, 0]}
        return mixer(params, x[REST], np.where(INDEX < T, seg[REST], 0), state=state, **facts)[0]

    x = normal(5, T, D)
    full, _ = jax.jit(lambda p, x: mixer(p, x[None], seg[None], impl="recurrent"))(mixer.params, x)
    rest = two_calls(mixer.params, x)
    for s in SPLITS:
        assert_close(f"tokens after {s}", rest[s, : T - s], full[0, s:], TOLERANCE["fp32_op"])


# --------------------------------------------------------------------------------------- (c) packed equals separate


def test_packed_equals_separate(mixer: Case):
    """Outputs and input gradients of a packed row are those of each document in a row of its own."""
    lengths = (1, CHUNK - 1, 1, CHUNK, 3, 1)
    ends = np.cumsum(lengths)
    seg = segments(lengths, ends[-1])[None]
    alone = np.stack([segments((n,), CHUNK) for n in lengths])
    x, weights = normal(6, ends[-1], D), normal(7, ends[-1], D)

    def apart(a):
        return np.stack([np.pad(d, ((0, CHUNK - len(d)), (0, 0))) for d in np.split(a, ends[:-1])])

    def loss(params, x, weights, seg):
        y, _ = mixer(params, x, seg)
        return jnp.sum(y * weights), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (params_packed, x_packed), y_packed = run(mixer.params, x[None], weights[None], seg)
    (params_alone, x_alone), y_alone = run(mixer.params, apart(x), apart(weights), alone)
    assert_trees_close("parameter gradient", params_packed, params_alone, TOLERANCE["fp32_op"])
    for i, (y, gradient) in enumerate(
        zip(np.split(y_packed[0], ends[:-1]), np.split(x_packed[0], ends[:-1]), strict=True)
    ):
        assert_close(f"y of document {i}", y, y_alone[i, : lengths[i]], TOLERANCE["fp32_op"])
        assert_close(f"gradient of document {i}", gradient, x_alone[i, : lengths[i]], TOLERANCE["fp32_op"])


# ------------------------------------------------------------------ (d, e) what an output may depend on, bit by bit


@pytest.mark.parametrize(
    "size", [pytest.param(1.0, marks=pytest.mark.slow, id="same size"), pytest.param(1e3, id="large")]
)
def test_the_future_does_not_change_the_past(mixer: Case, size: float):
    """Row t of the batch has other tokens from t on."""
    run = jax.jit(lambda p, x: mixer(p, x)[0])
    x = np.broadcast_to(normal(8, T, D), (T, T, D))
    future = np.tril(np.ones((T, T), bool)).T[..., None]
    y = run(mixer.params, x)
    other = run(mixer.params, np.where(future, size * normal(9, T, D), x))
    for t in range(T):
        assert_equal(f"outputs before {t}", other[t, :t], y[t, :t])
        assert np.any(np.asarray(other[t, t] != y[t, t])), f"output {t} does not depend on its own token"


def test_documents_padding_and_neighbours_do_not_leak(mixer: Case):
    """In row i only document i has other tokens (0: the padding); everything else keeps every bit."""
    lengths = (5, 1, CHUNK - 6, 7)
    seg = np.broadcast_to(segments(lengths, T + 5), (len(lengths) + 1, T + 5))
    changed = seg == np.arange(len(seg))[:, None]

    @jax.jit
    def run(params, x):
        return mixer(params, x, seg, state=mixer.init(len(seg), T + 5))

    x = np.broadcast_to(normal(10, T + 5, D), (*seg.shape, D))
    y, state = run(mixer.params, x)
    other, other_state = run(mixer.params, np.where(changed[..., None], 100 * normal(11, T + 5, D), x))
    for i in range(len(seg)):
        keep = ~changed[i] & (seg[i] != 0)
        assert_equal(f"outputs beside document {i}", other[i][keep], y[i][keep])
        if i:
            assert np.any(np.asarray(other[i][changed[i]] != y[i][changed[i]])), f"document {i} ignores its tokens"
    padding_only = jax.tree.map(lambda a: a[:1], (other_state, state))
    jax.tree.map(lambda a, b: assert_equal("state after padding", a, b), *padding_only)


def test_a_row_of_padding_leaves_the_state_alone(mixer: Case):
    """A finished row of a decoding batch: segment id 0 for one token, and for many."""
    state = mixer.init(2, T)
    _, state = jax.jit(mixer)(mixer.params, normal(12, 2, 5, D), state=state)
    for n in (1, 4):
        seg = np.stack([np.zeros(n, np.int32), np.ones(n, np.int32)])
        positions = np.broadcast_to(5 + np.arange(n, dtype=np.int32), (2, n))
        _, new = jax.jit(mixer)(mixer.params, normal(13, 2, n, D), seg, positions=positions, state=state)
        pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True))
        for a, b in pairs:
            assert_equal(f"state after {n} tokens of padding", a[0], b[0])
        traces = any(np.any(np.asarray(a[1] != b[1])) for a, b in pairs)
        assert traces == mixer.remembers, "real tokens leave no trace in the state"


BY_POSITION = {"max_pool", "rat"}
"""Mixers whose token at position 0 sees no state, whether it is told of a new document or not."""


def test_starts_forgets_the_state(mixer: Case):
    """Row 0 starts a document, row 1 continues one; a call of one token and a call of several."""
    state = mixer.init(2, T)
    _, state = jax.jit(mixer)(mixer.params, normal(14, 2, 9, D), state=state)
    starts = np.array([True, False])
    for n in (1, 5):
        positions = np.stack([np.arange(n), 9 + np.arange(n)]).astype(np.int32)
        run = jax.jit(lambda s, flags, n=n, p=positions: mixer(
            mixer.params, normal(15, 2, n, D), positions=p, state=s, starts=flags))  # fmt: skip
        y, new = run(state, starts)
        fresh, fresh_state = run(mixer.init(2, T), ~starts)
        kept, kept_state = run(state, np.zeros(2, bool))
        for who, i, want in (("a new document", 0, (fresh, fresh_state)), ("a continued one", 1, (kept, kept_state))):
            for a, b in zip(jax.tree.leaves((y, new)), jax.tree.leaves(want), strict=True):
                assert_equal(f"{who} after {n} tokens", a[i], b[i])
        if mixer.name not in BY_POSITION:
            assert np.any(np.asarray(y[0] != kept[0])) == mixer.remembers, "the state does not matter"


# ------------------------------------------------------------------------------------------- (f) extremes stay finite


@DTYPES
def test_extremes_stay_finite(mixer: Case, dtype: jnp.dtype):
    """Saturated gates, silence, repetition and size leave outputs, states and gradients finite."""
    x = normal(16, 1, AFTER, D)
    burst = np.where(np.arange(AFTER)[:, None] % 5 == 0, 1e4, 0.0)
    rows = [0 * x, 0 * x + x[:, :1], 1e4 * x, -1e4 * np.abs(x), 1e-20 * x, x * burst]
    batch = jnp.asarray(np.concatenate(rows), dtype)

    def loss(params, x):
        y, state = mixer(params, x, state=mixer.init(len(rows), AFTER, dtype))
        return sum(jnp.sum(r.astype(jnp.float32)) for r in jax.tree.leaves((y, state)) if is_float(r)), (y, state)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    for scale, x in ((1.0, batch), (30.0, jnp.clip(batch, -10, 10))):
        # decays are exponentials of fp32 parameters: a shift by 7 is what a factor of 1000 is to the others
        shift = 7.0 if scale > 1 else 0.0
        params = {n: scale * p if n in mixer.cast_names else p + shift for n, p in mixer.cast(dtype).items()}
        for path, leaf in jax.tree_util.tree_flatten_with_path(run(params, x))[0]:
            finite = np.isfinite(np.asarray(leaf, np.float32))
            assert finite.all(), (
                f"{jax.tree_util.keystr(path)} not finite at {np.argwhere(~finite)[0]}, parameters x{scale}"
            )


# ----------------------------------------------------------------------------------------------- (g) state, (j) taps


@DTYPES
def test_state_is_what_the_table_says(mixer: Case, dtype: jnp.dtype):
    """Bytes by the formula of the row, zeros at first, memory in fp32, and the structure that every call returns."""
    for max_len in (1, 5, T, 100):
        state = jax.eval_shape(lambda n=max_len: mixer.init(3, n, dtype))
        want = 3 * mixer.row.state_bytes(mixer.cfg, max_len, jnp.dtype(dtype).itemsize)
        assert tree.nbytes(state) == want, f"max_len {max_len}: {state}"
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(mixer.init(3, T, dtype)))
    state = jax.eval_shape(lambda: mixer.init(3, T, dtype))
    if "memory" in state:  # what is carried over the whole document
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["memory"]))
    for tokens in (1, 6):
        x = jax.ShapeDtypeStruct((3, tokens, D), dtype)
        y, new = jax.eval_shape(lambda p, x, s: mixer(p, x, state=s), mixer.cast(dtype), x, state)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert new == state, f"a call of {tokens} tokens returns another structure"


@pytest.mark.slow  # what taps are for, effective attention, is tested with every mixer
def test_taps_see_and_replace_the_heads(mixer: Case):
    """`heads` is z [B,T,H,V] before the output projection, in training and in a step."""
    seen = []

    def tap(z):
        seen.append(z.shape)
        return jnp.cos(z)

    @jax.jit
    def run(params, x):
        module, state = mixer.merge(params), mixer.init(2, T)
        y, _ = mixer(params, x, state=state, taps={"heads": tap, "unknown": jnp.zeros_like})
        bare, _ = mixer(params, x, state=state, taps={"heads": lambda z: z})
        return y, module.out(jnp.cos(capture(params, x, state))), bare, mixer(params, x, state=state)[0]

    def capture(params, x, state):
        box = []
        mixer(params, x, state=state, taps={"heads": lambda z: box.append(z) or z})
        return box[0]

    for tokens in (1, 6):
        y, want, bare, plain = run(mixer.params, normal(17, 2, tokens, D))
        assert_equal("tapped output", y, want)
        assert_equal("output under an identity tap", bare, plain)
        assert np.any(np.asarray(y != plain)), "the tap has no effect"
    assert [(*s[:2], len(s)) for s in seen] == [(2, 1, 4), (2, 6, 4)]
