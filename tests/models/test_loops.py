"""Layers that are run several times: against a plain loop, against copies of the layers, and what decoding keeps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core import tree
from hydrax.core.typing import Array
from hydrax.models import cost
from tests.models.small import (
    D,
    Params,
    below,
    config,
    drawn,
    fp64,
    in_pieces,
    layers,
    plan,
    rms,
    swa_layer,
    tokens,
    unstacked,
    visible,
)
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

T = 20
IDS = tokens(2, T)
SEG = np.asarray([[1] * T, [1] * 7 + [2] * 11 + [0] * 2], np.int32)
POSITIONS = np.asarray([[*range(T)], [*range(7), *range(11), 0, 1]])
WINDOW = 4


def hidden(made: Any, params: Params) -> Array:
    return jax.jit(lambda p: made.merge(p).hidden(IDS, jnp.asarray(SEG)))(params)


# ------------------------------------------------------------------------------------------------------- plain loops


def looped(
    params: Params, sections: list[tuple[int, list[list[int]]]], norm: str = "none", block: int = 1
) -> np.ndarray:
    """The hidden states of a model of swa layers without FFN.

    `sections` are (first layer, for every pass the windows of its layers); parameters are those of `scan=False`.
    Every `block` layers may have a gate.
    """
    p = fp64(params)
    x = p["embed/weight"][IDS]
    for i, (first, passes) in enumerate(sections):
        for n, windows in enumerate(passes):
            entry = x
            for j, window in enumerate(windows):
                own = below(p, f"periods/{first + j}/")
                before = x if j % block == 0 else before
                seen = visible(POSITIONS, SEG, window)
                x, _ = swa_layer({k: v[0] for k, v in below(own, "blocks/0/").items()}, x, POSITIONS, seen)
                x = x + own.get("gates/0", np.zeros(1))[0] * before
            if norm == "final" and len(passes) > 1:
                x = rms(x, p["norm/weight"])
            x = x + p.get(f"passes/{i}/gates", np.zeros((len(passes), 1)))[n] * entry
    return x if norm == "final" and len(sections[-1][1]) > 1 else rms(x, p["norm/weight"])


@pytest.mark.parametrize("norm", ["none", "final"])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_passes_follow_one_another(gate: str, norm: str):
    """h^τ = F(h^{τ-1}) + ρ_τ h^{τ-1}, with the model's last norm after F of every pass if norm = final."""
    made = plan("swa,swa", ffn="none", loop={"n": 3, "gate": gate, "norm": norm}, scan=False)
    params = drawn(made.shapes)
    want = looped(params, [(0, [[WINDOW] * 2] * 3)], norm)
    assert_close("hidden", hidden(made, params), want, TOLERANCE["fp32_model"])


FAR = {"far": {"mixer": "swa", "options": {"window": 7}}}
BLOCKED = {
    "every layer": ("3*swa", 1, ["0"], [3]),
    "what repeats": ("2*(swa,far)", 2, ["1"], [2]),
    "a block of two periods": ("5*swa", 2, ["1", "0"], [2, 1]),
    "all, over groups of its own": ("far,4*swa,far", 6, ["0"], [1]),
    "the last is shorter": ("far,4*swa", 3, ["0", "0"], [1, 1]),
}
"""Pattern, layers of a block; in which layers of which periods gates are, and how often these occur."""


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("case", BLOCKED)
def test_every_block_of_layers_keeps_some_of_what_came_in(case: str, scan: bool):
    """h <- h + η h_before, a scalar for every block of layers, the same in all passes and however layers are run."""
    pattern, block, places, repeats = BLOCKED[case]
    options = {"ffn": "none", "loop": {"n": 2, "block_gate": block, "gate": "scalar"}, "blocks": FAR}
    made, apart = plan(pattern, **options), plan(pattern, scan=False, **options)
    params = drawn(made.shapes)
    gates = {path: p for path, p in params.items() if "/gates/" in path and path.startswith("periods")}
    assert [path.split("/")[-1] for path in gates] == places
    assert [p.shape for p in gates.values()] == [(n,) for n in repeats]
    by_layer = unstacked(made, params)
    windows = [7 if layer.block == "far" else WINDOW for layer in layers(pattern, **options)]
    run, own = (made, params) if scan else (apart, by_layer)
    want = looped(by_layer, [(0, [windows] * 2)], block=block)
    assert_close("hidden", hidden(run, own), want, TOLERANCE["fp32_model"])


@pytest.mark.parametrize("norm", ["none", "final"])
def test_passes_may_see_further_than_others(norm: str):
    windows = [2, 5, 5, 3]
    per_loop = [{"swa": {"window": w}} for w in windows]
    made = plan("2*swa", ffn="none", loop={"n": 4, "gate": "channel", "norm": norm, "per_loop": per_loop}, scan=False)
    params = drawn(made.shapes)
    want = looped(params, [(0, [[w] * 2 for w in windows])], norm)
    assert_close("hidden", hidden(made, params), want, TOLERANCE["fp32_model"])


def test_a_loop_in_the_middle():
    """Layers before and after it are run once; all sections have gates."""
    per_loop = [{"swa": {"window": 3}}, {}]
    made = plan("swa,loop(2,2*swa),swa", ffn="none", loop={"gate": "scalar", "per_loop": per_loop}, scan=False)
    params = drawn(made.shapes)
    assert [params[f"passes/{i}/gates"].shape for i in range(3)] == [(1, 1), (2, 1), (1, 1)]
    want = looped(params, [(0, [[WINDOW]]), (1, [[3, 3], [WINDOW, WINDOW]]), (3, [[WINDOW]])])
    assert_close("hidden", hidden(made, params), want, TOLERANCE["fp32_model"])


# ---------------------------------------------------------------------------------------------------- plain stacks


BLOCKS = {"chosen": {"mixer": "route(attn,swa)", "options": {"prefix": 3, "width": 4, "weight": 1.0}}}


def test_one_pass_without_gates_is_the_plain_stack():
    values = {"ffn": "mlp"}
    once = plan("2*(swa,attn)", loop={"n": 1, "gate": "channel", "block_gate": 2, "norm": "final"}, **values)
    plain = plan("2*(swa,attn)", **values)
    params = drawn(plain.shapes)
    gates = {path: jnp.zeros(s.shape) for path, s in once.shapes.items() if path not in params}
    assert {path: g.shape for path, g in gates.items()} == {"passes/0/gates": (1, D), "periods/0/gates/1": (2,)}
    assert_equal("hidden", hidden(once, params | gates), hidden(plain, params))


@pytest.mark.parametrize("name", ["gla", "chosen"])
def test_passes_are_copies_of_the_layers(name: str):
    """Every pass starts its recurrences from nothing, and adds its losses."""
    made, copies = plan(name, loop={"n": 3}, blocks=BLOCKS), plan(f"3*{name}", blocks=BLOCKS)
    params = drawn(made.shapes)
    copied = {path: jnp.tile(p, (3, *[1] * (p.ndim - 1))) if "periods" in path else p for path, p in params.items()}
    run = lambda plan: jax.jit(lambda p: plan.merge(p).forward(IDS, jnp.asarray(SEG)))  # noqa: E731
    (x, losses), (want, lost) = run(made)(params), run(copies)(copied)
    assert_close("hidden", x, want, TOLERANCE["fp32_model"])
    assert losses.keys() == lost.keys() == ({"route"} if name == "chosen" else set())
    for loss, value in lost.items():
        assert_close(loss, losses[loss], value, TOLERANCE["fp32_model"])


def test_losses_of_layers_add_in_a_scan_or_not():
    made, apart = (plan("2*chosen", blocks=BLOCKS, scan=scan) for scan in (True, False))
    params = drawn(made.shapes)
    run = lambda plan, p: jax.jit(lambda p: plan.merge(p).forward(IDS, jnp.asarray(SEG))[1]["route"])(p)  # noqa: E731
    assert_close("loss", run(made, params), run(apart, unstacked(made, params)), TOLERANCE["fp32_model"])


def test_parameters_do_not_depend_on_the_number_of_passes():
    def counted(gate: str, n: int, block_gate: int = 0) -> int:
        loop = {"n": n, "gate": gate, "block_gate": block_gate}
        return cost.cost(config("2*(swa,gla),attn", loop=loop), seq_len=8).parameters

    plain = counted("none", 1)
    assert [counted("none", n) for n in (2, 5)] == [plain] * 2
    assert [counted("scalar", n) - plain for n in (1, 3)] == [1, 3]
    assert [counted("channel", n) - plain for n in (1, 3)] == [D, 3 * D]
    assert counted("none", 3, block_gate=2) - plain == 3  # two blocks of two layers, and one layer


@pytest.mark.parametrize(("n", "depth", "window"), [(1, 2, 4), (2, 2, 4), (3, 1, 5)])
def test_windows_reach_further_with_every_pass(n: int, depth: int, window: int):
    """The last token sees N·L·(W - 1) + 1 tokens: gradients reach these embeddings and no others."""
    made = plan(f"{depth}*swa", ffn="none", loop={"n": n}, mixers={"swa": {"heads": 2, "key_dim": 4, "window": window}})
    params, ids = drawn(made.shapes), np.arange(T)[None]
    table = jax.jit(jax.grad(lambda p: made.merge(p).hidden(ids)[0, -1].sum()))(params)["embed/weight"]
    reached = np.flatnonzero(np.abs(table[:T]).sum(1))
    assert reached.tolist() == list(range(T - (n * depth * (window - 1) + 1), T))


# ---------------------------------------------------------------------------------------------------------- decoding


DECODED: dict[str, dict[str, Any]] = {
    "growing": {"pattern": "2*swa", "loop": {"n": 3, "per_loop": [{}, {"swa": {"window": 9}}, {"swa": {"window": 2}}]}},
    "middle": {"pattern": "attn,loop(2,swa,gla),swa", "loop": {"gate": "channel", "block_gate": 1}},
}


@functools.cache
def cached(name: str) -> Any:
    return plan(**{"ffn": "none", **DECODED[name]})


@pytest.mark.parametrize("name", DECODED)
def test_every_pass_has_a_cache(name: str):
    """Prefill and steps continue each pass where it was: T tokens in pieces are T tokens at once."""
    made = cached(name)
    params = drawn(made.shapes)
    whole = jax.jit(lambda p: made.merge(p)(IDS))(params)
    assert_close("logits", in_pieces(made, params, IDS, 6), whole, TOLERANCE["fp32_model"])


@pytest.mark.parametrize("name", DECODED)
def test_the_caches_of_all_passes_are_counted(name: str):
    made = cached(name)
    cache = jax.eval_shape(lambda p: made.merge(p).init_cache(3, T, jnp.bfloat16), made.shapes)
    priced = cost.cost(made.cfg, seq_len=T, batch=3)
    assert tree.nbytes(cache.layers) == priced.state_bytes + priced.kv_bytes
    if name == "growing":
        shapes = {leaf.shape for leaf in jax.tree.leaves(cache.layers)}
        assert shapes == {(3, 2, 3, 9, 2, 4), (3, 2, 3, 9)}  # passes, layers, rows, the widest window
