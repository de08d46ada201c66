"""Every policy: all keys = the model, steps = prefill, the past alone; and each against its own definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydrax
from hydrax.core.build import ConfigError
from hydrax.infer import policy as policies
from hydrax.infer.policy import dhsa, reuse
from hydrax.infer.policy.base import Policy, Seen, masked, top
from hydrax.infer.policy.report import report
from hydrax.infer.policy.serve import Served, attending, walk
from hydrax.mixers import Context
from hydrax.nn.attention import AttentionConfig
from hydrax.nn.position import rope
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T = 28
SMALL = {
    "accumulated": "accumulated:fraction=0.7,recent=3",
    "dhsa": "dhsa:count=6,window=4,longest=6,reach=2",
    "hip": "hip:nodes=2,leaf=2,query_block=4,window=4,sink_tokens=1",
    "hylra": "hylra:anchors=(0,2),count=5",
    "lychee": "lychee:retrieval=((1,),()),count=5",
    "sparge": "sparge:query_block=8,key_block=4,mass=0.3,alike=-1,sink=false",
    "sparge_skip": "sparge:query_block=8,key_block=4,mass=0.6,skip=-0.5",
    "star": "star:block=4,context=24",
    "streaming": "streaming:window=8,sink_tokens=2",
}
"""Policies that leave much out."""

ALL = {
    "accumulated": "accumulated:fraction=0",
    "dhsa": "dhsa:count=64",
    "hip": "hip:nodes=64,query_block=4,window=4",
    "hylra": "hylra:anchors=(0,1,2)",
    "lychee": "lychee:count=64",
    "sparge": "sparge:query_block=8,key_block=4,mass=1",
    "star": "star:block=8,context=0",
    "streaming": "streaming:window=64",
}
"""Policies that leave nothing out."""

SHARED = {"hip", "sparge", "sparge_skip"}
"""Policies whose queries share a choice with later ones of their block: a prompt is not what its tokens are alone."""


@pytest.fixture(scope="module")
def model():
    options = {"attn": {"heads": 4, "kv_heads": 2, "rope": {"theta": 100.0}}, "gla": {"heads": 2}}
    cfg = {"d_model": 32, "pattern": "attn,gla,2*attn", "mixers": options, "vocab_size": 50}
    lm = hydrax.build(cfg, seed=1)
    lm.embed.weight[...] *= 20  # scores that tell keys apart
    return lm


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, T)), jnp.int32)


@functools.cache
def compiled(model, text):
    served = Served(model, policies.of(text))
    return jax.jit(lambda x, ids: served.prefill(x, served.init_cache(x.shape[0], T), ids))


def prefill(model, tokens, text, segment_ids=None):
    return compiled(model, text)(tokens, jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids)


@pytest.mark.parametrize("name", ALL)
def test_a_policy_that_keeps_everything_is_the_model(model, tokens, name):
    assert_close("logits", prefill(model, tokens, ALL[name])[0], model(tokens), TOLERANCE["fp32_model"])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("streaming", "accumulated") else [pytest.mark.slow]) for n in SMALL]
)
def test_steps_continue_a_prompt(model, tokens, name):
    """Prefill of a part and steps are the pass over all, where queries do not share their choice."""
    served = Served(model, policies.of(SMALL[name]))
    whole, end = prefill(model, tokens, SMALL[name])
    first = 1 if name in SHARED else 20
    known = jnp.broadcast_to(jnp.arange(T) < first, tokens.shape).astype(jnp.int32)
    _, cache = prefill(model, tokens, SMALL[name], known)

    @jax.jit
    def steps(cache, rest):
        return jax.lax.scan(lambda c, x: served.step(x, c)[::-1], cache, rest.T)

    cache, made = steps(cache, tokens[:, first:])
    assert np.isfinite(made).all()
    assert_equal("positions", cache.model.position, end.model.position)
    if name not in SHARED:
        assert_close("logits", jnp.moveaxis(made, 0, 1), whole[:, first:], TOLERANCE["fp32_model"])
    assert np.abs(np.asarray(whole - model(tokens))).max() > 1e-3, "nothing was left out"


@pytest.mark.parametrize("name", sorted(SMALL.keys() - SHARED))
def test_the_future_does_not_reach_the_past(model, tokens, name):
    other = tokens.at[:, 17:].set((tokens[:, 17:] + 7) % 50)
    (a, _), (b, _) = (prefill(model, x, SMALL[name]) for x in (tokens, other))
    assert_equal("logits", a[:, :17], b[:, :17])


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(model, tokens, name):
    lengths = jnp.array([T, 21])
    ids = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
    padded, cache = prefill(model, tokens, SMALL[name], ids)
    noisy, _ = prefill(model, jnp.where(ids == 0, 3, tokens), SMALL[name], ids)
    assert_equal("real tokens", padded[1, :21], noisy[1, :21])
    assert_equal("positions", cache.model.position, lengths)


def test_generate_chooses_from_what_is_served(model, tokens):
    """Text of a policy is that of its own passes, for prompts of different lengths."""
    text, ids = SMALL["streaming"], (jnp.arange(T) < jnp.array([20, 13])[:, None]).astype(jnp.int32)
    made = hydrax.generate(model, tokens[:, :20], max_new_tokens=3, temperature=0, policy=text, lengths=[20, 13])
    for i in range(3):
        logits, _ = prefill(model, tokens, text, ids)
        last = ids.sum(1) - 1
        np.testing.assert_array_equal(made[:, i], logits[jnp.arange(2), last].argmax(-1))
        tokens = tokens.at[jnp.arange(2), last + 1].set(made[:, i])
        ids = ids.at[jnp.arange(2), last + 1].set(1)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "dhsa" else pytest.mark.slow) for n in SMALL])
def test_the_report_of_what_is_left_out(model, tokens, name):
    found = report(model, tokens, policies.of(SMALL[name]))
    assert len(found.recall) == len(found.error) == 3
    assert min(found.density) < 0.9
    assert all(0 < r <= 1 + 1e-6 for r in found.recall)
    assert found.logits > 1e-3
    assert abs(found.loss - found.full_loss) < 1


def test_the_report_is_of_one_document_per_row(model, tokens):
    ids = np.where(np.arange(T) < 9, 1, [[1], [4]])
    with pytest.raises(ConfigError, match="segment_ids = '2 documents in row 1': expected one in each row"):
        report(model, tokens, policies.of("streaming"), ids)


def test_the_report_of_everything_is_perfect(model, tokens):
    found = report(model, tokens, policies.of(ALL["streaming"]))
    np.testing.assert_allclose([*found.recall, *found.density], 1, atol=1e-5)
    assert max(*found.error, found.logits) < TOLERANCE["fp32_model"]
    np.testing.assert_allclose(found.loss, found.full_loss, rtol=1e-5)


def test_the_report_against_numpy(model, tokens):
    """Recall of a window in the first layer, from the model's own weights."""

    @jax.jit
    def first_layer(tokens):
        caught = []

        def attend(seen, layer):
            caught.append((seen.q, jnp.repeat(seen.k, 2, axis=2)))
            return masked(seen, seen.visible())

        walk(model, tokens, Context.of(tokens), attending(model, attend))
        return caught[0]

    q, k = (np.asarray(x, np.float64) for x in first_layer(tokens))
    z = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(np.where(np.tri(T, dtype=bool), z, -np.inf))
    p /= p.sum(-1, keepdims=True)
    near = np.tri(T, dtype=bool) & ~np.tri(T, k=-4, dtype=bool)
    expected = (p * near).sum(-1).mean()
    found = report(model, tokens, policies.of("streaming:window=4,sink_tokens=0"))
    np.testing.assert_allclose(found.recall[0], expected, rtol=1e-5)
    np.testing.assert_allclose(found.density[0], near.sum() / np.tri(T).sum(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ one by one


def seen(seed: int = 0, B: int = 1, T: int = 32, H: int = 2, Hk: int = 1, K: int = 8) -> Seen:
    normal = np.random.default_rng(seed).normal
    q, k, v = (jnp.asarray(normal(size=(B, T, h, K)), jnp.float32) for h in (H, Hk, Hk))
    options = AttentionConfig(heads=H, kv_heads=Hk, key_dim=K, value_dim=K)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Seen(q, k, v, positions, jnp.ones((B, T), bool), options, 3)


def chosen(policy: Policy, s: Seen, layer: int = 0, handed=None, memory=None) -> np.ndarray:
    kept = policy.select(s, layer, handed, memory).kept & s.visible()
    return np.asarray(jnp.broadcast_to(kept, (s.q.shape[0], s.q.shape[2], s.q.shape[1], s.slots)))


def test_streaming_counts_positions_inside_of_the_cache():
    """The whole cache is turned again for every query, by its own places."""
    s, w, n = seen(T=24, H=1), 6, 2
    turned = s._replace(q=rope(s.q, s.positions), k=rope(s.k, s.positions))
    policy = policies.of(f"streaming:window={w},sink_tokens={n}")
    actual = policy.attend(turned, policy.select(turned, 0, None, None))
    for t in (0, 5, 6, 7, 8, 12, 23):
        held = [j for j in range(t + 1) if j < n or t - j < w]
        k = rope(s.k[:, jnp.array(held)], jnp.arange(len(held))[None])
        q = rope(s.q[:, t : t + 1], jnp.array([[len(held) - 1]]))
        p = jax.nn.softmax(jnp.einsum("btgk,bsgk->bts", q, k) / np.sqrt(8))
        expected = jnp.einsum("bts,bsgv->btgv", p, s.v[:, jnp.array(held)])
        assert_close(f"query {t}", actual[:, t : t + 1], expected, TOLERANCE["fp32_op"])


def test_hip_finds_the_range_of_the_one_key_that_matters():
    """Keys that point towards one another from far: the search goes down to the leaf with the key of the query."""
    s = seen(T=64, H=1)
    place = 38
    slope = -jnp.abs(jnp.arange(64.0) - place)[None, :, None, None]
    k = jnp.broadcast_to(slope, s.k.shape)
    s = s._replace(q=jnp.ones_like(s.q), k=k)
    policy = policies.of("hip:nodes=1,leaf=2,query_block=1,window=1,sink_tokens=0")
    kept = chosen(policy, s)[0, 0, 63]
    assert kept[place]
    assert kept.sum() <= 2 + 1


def test_hip_covers_a_short_past_and_keeps_its_budget():
    policy = policies.of("hip:nodes=4,leaf=2,query_block=2,window=2,sink_tokens=1")
    counts = chosen(policy, seen(T=64)).sum(-1)
    assert (counts[..., :8] == np.arange(1, 9)).all()
    assert (counts <= 4 * 2 + 2 + 2 + 1).all()
    assert (counts[..., 40:] >= 6).all()


def test_hylra_reads_the_best_keys_of_its_anchor():
    s, policy = seen(), policies.of("hylra:anchors=(0,2),count=4")
    first = policy.select(s, 0, None, None)
    assert chosen(policy, s).sum() == 2 * 32 * 33 / 2
    p = np.array(s.probabilities())
    p[..., np.arange(32), np.arange(32)] = np.inf
    best = np.argsort(-p, axis=-1)[..., :4]
    kept = chosen(policy, seen(1), 1, first.handed)
    for h, t in np.ndindex(2, 32):
        assert set(np.flatnonzero(kept[0, h, t])) == {j for j in best[0, h, t] if j <= t}


def brute(sensitivity, overlap, cost, threshold):
    L, best = len(sensitivity), (np.inf, ())
    for code in range(2 ** (L - 1)):
        anchors = [0] + [i for i in range(1, L) if code >> (i - 1) & 1]
        total = cost * len(anchors)
        for m in set(range(L)) - set(anchors):
            a = max(x for x in anchors if x < m)
            total += np.inf if sensitivity[m] > threshold else (1 - overlap[a, m]) * sensitivity[m]
        best = min(best, (total, tuple(anchors)))
    return best


@pytest.mark.parametrize("cost", [0.05, 0.2, 0.6])
def test_anchors_are_those_of_least_cost(cost):
    rng = np.random.default_rng(4)
    sensitivity, overlap = rng.random(7), rng.random((7, 7))
    found = reuse.plan_anchors(sensitivity, overlap, cost=cost, threshold=0.9)
    assert found == brute(sensitivity, overlap, cost, 0.9)[1]


def test_profile_of_layers(model, tokens):
    sensitivity, overlap = reuse.profile(model, tokens, count=6)
    assert sensitivity.shape == (3,)
    assert overlap.shape == (3, 3)
    assert (sensitivity > 0).all()
    np.testing.assert_allclose(np.diag(overlap), 1)
    assert ((overlap > 0) & (overlap <= 1)).all()
    everything = reuse.profile(model, tokens, count=T)
    assert everything[0].max() < 1e-4
    np.testing.assert_allclose(everything[1], 1)


def test_lychee_heads_inherit():
    s, policy = seen(), policies.of("lychee:retrieval=((1,),()),count=3")
    handed = policy.select(s, 0, None, None).handed
    second = policy.select(seen(1), 1, handed, None)
    kept = chosen(policy, seen(1), 1, handed)
    assert_equal("sparse head", kept[0, 0], np.asarray(handed & s.visible())[0, 0])
    assert_equal("retrieval head", kept[0, 1], np.tri(32, dtype=bool))
    assert_equal("handed on", second.handed[0, 0], handed[0, 0])
    assert (np.asarray(second.handed)[0, 1] != np.asarray(handed)[0, 1]).any()


def test_sparge_reads_the_blocks_of_the_highest_pooled_scores():
    s, C, b, mass = seen(T=32), 8, 4, 0.5
    kept = chosen(policies.of(f"sparge:query_block={C},key_block={b},mass={mass},alike=-1,sink=false"), s)
    q, k = np.asarray(s.q, np.float64)[0], np.repeat(np.asarray(s.k, np.float64), 2, axis=2)[0]
    for h, n in np.ndindex(2, 4):
        z = [q[n * C : (n + 1) * C, h].mean(0) @ k[m * b : (m + 1) * b, h].mean(0) / np.sqrt(8) for m in range(8)]
        past = [m for m in range(8) if m * b < (n + 1) * C]
        p = np.exp([z[m] for m in past]) / np.exp([z[m] for m in past]).sum()
        chosen_blocks, total = {m for m in past if (m + 1) * b > n * C}, 0.0
        for i in np.argsort(-p):
            if total < mass:
                chosen_blocks.add(past[i])
            total += p[i]
        t = (n + 1) * C - 1
        assert set(np.flatnonzero(kept[0, h, t]) // b) == chosen_blocks


def test_sparge_always_reads_blocks_whose_members_differ():
    s = seen(T=32)
    k = jnp.ones_like(s.k).at[:, 8:12].set(jnp.asarray([1.0, -1.0, 1.0, -1.0])[None, :, None, None])
    kept = chosen(policies.of("sparge:query_block=8,key_block=4,mass=0,alike=0.5"), s._replace(q=jnp.abs(s.q), k=k))
    assert set(np.flatnonzero(kept[0, 0, 31]) // 4) == {0, 2, 6, 7}  # sink, the one that differs, the diagonal


def test_sparge_leaves_out_values_but_not_weights():
    s, policy = seen(T=32, H=1), policies.of("sparge:query_block=4,key_block=4,mass=1,skip=-1.0")
    choice = policy.select(s, 0, None, None)
    actual = np.asarray(policy.attend(s, choice))
    z, v = np.array(s.scores())[0, 0].astype(np.float64), np.asarray(s.v)[0, :, 0]
    out, left_out = np.zeros((32, 8)), 0
    for n in range(8):
        rows = range(4 * n, 4 * n + 4)
        running = np.full(4, -np.inf)
        for m in range(n + 1):
            tile = np.where(np.tri(32, dtype=bool)[rows][:, 4 * m : 4 * m + 4], z[rows, 4 * m : 4 * m + 4], -np.inf)
            running = np.maximum(running, tile.max(1))
            if (tile.max(1) - running).max() > -1.0:
                out[rows] += np.exp(tile) @ v[4 * m : 4 * m + 4]
            else:
                left_out += 1
    out /= np.where(np.tri(32, dtype=bool), np.exp(z), 0).sum(1, keepdims=True)
    assert left_out > 0
    assert_close("o", actual[0, :, 0], out, TOLERANCE["fp32_op"])


def test_star_merges_what_the_blocks_give():
    s, policy = seen(T=32), policies.of("star:block=8,context=20")
    choice = policy.select(s, 0, None, None)
    kept = chosen(policy, s)[0, 0]
    for t in range(32):
        expected = {j for j in range(t + 1) if t >= 20 or j < 8 or j // 8 == t // 8}
        assert set(np.flatnonzero(kept[t])) == expected
    assert_close("o", policy.attend(s, choice), Policy.attend(policy, s, choice), TOLERANCE["fp32_op"])


def test_accumulated_is_an_eviction_of_one_token_at_a_time():
    """The definition, token by token, for the second layer of three."""
    policy = policies.of("accumulated:fraction=0.8,recent=2")
    a, b = seen(0, T=20), seen(1, T=20)
    start = policy.start([a.options] * 3, 1, 20)
    first = policy.select(a, 0, None, start)
    assert chosen(policy, a, memory=start).sum() == 2 * 20 * 21 / 2
    kept = chosen(policy, b, 1, first.handed, start)
    p = np.asarray(a.probabilities(), np.float64)[0].sum(0)
    held: set[int] = set()
    for t in range(20):
        held.add(t)
        importance = p[: t + 1].sum(0)
        allowed = int(np.ceil((1 - np.float32(0.4)) * np.float32(t + 1)))
        for j in sorted(held, key=lambda j: importance[j]):
            if len(held) > allowed and j <= t - 2:
                held.discard(j)
        assert set(np.flatnonzero(kept[0, 0, t])) == held


def test_dhsa_chunks_are_where_keys_change():
    s = seen(T=32, H=1)
    directions = jnp.repeat(jnp.asarray([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), 8, axis=0)
    k = jnp.zeros_like(s.k).at[0, :, 0, :2].set(directions)
    q = jnp.zeros_like(s.q).at[..., 0].set(-1.0)  # looks for the second stretch
    policy = policies.of("dhsa:count=8,window=1,longest=32,reach=1,below=0.5")
    kept = chosen(policy, s._replace(q=q, k=k))[0, 0]
    assert set(np.flatnonzero(kept[31])) == {*range(8, 16), *range(24, 32)}  # the last chunk is still open


def test_the_predictor_learns_where_keys_change(tmp_path, model, tokens):
    rng = np.random.default_rng(0)
    level = np.cumsum(rng.random((8, 64)) < 0.15, axis=1)
    centres = rng.normal(size=(64, 1, 8))
    keys = jnp.asarray(centres[level] + 0.2 * rng.normal(size=(8, 64, 1, 8)), jnp.float32)
    params, losses = dhsa.train_predictor(keys, reach=2, below=0.5)
    assert losses[-1] < 0.3 * losses[0]
    labels = np.asarray(dhsa.similarity(keys, 2) < 0.5)
    assert 0.1 < labels.mean() < 0.6
    assert ((np.asarray(dhsa.boundary_logits(params, keys, 2)) > 0) == labels).mean() > 0.95
    dhsa.save(params, tmp_path / "boundaries.npz")
    policy = policies.of(f"dhsa:count=6,window=2,longest=8,reach=2,predictor={tmp_path / 'boundaries.npz'}")
    s = seen(T=64, H=1)._replace(k=keys[:1])
    ends = np.asarray(dhsa._chunks(policy._boundaries(keys[:1]), jnp.ones((1, 64), bool), 8)[1])
    assert len(np.unique(ends)) >= 64 // 8
    assert chosen(policy, s)[0, 0, -1].sum() <= 6 + 2 + 8 + 2


def test_top_prefers_the_earlier_of_equals():
    assert_equal("ties", top(jnp.array([1.0, 2, 1, 1]), 2), np.array([True, True, False, False]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o", "expected one of accumulated"),
        ("streaming:windows=3", "did you mean 'window'"),
        ("streaming:window=0", "integer >= 1"),
        ("streaming:8", "expected <option>=<value>"),
        ("hip:window=4", "at least query_block"),
        ("hylra:anchors=(1,2)", "the first of them 0"),
    ],
)
def test_wrong_policies_end_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        policies.of(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["hylra:anchors=(0,9)", "lychee:retrieval=((7,),())", "lychee:retrieval=((),)"])
def test_policies_that_do_not_suit_the_model_are_refused(model, tokens, text):
    with pytest.raises(ConfigError):
        hydrax.generate(model, tokens, max_new_tokens=1, policy=text)


@functools.cache
def recurrent():
    return hydrax.build({"d_model": 32, "pattern": "gla", "mixers": {"gla": {"heads": 2}}})


def test_a_model_without_softmax_layers_is_refused():
    with pytest.raises(ConfigError, match="attn layers"):
        hydrax.generate(recurrent(), np.ones((1, 3), int), max_new_tokens=1, policy="hip")
