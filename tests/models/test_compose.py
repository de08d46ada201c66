"""From compositions, shared blocks, groups and loops to resolved layers, and what their mistakes are told."""

import re
from typing import Any

import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.models.fusion import Heads, Parallel
from hydrax.models.layers import groups
from hydrax.models.mix import Single
from hydrax.models.modes import READABLE, Modes
from hydrax.models.route import Route
from hydrax.models.spec import sections
from tests.models.small import D, config, layers


def refused(message: str, pattern: str, **values: Any) -> None:
    """The model is refused in one line that contains `message`."""
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        config(pattern, **values)
    assert "\n" not in str(error.value)


def block(mixer: str, **values: Any) -> dict[str, Any]:
    return {"blocks": {"x": {"mixer": mixer, **values}}}


# -------------------------------------------------------------------------------------------------------------- heads


def order(layer: Any) -> dict[int, tuple[int, ...]]:
    """By layer, the heads of the parts, one part after the other."""
    return dict(layer.mix.orders)


@pytest.mark.parametrize(
    ("mixer", "options", "counts", "heads"),
    [
        ("heads(2*attn,6*gla)", {}, [2, 6], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("heads(attn,3*gla)", {}, [1, 3], [0, 1, 2, 3]),  # a part without a number is one head
        ("heads(4*attn)", {}, [4], [0, 1, 2, 3]),
        ("heads(attn[1,3],gla[0,2])", {}, [2, 2], [1, 3, 0, 2]),
        ("heads(attn[3,1],gla[0,2])", {}, [2, 2], [3, 1, 0, 2]),  # pinned heads keep their order
        ("heads(attn[0,5],6*gla)", {}, [2, 6], [0, 5, 1, 2, 3, 4, 6, 7]),
        ("heads(gla,attn[0,2])", {"total": 8}, [6, 2], [1, 3, 4, 5, 6, 7, 0, 2]),
        ("heads(2*swa,attn[1],gla)", {"total": 8}, [2, 1, 5], [0, 2, 1, 3, 4, 5, 6, 7]),
        ("heads(attn,gla)", {"total": 8}, [4, 4], list(range(8))),  # those without a number share what is left
    ],
)
def test_heads_are_parted(mixer: str, options: dict, counts: list[int], heads: list[int]):
    (layer,) = layers("x", **block(mixer, options=options), mixers={"attn": {}, "swa": {}, "gla": {}})
    assert isinstance(layer.mix, Heads)
    assert [part.options.heads for part in layer.mix.members] == counts
    # every head has the layer's width over its number of heads, unless options say otherwise
    assert {(part.options.key_dim, part.options.value_dim) for part in layer.mix.members} == {(D // len(heads),) * 2}
    assert order(layer) == {0: tuple(heads)}
    assert layer.mixer == f"heads({','.join(part.mixer for part in layer.mix.members)})"


def test_an_assignment_gives_every_layer_its_own_heads():
    options = {"total": 4, "assignment": [[0], [3], [1, 2], [2]]}
    found = layers("x,gla,2*x,swa,x", **block("heads(attn,gla)", options=options))
    assert [order(found[i])[i] for i in (0, 2, 3, 5)] == [(0, 1, 2, 3), (3, 0, 1, 2), (1, 2, 0, 3), (2, 0, 1, 3)]
    # layers with as many heads of each kind are equal, and can be scanned; others cannot
    assert found[0] == found[2] == found[5] != found[3]
    assert [[part.options.heads for part in found[i].mix.members] for i in (0, 3)] == [[1, 3], [2, 2]]


def test_options_of_parts_come_from_blocks_and_mixers():
    blocks = {"x": {"mixer": "heads(2*wide,2*gla)"}, "wide": {"mixer": "attn", "options": {"key_dim": 6, "heads": 7}}}
    (layer,) = layers("x", blocks=blocks, mixers={"gla": {"gate_rank": 5}, "attn": {"value_dim": 4}})
    first, second = (part.options for part in layer.mix.members)
    assert (first.heads, first.key_dim, first.value_dim) == (2, 6, 4)  # the composition says how many heads
    assert (second.heads, second.value_dim, second.gate_rank) == (2, 4, 5)


PARTED = [
    n
    for n in mixers.names()
    if {"heads", "value_dim"} <= set(mixers.get(n).Config.__dataclass_fields__) and not mixers.get(n).NORMS_INPUT
]


@pytest.mark.parametrize("name", PARTED)
def test_every_mixer_with_heads_can_be_a_part(name: str):
    """It gets as many heads as the composition says, and as many values per head as the others."""
    (layer,) = layers(f"heads(3*{name},attn)", mixers={"attn": {}, "swa": {}, "gla": {}}, d_model=32)
    mixer = nnx.eval_shape(lambda: layer.mix.build(32, rngs=nnx.Rngs(0)))
    assert mixer.shapes == ((3, 8), (1, 8))
    assert mixer.project.kernel.shape == (4, 8, 32)


def test_every_mixer_with_heads_is_among_them():
    assert set(mixers.names()) - set(PARTED) == {
        "gated_conv", "gecko", "hgrn", "mamba", "mega", "megalodon", "mlp", "rat", "short_long_conv", "token_gate"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("heads(attn[0,1],gla[1,2])", {}, "every head from 0 to 3 in one part, and found attn [0, 1], gla [1, 2]"),
        ("heads(attn[0,1],gla[1,1])", {}, "every head from 0 to 3 in one part, and found attn [0, 1], gla [1, 1]"),
        ("heads(attn[0,1],gla[2,4])", {}, "every head from 0 to 3 in one part, and found attn [0, 1], gla [2, 4]"),
        ("heads(attn[0,9],2*gla)", {}, "every head from 0 to 3 in one part, and found attn [0, 9], gla [1, 2]"),
        ("heads(2*attn,gla)", {"total": 2}, "every head from 0 to 1 in one part, and found attn [0, 1], gla []"),
        ("heads(2*attn,2*gla)", {"total": 8}, "every head from 0 to 7 in one part, and found attn [0, 1], gla [2, 3]"),
        ("heads(attn,gla,swa)", {"total": 8}, "every head from 0 to 7 in one part, and found attn [0, 1], gla [2, 3]"),
        ("heads(2*attn,gla)", {}, "expected a number of heads that divides 16, and not 3"),
        ("heads(attn,gla)", {"total": 0}, "blocks.x.options.total = 0: expected an integer >= 1"),
        ("heads(attn,gla)", {"totl": 4}, "blocks.x.options.totl = 4: unknown key; did you mean 'total'"),
        (
            "heads(attn,gla)",
            {"assignment": [[0]]},
            "blocks.x.options.assignment = 'heads(attn,gla)': needs heads(first",
        ),
        ("heads(2*attn,gla)", {"assignment": [[0]], "total": 4}, "assignment = 'heads(2*attn,gla)': needs heads(first"),
        ("heads(attn,gla,swa)", {"assignment": [[0]], "total": 4}, "needs heads(first, second) and total"),
        (
            "heads(attn,gla)",
            {"assignment": [[4]], "total": 4},
            "from 0 to 3 in one part, and found attn [4], gla [0, 1",
        ),
        (
            "heads(attn,gla)",
            {"assignment": [[1, 1]], "total": 4},
            "from 0 to 3 in one part, and found attn [1, 1], gla",
        ),
        ("heads(attn,gla)", {"assignment": [[]], "total": 4}, "every head from 0 to 3 in one part, and found attn []"),
        ("heads(attn,gla)", {"assignment": [[0, 1, 2, 3]], "total": 4}, "and found attn [0, 1, 2, 3], gla []"),
        ("heads(2*attn,2*hgrn)", {}, "pattern = 'hgrn': this mixer has no heads to be split"),
        ("heads(2*attn,2*foo)", {}, "blocks.x.mixer = 'foo': expected parts among x, wide, grouped, aaren"),
        ("heads(attn,parallel(attn,gla))", {"total": 2}, "expected single mixers as the parts of heads(...)"),
        ("heads(2*attn,2*wide)", {}, "heads must have the same value_dim, and have attn 4, gla 8"),
        ("heads(2*gla,2*wide)", {}, "heads must have the same value_dim, and have gla 4, gla 8"),
        ("heads(2*attn,2*grouped)", {}, "expected attn 2, gdn 2 heads, and options make attn 2, gdn 4"),
        (
            "heads(2*attn,2*gla)",
            {"fusion": "sum"},
            "blocks.x.options.fusion = 'sum': expected one of concat, mean_norm",
        ),
        (
            "heads(2*attn,2*gla)",
            {"weights": [1.0, 1.0]},
            "options.weights = (1.0, 1.0): expected one per part, 2 in all",
        ),
        ("heads(2*attn,2*gla)", {"weights": [1.0], "fusion": "weighted"}, "weights = (1.0,): expected one per part, 2"),
        ("heads(2*attn,2*gla)", {"learned": True}, "options.learned = True: needs fusion = weighted, and it is scale_"),
    ],
)
def test_heads_that_do_not_add_up(mixer: str, options: dict, message: str):
    parts = {
        "wide": {"mixer": "gla", "options": {"value_dim": 8}},
        "grouped": {"mixer": "gdn", "options": {"value_heads": 4, "value_dim": 4}},
    }
    refused(message, "x", blocks={"x": {"mixer": mixer, "options": options}, **parts})


def test_an_assignment_must_cover_every_layer():
    options = {"total": 4, "assignment": [[0], [3]]}
    message = "blocks.x.options.assignment = 2: expected heads for every layer of the block"
    refused(message, "3*x", **block("heads(attn,gla)", options=options))


# ----------------------------------------------------------------------------------------------- parallel, modes, route


def test_compositions_are_resolved_and_may_hold_others():
    blocks = {"thin": {"mixer": "gla", "options": {"gate_rank": 2}}}
    mixed, read, chosen = layers(
        "parallel(thin,heads(attn,gla)),modes(thin),route(attn,swa)",
        blocks=blocks,
        mixers={"attn": {}, "swa": {}, "gla": {"heads": 2}},
    )
    assert isinstance(mixed.mix, Parallel) and isinstance(read.mix, Modes) and isinstance(chosen.mix, Route)
    assert [mixed.mixer, read.mixer, chosen.mixer] == ["parallel(gla,heads(attn,gla))", "modes(gla)", "route(attn,swa)"]
    thin, heads = mixed.mix.members
    assert isinstance(heads, Heads) and heads.fusion.fusion == "scale_norm"
    assert mixed.mix.fusion.fusion == "mean_norm"
    assert thin == read.mix.members[0] == Single("gla", thin.options) and thin.options.gate_rank == 2
    assert (read.mix.options.default, read.mix.options.qk_norm, read.mix.options.rope.theta) == ("attn", "head", 1e4)
    assert mixed.options is mixed.mix


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("parallel(attn,wide)", {}, "parts that are added must be equally wide, and are attn 8, gla 16"),
        ("parallel(gla,wide)", {}, "parts that are added must be equally wide, and are gla 8, gla 16"),
        (
            "parallel(gla,wide)",
            {"fusion": "weighted", "weights": [1.0, 2.0]},
            "parts that are added must be equally wide",
        ),
        ("parallel(attn)", {}, "blocks.x.mixer = 'parallel(attn)': parallel takes at least 2 parts"),
        ("parallel(2*attn,gla)", {}, "parallel takes parts without numbers of heads"),
        ("parallel(attn[0],gla)", {}, "parallel takes parts without numbers of heads"),
        ("parallel(attn,foo)", {}, "blocks.x.mixer = 'foo': expected parts among x, wide, aaren"),
        (
            "parallel(attn,gla)",
            {"total": 2},
            "blocks.x.options.total = 2: unknown key; allowed: fusion, weights, learned",
        ),
        ("parallel(attn,gla)", {"weights": [1.0, 2.0]}, "expected one per part, 2 in all, and fusion = weighted"),
        ("modes(attn)", {}, f"expected modes of one of {', '.join(READABLE)}"),
        ("modes(hgrn)", {}, "expected modes of one of deltanet"),
        ("modes(parallel(gla,gla))", {}, "expected modes of one of deltanet"),
        ("modes(gla,gla)", {}, "modes takes 1 parts"),
        ("modes(gla)", {"default": "mixed"}, "blocks.x.options.default = 'mixed': expected one of attn, linear"),
        (
            "modes(gla)",
            {"chunk": 4},
            "blocks.x.options.chunk = 4: unknown key; allowed: default, qk_norm, rope, softcap",
        ),
        ("modes(gla)", {"qk_norm": "full"}, "blocks.x.options.qk_norm = 'full': expected one of none, head"),
        ("modes(gla)", {"softcap": 0}, "blocks.x.options.softcap = 0.0: expected a number > 0"),
        ("route(attn,swa,gla)", {}, "route takes 2 parts"),
        ("route(attn,wide)", {}, "both parts must be equally wide, and are attn 8, gla 16"),
        ("route(attn,swa)", {"prefix": 0}, "blocks.x.options.prefix = 0: expected an integer >= 1"),
        ("route(attn,swa)", {"target": 1.5}, "blocks.x.options.target = 1.5: expected a number from 0 to 1"),
        ("parallel(x,attn)", {}, "blocks.x = 'parallel(x,attn)': a block cannot be a part of itself"),
        ("route(attn,y)", {}, "blocks.x = 'route(attn,y)': a block cannot be a part of itself"),
    ],
)
def test_compositions_that_do_not_fit(mixer: str, options: dict, message: str):
    parts = {"wide": {"mixer": "gla", "options": {"value_dim": 8}}, "y": {"mixer": "modes(x)"}}
    if "y" not in message:
        parts.pop("y")
    refused(message, "x", blocks={"x": {"mixer": mixer, "options": options}, **parts})


def test_side_by_side_parts_may_be_unequally_wide():
    parts = {"wide": {"mixer": "gla", "options": {"value_dim": 8}}}
    (layer,) = layers("x", blocks={"x": {"mixer": "parallel(attn,wide)", "options": {"fusion": "concat"}}, **parts})
    mixer = nnx.eval_shape(lambda: layer.mix.build(D, rngs=nnx.Rngs(0)))
    assert mixer.project.kernel.shape == (1, 8 + 16, D)


def test_a_mistake_in_a_composition_of_the_pattern_names_the_pattern():
    refused("pattern = 'parallel(attn)': parallel takes at least 2 parts", "gla,parallel(attn)")
    refused("pattern = 'foo': expected parts among aaren", "route(foo,gla)")


def test_every_readable_mixer_can_be_of_two_modes():
    for name in READABLE:
        (layer,) = layers(f"modes({name})", d_model=32, mixers={name: dict(mixers.row(name).tiny)})
        H, K, V = layer.mix.heads()
        mixer = nnx.eval_shape(lambda mix=layer.mix: mix.build(32, rngs=nnx.Rngs(0)))
        assert mixer.q.kernel.shape == (32, H, K)
        assert mixer.project.shape_in == (H, V)


# ------------------------------------------------------------------------------------------------------ common weights


SHARED = {"x": {"mixer": "attn", "shared": True}}


@pytest.mark.parametrize(
    ("message", "pattern", "values"),
    [
        ("blocks.x.shared = True: its places differ", "2*x", {"blocks": SHARED, "ffn_pattern": "swiglu,mlp"}),
        ("blocks.x.shared = True: its places differ", "2*x", {"blocks": SHARED, "memory": {"pkm": {}, "every": 2}}),
        ("blocks.x.shared = True: its places differ", "2*x", {"blocks": SHARED, "share": {"kv": [[0, 1]]}}),
        (
            "blocks.x.shared = True: its places differ",
            "2*x",
            block("heads(attn,gla)", shared=True, options={"total": 4, "assignment": [[0], [1, 2]]}),
        ),
        ("blocks.x.lora_rank = 2: needs shared = true", "x", block("attn", lora_rank=2)),
        (
            "blocks.x.lora_on[0] = 'ffn.out': expected one of mixer, ffn, ffn.gate",
            "x",
            block("attn", lora_on=["ffn.out"]),
        ),
        (
            "blocks.x.feed = 'z': expected a block with shared = true and a dense ffn: x",
            "x",
            block("attn", feed="z", shared=True),
        ),
        ("blocks.y.feed = 'x'", "y", {"blocks": {"x": {"mixer": "attn"}, "y": {"mixer": "gla", "feed": "x"}}}),
        ("blocks.y.feed = 'x'", "y", {"blocks": SHARED | {"y": {"mixer": "gla", "feed": "x"}}, "ffn": "none"}),
        (
            "pattern = 'x,y': 'x' feeds other layers, and cannot be a layer as well",
            "x,y",
            {"blocks": SHARED | {"y": {"mixer": "gla", "feed": "x"}}},
        ),
    ],
)
def test_common_weights_that_cannot_be(message: str, pattern: str, values: dict):
    refused(message, pattern, **values)


def test_shared_layers_that_all_read_the_keys_of_another_are_equal():
    found = layers("attn,2*x", blocks=SHARED, share={"kv": [[0, 1, 2]]})
    assert [(layer.producer, layer.produces) for layer in found] == [(0, True), (1, False), (2, False)]
    assert [layer.options.kv for layer in found] == ["own", "shared", "shared"]


@pytest.mark.parametrize(
    ("message", "pattern", "kv"),
    [
        ("share.kv[0] = (1, 0): expected different layers below 3, the producer first", "3*attn", [[1, 0]]),
        ("share.kv[0] = (3,): expected different layers", "3*attn", [[3]]),
        ("share.kv[0] = (): expected different layers", "3*attn", [[]]),
        ("share.kv[0] = (1, 1): expected different layers", "3*attn", [[1, 1]]),
        ("share.kv[0] = (1, 3): expected different layers below 3", "3*attn", [[1, 3]]),
        ("share.kv[0][0] = -1: expected an integer >= 0", "3*attn", [[-1, 2]]),
        ("share.kv[1] = (1, 2): layer 1 is in another group already", "3*attn", [[0, 1], [1, 2]]),
        ("share.kv[0] = (0, 1): layer 1 is gla: expected one softmax mixer", "attn,gla", [[0, 1]]),
        ("share.kv[0] = (0, 1): layer 0 is gla: expected one softmax mixer", "gla,attn", [[0, 1]]),
        ("share.kv[0] = (0, 1): layer 1 is route(attn,swa): expected one softmax", "attn,route(attn,swa)", [[0, 1]]),
        ("layers 0 and 1 differ in window 4 and None; sink_tokens 0 and None", "attn,swa", [[0, 1]]),
        ("layers 0 and 1 differ in window 6 and 4", "swa,far", [[0, 1]]),
        ("layers 0 and 1 differ in sink_tokens 1 and 0", "swa,sinking", [[0, 1]]),
        (
            "layers 0 and 1 differ in rope Rope(theta=10.0, fraction=1.0, style='half') and Rope(",
            "attn,turned",
            [[0, 1]],
        ),
        ("layers 0 and 1 differ in kv_heads 1 and 2", "attn,grouped", [[0, 1]]),
        ("layers 0 and 1 differ in key_dim 6 and 4; value_dim 6 and 4", "attn,wide", [[0, 1]]),
        ("layers 0 and 1 differ in qk_norm head and none", "attn,normed", [[0, 1]]),
        ("layer 1 and its producer are not run in the same loop", "attn,loop(2,attn)", [[0, 1]]),
        ("layer 2 and its producer are not run in the same loop", "attn,loop(2,attn),attn", [[0, 2]]),
    ],
)
def test_groups_that_cannot_share_keys(message: str, pattern: str, kv: list):
    blocks = {
        "far": {"mixer": "swa", "options": {"window": 6}},
        "sinking": {"mixer": "swa", "options": {"sink_tokens": 1}},
        "turned": {"mixer": "attn", "options": {"rope": {"theta": 10.0}}},
        "grouped": {"mixer": "attn", "options": {"kv_heads": 1}},
        "wide": {"mixer": "attn", "options": {"key_dim": 6}},
        "normed": {"mixer": "attn", "options": {"qk_norm": "head"}},
    }
    refused(message, pattern, share={"kv": kv}, blocks=blocks)


def test_a_group_of_one_shares_nothing():
    assert layers("3*attn", share={"kv": [[0], [2]]}) == layers("3*attn")


def test_groups_reach_into_compositions():
    found = layers("2*parallel(attn,gla),heads(2*attn,2*gla)", share={"kv": [[0, 1, 2]]})
    assert [[single.options.kv for single in x.mix.singles() if single.mixer == "attn"] for x in found] == [
        ["own"],
        ["shared"],
        ["shared"],
    ]
    assert [(layer.producer, layer.produces) for layer in found] == [(0, True), (1, False), (2, False)]


@pytest.mark.parametrize(
    ("pattern", "kv", "expected"),
    [
        ("6*attn", [[0, 1], [2, 3], [4, 5]], [(2, 3)]),
        ("6*attn", [[0, 1, 2], [3, 4, 5]], [(3, 2)]),
        ("attn,4*swa,attn", [[1, 2], [3, 4]], [(1, 1), (2, 2), (1, 1)]),
        ("4*attn", [[0, 3]], [(1, 1), (1, 2), (1, 1)]),  # the two between repeat alone
        ("4*attn", [[1, 2]], [(1, 1)] * 4),
        ("4*attn", [[0, 2], [1, 3]], [(1, 1)] * 4),  # equal, but their keys go from one pair to the other
        ("2*(gla,attn),attn", [[1, 4]], [(1, 1)] * 5),  # a period that serves another layer does not repeat
    ],
)
def test_layers_that_share_keys_repeat_together_or_not_at_all(pattern: str, kv: list, expected: list):
    found = groups(sections(config(pattern, share={"kv": kv}))[0])
    assert [(len(g.period), g.repeats) for g in found] == expected


# -------------------------------------------------------------------------------------------------------------- loops


def passes(pattern: str, **values: Any) -> list[list[tuple[int, list[Any]]]]:
    """Of every section, how often it runs with which windows of swa."""
    found = sections(config(pattern, **values))
    assert [s.start for s in found] == [sum(len(p.layers) for p in found[:i]) for i in range(len(found))]
    return [
        [
            (n, [x.options.window for layer in own for x in layer.mix.singles() if x.mixer == "swa"])
            for n, own in s.passes
        ]
        for s in found
    ]


def test_sections_are_run_as_often_as_their_loops_say():
    assert passes("2*swa") == [[(1, [4, 4])]]
    assert passes("2*swa", loop={"n": 3}) == [[(3, [4, 4])]]
    assert passes("swa,loop(3,swa,gla),2*swa") == [[(1, [4])], [(3, [4])], [(1, [4, 4])]]


def test_passes_may_have_options_of_their_own():
    windows = [{}, {"swa": {"window": 6}}, {"swa": {"window": 6}}, {}]
    assert passes("2*swa", loop={"n": 4, "per_loop": windows}) == [[(1, [4, 4]), (2, [6, 6]), (1, [4, 4])]]
    assert passes("swa,loop(4,swa)", loop={"per_loop": windows}) == [[(1, [4])], [(1, [4]), (2, [6]), (1, [4])]]
    # also inside of compositions; what another mixer is told does not matter
    inside = [{"attn": {"softcap": 2.0}}, {"swa": {"window": 6}}]
    assert passes("parallel(swa,gla)", loop={"n": 2, "per_loop": inside}) == [[(1, [4]), (1, [6])]]
    assert passes("heads(2*swa,2*gla)", loop={"n": 2, "per_loop": inside}) == [[(1, [4]), (1, [6])]]


@pytest.mark.parametrize(
    ("message", "pattern", "loop"),
    [
        ("loop.n = 0: expected an integer >= 1", "swa", {"n": 0}),
        ("loop.gate = 'matrix': expected one of none, scalar, channel", "swa", {"gate": "matrix"}),
        ("loop.n = 3: the pattern 'gla,loop(2,swa)' says how often its layers run", "gla,loop(2,swa)", {"n": 3}),
        (
            "loop.per_loop = 2: expected options for every pass, and layers are run 3 times",
            "swa",
            {"n": 3, "per_loop": [{}, {}]},
        ),
        ("loop.per_loop = 1: expected options for every pass, and layers are run 1 times", "swa", {"per_loop": [{}]}),
        ("and layers are run 1, 2, 3 times", "gla,loop(2,swa),loop(3,swa)", {"per_loop": [{}, {}]}),
        ("loop.per_loop[1] = 'swb': expected names of aaren", "swa", {"n": 2, "per_loop": [{}, {"swb": {}}]}),
        ("loop.per_loop[1] = 'swb': expected names of", "swa", {"n": 2, "per_loop": [{}, {"swa": {}, "swb": {}}]}),
        ("loop.per_loop[1].swa = 3: expected a mapping of options", "swa", {"n": 2, "per_loop": [{}, {"swa": 3}]}),
        ("loop.per_loop[0].swa.windw = 6: unknown key; did", "swa", {"n": 2, "per_loop": [{"swa": {"windw": 6}}, {}]}),
        (
            "loop.per_loop[1].swa = {'heads': 4}: expected options that change no parameter's shape, but "
            "project/kernel is (2, 4, 16) and would be (4, 4, 16)",
            "swa",
            {"n": 2, "per_loop": [{}, {"swa": {"heads": 4}}]},
        ),
        (
            "loop.per_loop[0].swa = {'qk_norm': 'head'}: expected options that change no parameter's shape, but "
            "qkv/k_norm/weight is None and would be (4,)",
            "swa",
            {"n": 2, "per_loop": [{"swa": {"qk_norm": "head"}}, {}]},
        ),
        (
            "loop.per_loop[1].gla = {'gate_rank': 5}: expected options that change no parameter's shape",
            "parallel(gla,swa)",
            {"n": 2, "per_loop": [{}, {"gla": {"gate_rank": 5}}]},
        ),
        (
            "loop.per_loop[1] = {'attn': {'softcap': 3.0}}: block x is shared, and has the same options everywhere",
            "swa,x",
            {"n": 2, "per_loop": [{}, {"attn": {"softcap": 3.0}}]},
        ),
    ],
)
def test_loops_that_cannot_be(message: str, pattern: str, loop: dict):
    refused(message, pattern, loop=loop, blocks=SHARED)
