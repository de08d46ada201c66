"""Influence against dropping keys for real, the choice of rules against all choices, and tiles counted one by one."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydrax
from hydrax.infer import neighbourhood, spans
from hydrax.infer.policy.base import masked
from hydrax.infer.policy.serve import attending, walk
from hydrax.mixers import Context

T, BLOCK = 12, 3


@pytest.fixture(scope="module")
def model():
    attn = {"heads": 4, "kv_heads": 2}
    lm = hydrax.build({"d_model": 32, "pattern": "2*attn", "mixers": {"attn": attn}, "vocab_size": 20}, seed=1)
    lm.embed.weight[...] *= 20
    return lm


def test_influence_is_what_dropping_a_key_costs_to_first_order(model):
    """The output moves a little towards that without the key: the slope is the sum over dropped pairs, one by one."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, T)))
    found = spans.influence(model, tokens, block=BLOCK)
    assert [x.shape for x in found] == [(2, 4, 4)] * 2

    def loss(amount, layer, head, query, block):
        """Of the last layer's output moved by `amount` towards those without each key of the block, summed."""

        def attend(seen, at):
            o = masked(seen, seen.visible())
            if at != layer:
                return o
            for j in range(BLOCK):
                key = block * BLOCK + j
                dropped = seen.visible() & (jnp.arange(T) != key)
                change = masked(seen, dropped) - o
                rows = (jnp.arange(T) // BLOCK == query)[:, None, None] & (jnp.arange(4) // 2 == head)[:, None]
                o = o + amount * jnp.where(rows & (jnp.arange(T) >= key)[:, None, None], change, 0)
            return o

        x, _ = walk(model, tokens, Context.of(tokens), attending(model, attend))
        logits = jax.nn.log_softmax(model.logits(x)[:, :-1, :20])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    for layer, head, query, block in [(0, 1, 3, 1), (1, 0, 2, 1), (1, 1, 3, 0)]:
        expected = slope(0.0, layer, head, query, block)
        assert abs(expected) > 1e-5
        np.testing.assert_allclose(found[layer][head, query, block], expected, rtol=2e-3)
    assert (found[0][:, 0, 1:] == 0).all(), "nothing is dropped in the future"


def test_blocks_of_a_rule():
    mask = spans.kept_blocks((8.0, 0.25), 32, 4)  # 2 + 2 blocks
    for n, m in np.ndindex(8, 8):
        assert mask[n, m] == (m <= n and (m == 0 or n - m < 4))
    assert spans.kept_blocks((0.0, 0.0), 32, 4).sum() == 8 + 7


def test_the_grid_has_no_rule_beyond_the_row():
    rules = spans.grid([128, 256], step=64, betas=5, longest=512)
    assert (0.0, 1.0) in rules
    assert (-64.0, 1.0) in rules
    assert all(0 < a + b * n <= n for a, b in rules for n in (128, 256, 512))
    assert (256.0, 0.0) not in rules


@pytest.mark.parametrize("seed", range(3))
def test_chosen_rules_fit_and_are_nearly_the_best(seed):
    rng = np.random.default_rng(seed)
    lengths, rules, budget = [32, 64], [(4.0, 0.0), (16.0, 0.0), (0.0, 0.5), (-16.0, 1.0), (0.0, 1.0)], 0.7
    influences = {n: [rng.exponential(size=(2, n // 4, n // 4)) * np.tri(n // 4) for _ in range(2)] for n in lengths}
    chosen = spans.choose(influences, rules, block=4, budget=budget)
    assert [len(layer) for layer in chosen] == [2, 2]

    def price(choice):
        total, densities = 0.0, np.zeros(2)
        for i, rule in enumerate(choice):
            for j, n in enumerate(lengths):
                mask = spans.kept_blocks(rule, n, 4)
                total += influences[n][i // 2][i % 2][~mask].sum()
                densities[j] += mask.sum() / np.tri(n // 4).sum() / 4
        return total, (densities <= budget + 1e-9).all()

    total, fits = price([rule for layer in chosen for rule in layer])
    assert fits
    best = min(cost for cost, ok in map(price, itertools.product(rules, repeat=4)) if ok)
    narrow, _ = price([rules[0]] * 4)
    assert best <= total <= best + 0.15 * (narrow - best)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="no rules within the budget"):
        spans.choose({16: [np.ones((2, 4, 4))]}, [(16.0, 0.0)], block=4, budget=0.5)


def test_the_file(tmp_path):
    spans.write(tmp_path / "spans.json", [[(64.0, 0.25), (0.0, 1.0)]])
    assert json.loads((tmp_path / "spans.json").read_text()) == {"layers": [[[64.0, 0.25], [0.0, 1.0]]]}


# ------------------------------------------------------------------------------------------------- neighbourhoods


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "w", "s", "delta"), [(24, 8, 4, 1), (23, 6, 1, 1), (29, 6, 3, 2), (16, 16, 16, 1)])
def test_tiles_are_those_of_the_mask(causal, T, w, s, delta):
    tq, tkv, touched, pairs = 4, 2, 0, 0
    for r in range(delta):
        n = len(range(r, T, delta))
        mask = np.zeros((n, n), bool)
        for t in range(n):
            if causal:
                leader = t // s * s + s - 1
                mask[t, max(leader - w + 1, 0) : t + 1] = True
            else:
                first = min(max(min(t // s * s + s // 2, n - 1) - w // 2, 0), max(n - w, 0))
                mask[t, first : first + w] = True
                assert mask[t].sum() == min(w, n)
        pairs += mask.sum()
        tiles = [mask[i : i + tq, j : j + tkv] for i in range(0, n, tq) for j in range(0, n, tkv)]
        touched += sum(tile.any() for tile in tiles)
    full = np.tri(T, dtype=bool) if causal else np.ones((T, T), bool)
    dense = sum(full[i : i + tq, j : j + tkv].any() for i in range(0, T, tq) for j in range(0, T, tkv))
    found = neighbourhood.sim(T, w, s, delta, causal, tq, tkv)
    np.testing.assert_allclose([found.tiles, found.flops], [dense / touched, full.sum() / pairs])
    np.testing.assert_allclose(found.waste, found.flops / found.tiles)


@pytest.mark.parametrize(
    ("w", "s", "tq", "tkv", "sparse"),
    [(32, 16, 8, 8, True), (32, 8, 8, 8, True), (32, 8, 16, 8, False), (24, 8, 8, 16, False)],
)
def test_strides_of_whole_tiles_are_block_sparse(w, s, tq, tkv, sparse):
    assert neighbourhood.sim(128, w, s, 1, True, tq, tkv).block_sparse == sparse


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="s <= w"):
        neighbourhood.sim(16, 4, 8, 1, True, 4, 4)
