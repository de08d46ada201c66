"""Ten random layer hybrids: what holds for every mixer must hold for any pattern of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.build import build
from hydrax.models import cost, lm
from hydrax.models.spec import ModelConfig, group, resolve
from tests.contract.cases import CHUNK, D, normal, segments, tiny
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

VOCABULARY = 67
FFNS = ["none", "swiglu", "geglu", "mlp", "relu2"]


def random_hybrid(seed: int) -> ModelConfig:
    """A pattern of 4 or 5 layers, repeated or not, over three mixers, one of them in a block of its own."""
    rng = np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(mixers.names())
    first, third, second = (str(order[(2 * seed + i) % len(order)]) for i in (0, 1, 5))
    patterns = [
        f"2*({first},{third})",
        f"{first},2*special,{second}",
        f"2*({first},special),{third}",
        f"fill(({first},special),5)",
        f"select([0,3],special,{first})",
    ]
    pattern = patterns[seed % len(patterns)]
    values = {
        "d_model": D,
        "pattern": pattern,
        "num_layers": 4 if pattern.startswith("select") else None,
        "vocab_size": VOCABULARY,
        "mixers": {name: tiny(name) for name in mixers.names()},
        "blocks": {"special": {"mixer": third, "options": tiny(third), "ffn": str(rng.choice(FFNS)), "ffn_dim": 24}},
        "ffn": str(rng.choice(FFNS)),
        "ffn_dim": 48,
        "tie": bool(rng.integers(2)),
        "logit_softcap": [None, 20.0][rng.integers(2)],
    }
    return build(ModelConfig, values)


@dataclasses.dataclass(frozen=True, eq=False)
class Hybrid:
    cfg: ModelConfig
    plan: lm.Blueprint
    initial: dict[str, jax.Array]
    params: dict[str, jax.Array]  # none of them zero


@functools.cache
def hybrid(seed: int) -> Hybrid:
    cfg = random_hybrid(seed)
    plan, rng = lm.blueprint(cfg), np.random.default_rng(seed)
    initial = jax.jit(plan.init)(jax.random.key(seed))
    params = {k: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for k, x in initial.items()}
    return Hybrid(cfg, plan, initial, params)


def label(seed: int) -> str:
    return f"{seed}:{'-'.join(layer.mixer for layer in resolve(random_hybrid(seed)))}"


EVERY_HYBRID = pytest.mark.parametrize("seed", range(10), ids=label)

# ------------------------------------------------------------------------------ forms, documents, causality, grouping

T = 37
LENGTHS = (1, CHUNK - 1, 1, CHUNK, 3)
ROWS = len(LENGTHS) + 1
COTANGENTS = 4


def tokens_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape).astype(np.int32)


def results(plan: lm.Blueprint, impl: str | None = None):
    """(params, tokens, seg, cotangents [n,B,T,vocab]) -> logits, parameter gradients for each cotangent."""

    @jax.jit
    def run(params, tokens, seg, cotangents):
        def logits(params):
            model = plan.merge(params)
            return model.logits(model.hidden(tokens, seg, impl=impl))[..., :VOCABULARY]

        y, pullback = jax.vjp(logits, params)
        return y, jax.vmap(lambda w: pullback(w.astype(y.dtype))[0])(cotangents)

    return run


@EVERY_HYBRID
def test_forms_documents_and_causality(seed: int):
    """One program for all of it: chunked = recurrent in fp64, packed = separate, the past ignores the future."""
    h = hybrid(seed)
    run = results(h.plan)
    tokens, weights = tokens_of(seed, sum(LENGTHS)), normal(seed, COTANGENTS, sum(LENGTHS), VOCABULARY)
    pad = T - sum(LENGTHS)
    packed_seg = np.zeros((ROWS, T), np.int32)
    packed_seg[0] = segments(LENGTHS, T)
    packed = (np.tile(np.pad(tokens, (0, pad)), (ROWS, 1)), packed_seg, spread([weights]))
    y, grads = run(h.params, *map(jnp.asarray, packed))

    with jax.enable_x64(True):
        wide = {k: jnp.asarray(x, jnp.float64) for k, x in h.params.items()}
        one = (packed[0][:1], packed[1][:1], packed[2][:, :1])
        y_ref, grads_ref = results(h.plan, "recurrent")(wide, *map(jnp.asarray, one))
    assert_close("logits of forms", y[0, : sum(LENGTHS)], y_ref[0, : sum(LENGTHS)], TOLERANCE["fp32_model"])
    assert_trees_close("gradient of forms", grads, grads_ref, TOLERANCE["fp32_model"])

    ends = np.cumsum(LENGTHS)
    alone = np.stack([np.pad(d, (0, T - len(d))) for d in np.split(tokens, ends[:-1])] + [tokens_of(1, T)])
    alone_seg = np.stack([segments((n,), T) for n in LENGTHS] + [np.zeros(T, np.int32)])
    pieces = np.split(weights, ends[:-1], axis=1)
    y_alone, grads_alone = run(h.params, *map(jnp.asarray, (alone, alone_seg, spread(pieces))))
    for i, piece in enumerate(np.split(np.asarray(y[0, : ends[-1]]), ends[:-1])):
        assert_close(f"logits of document {i}", piece, y_alone[i, : LENGTHS[i]], TOLERANCE["fp32_model"])
    assert_trees_close("gradient of documents", grads, grads_alone, TOLERANCE["fp32_model"])

    row = tokens_of(2, T)
    cuts = np.array([1, 8, CHUNK, CHUNK + 1, 2 * CHUNK, T - 1])
    changed = np.where(np.arange(T) < cuts[:, None], row, (row + 1 + tokens_of(3, T) % (VOCABULARY - 1)) % VOCABULARY)
    whole, nothing = jnp.ones((ROWS, T), jnp.int32), jnp.zeros((COTANGENTS, ROWS, T, VOCABULARY))
    y, _ = run(h.params, jnp.tile(row, (ROWS, 1)), whole, nothing)
    other, _ = run(h.params, jnp.asarray(changed), whole, nothing)
    for i, cut in enumerate(cuts):
        assert_equal(f"logits before {cut}", other[i, :cut], y[i, :cut])
        assert np.any(np.asarray(other[i, cut] != y[i, cut])), f"logits at {cut} do not depend on their own token"


def spread(pieces: list[np.ndarray]) -> np.ndarray:
    """Cotangents [n,T_i,vocab] in the rows of a batch [n,ROWS,T,vocab], zero elsewhere."""
    out = np.zeros((COTANGENTS, ROWS, T, VOCABULARY), np.float32)
    for i, piece in enumerate(pieces):
        out[:, i, : piece.shape[1]] = piece
    return out


@pytest.mark.parametrize("seed", [0, 3, 4, 7], ids=label)  # every mixer in a period that repeats
def test_scanned_layers_equal_unrolled_ones(seed: int):
    """The same key gives the same parameters and logits, however the layers are grouped."""
    h = hybrid(seed)
    unrolled = lm.blueprint(h.cfg, scan=False)
    tokens, seg = tokens_of(4, 2, T), np.stack([segments(LENGTHS, T), segments((20,), T)])
    params, apart = h.initial, jax.jit(unrolled.init)(jax.random.key(seed))
    want = {k: v for k, v in params.items() if not k.startswith("periods/")}
    for g_index, g in enumerate(group(resolve(h.cfg))):
        for i in range(len(g.period)):
            prefix = f"periods/{g_index}/blocks/{i}/"
            for r in range(g.repeats):
                layer = f"periods/{g.start + r * len(g.period) + i}/blocks/0/"
                want |= {k.replace(prefix, layer): v[r : r + 1] for k, v in params.items() if k.startswith(prefix)}
    assert want.keys() == apart.keys()
    for name, value in want.items():
        assert_close(name, apart[name], value, 1e-6)
    y = jax.jit(lambda p: h.plan.merge(p)(tokens, jnp.asarray(seg)))(params)
    y_apart = jax.jit(lambda p: unrolled.merge(p)(tokens, jnp.asarray(seg)))(want)
    assert_close("logits", y_apart, y, TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------------------ decoding

S = 21
SPLITS = np.arange(S + 1)
INDEX = SPLITS[:, None] + np.arange(S)
REST = np.minimum(INDEX, S - 1)


@EVERY_HYBRID
def test_prefill_then_steps_at_every_split(seed: int):
    """Row s of the batch prefills s tokens, right-padded, then decodes the others; finished rows step on padding."""
    h = hybrid(seed)
    tokens = tokens_of(seed, S)

    @jax.jit
    def decode(params, prefix, rest):
        model = h.plan.merge(params)
        first, cache = model.prefill(jnp.tile(tokens, (S + 1, 1)), model.init_cache(S + 1, S), prefix)

        def step(cache, inputs):
            logits, cache = model.step(inputs[0], cache, inputs[1])
            return cache, logits

        _, steps = jax.lax.scan(step, cache, (jnp.asarray(tokens[REST].T), rest.T))
        return first, jnp.moveaxis(steps, 0, 1)

    whole = jax.jit(lambda params, seg: h.plan.merge(params)(tokens[None], seg))
    for lengths in ((S,), (1, 8, 1, 6, 5)):
        seg = segments(lengths, S)
        prefix, rest = np.where(np.arange(S) < SPLITS[:, None], seg, 0), np.where(INDEX < S, seg[REST], 0)
        full = whole(h.params, seg[None])[0]
        first, steps = decode(h.params, prefix, rest)
        for s in SPLITS:
            assert_close(f"{lengths}: prefill of {s}", first[s, :s], full[:s], TOLERANCE["fp32_model"])
            assert_close(f"{lengths}: steps after {s}", steps[s, : S - s], full[s:], TOLERANCE["fp32_model"])


@EVERY_HYBRID
def test_cache_bytes_are_what_cost_says(seed: int):
    h = hybrid(seed)
    for max_len in (3, S, 100):
        cache = jax.eval_shape(lambda p, n=max_len: h.plan.merge(p).init_cache(5, n, jnp.bfloat16), h.params)
        priced = cost.cost(h.cfg, seq_len=max_len, batch=5)
        assert tree.nbytes(cache.layers) == priced.state_bytes + priced.kv_bytes


def test_the_ten_cover_every_mixer():
    layers = [layer for seed in range(10) for layer in resolve(random_hybrid(seed))]
    assert {layer.mixer for layer in layers} == set(mixers.names())
    assert {layer.ffn for layer in layers} >= {"none", "swiglu"}
    assert {random_hybrid(seed).tie for seed in range(10)} == {True, False}
    assert {random_hybrid(seed).logit_softcap for seed in range(10)} == {None, 20.0}
