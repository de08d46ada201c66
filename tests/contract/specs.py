"""Random models from the whole grammar: legal by construction, small, and together on every axis."""

import dataclasses
import functools
import math
from typing import Any, get_args

import numpy as np
from flax import nnx

from hydrax import mixers
from hydrax.core.build import build
from hydrax.mixers import MixerConfig
from hydrax.models.fusion import FUSIONS, Heads
from hydrax.models.layers import LayerSpec, Place, groups
from hydrax.models.mix import Mix, Single, key_facts
from hydrax.models.modes import READABLE
from hydrax.models.spec import ModelConfig, sections
from hydrax.nn.ffn import KINDS
from hydrax.nn.moe import EXPERTS
from hydrax.nn.norm import NORMS
from tests.contract.cases import VARIANTS, D, tiny

VOCABULARY = 67
ANY = tuple(name for name in FUSIONS if name != "flat")  # which joins attn and swa alone: tests/models/test_fusion.py
ORDER = 17  # with which the fixed models have all mixers
COMPOSITIONS = ("heads", "parallel", "modes", "route")
AXES = (*COMPOSITIONS, "shared", "feed", "loop", "kv", "memory", "prefix", "moe")
PAIRS = [(AXES[i], AXES[(i + d) % len(AXES)]) for d in range(1, 6) for i in range(len(AXES))]
"""Every pair of axes once. The first ten hold every axis."""

OWN_KEYS = {
    "dma",
    "dsa",
    "infllm2",
    "moba",
    "mosa",
    "nats",
    "nsa",
}  # of those with keys, those that choose among their own
LENDERS = ("attn", "fixedqk", "staticqk", "swa")
"""Mixers whose keys and values other layers may use."""

LINEAR = ("aaren", "abc", "agent", "based", "deltanet", "efficient", "fastmax", "flow", "gdn", "gla", "gsa", "hgrn2",
          "inline", "kda", "lightning", "linear_attn", "lstm", "mamba2", "nonapprox", "retention",
          "sha_rnn", "taylor")  # fmt: skip
"""The others that can be parts of heads(...)."""

SPLIT = {
    **{name: {"kv_heads": 1, "value_dim": 16} for name in LENDERS},
    "attn": {"kv_heads": 1, "key_dim": 16, "value_dim": 16},
    "swa": {"kv_heads": 1, "value_dim": 16, "pattern": "window"},
    "gdn": {"value_heads": None},
    "mamba2": {"heads": 1},
}
"""Options without which a part has not as many values per head as all others, or not the heads it is given."""

CHANGES: dict[str, list[dict[str, Any]]] = {
    "attn": [{"softcap": 2.0}, {"scale": 0.2}],
    "deltanet": [{"allow_neg_eigval": False}],
    "gdn": [{"allow_neg_eigval": False}],
    "gla": [{"gate_divisor": 4.0}],
    "lightning": [{"scale": 0.5}],
    "swa": [{"window": 3}, {"window": 11}],
}
"""Options that one pass of a loop may have of its own."""

PATTERNS = {
    (2, False): ["2*({a},{b})", "fill(({a},{b}),4)", "select([0,2],{a},{b})", "every(1,{b},{a})", "bookend(1,{b},{a})"],
    (2, True): ["2*(2*{a},{b})", "{a},2*{b},{a}", "bookend(1,{a},{b})"],
    (3, False): ["2*({a},{b}),{c}", "{c},2*({a},{b})", "2*{a},{b},{c}"],
    (3, True): ["2*{a},{b},{c}", "{c},{a},{b},{a}"],
}
LOOPS = {
    (2, False): ["loop(2,2*({a},{b}))", "{a},loop(2,{a},{b})", "loop(3,2*{a}),loop(2,{b})"],
    (2, True): ["loop(2,{a},{b},{a})", "{b},loop(2,2*{a},{b})", "loop(3,2*{a}),loop(2,2*{b})"],
    (3, False): ["loop(2,2*{a},{b}),{c}", "{c},loop(2,2*({a},{b}))", "loop(2,{c}),loop(2,2*{a},{b})"],
    (3, True): ["{c},loop(2,2*{a},{b})", "loop(2,{a},{b},{a}),{c}"],
}
"""By number of kinds of layers, and whether the first must be twice in one loop for its keys to be shared."""


def random_spec(seed: int) -> ModelConfig:
    """The model of that number. Seeds that differ by 55 have the same pair of axes in common."""
    return _Draw(seed).model()


@functools.cache
def width(name: str, cfg: MixerConfig) -> int:
    """Channels that the output projection of a mixer reads."""
    return math.prod(nnx.eval_shape(lambda: mixers.get(name)(D, cfg, rngs=nnx.Rngs(0))).project.shape_in)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What can stand for a mixer: an expression with its options, and the channels its output projection reads."""

    expression: str
    width: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Draw:
    """A model in the making. Mixers come from a queue: those that are due, so that ten models have all, come first."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        extra = [axis for axis in AXES if self.chance(0.12)]
        together = ["heads", "loop", "kv", "prefix"] if seed % 10 == 9 else []
        self.axes = {*PAIRS[seed % len(PAIRS)], *extra, *together}
        self.chunk = self.pick([4, 8])
        self.mixers = {n: {**tiny(n), **self.pick([{}, {}, *VARIANTS.get(n, [])])} for n in mixers.names()}
        self.blocks: dict[str, dict[str, Any]] = {}
        decade, place = divmod(seed, 10)
        order = np.random.default_rng(ORDER + decade).permutation(mixers.names()).tolist()
        first, last = (len(order) * i // 10 for i in (place, place + 1))
        self.queue, self.due = order[first:] + order[:first], order[first:last]

    def pick(self, choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def next(self, *names: str) -> str:
        """The mixer whose turn it is, among `names` if given."""
        name = next(name for name in self.queue if not names or name in names)
        self.queue.remove(name)
        self.queue.append(name)
        self.due = [other for other in self.due if other != name]
        return name

    # ---------------------------------------------------------------------------------- what mixes tokens in a layer

    def width(self, name: str) -> int:
        return width(name, build(mixers.get(name).Config, self.mixers[name]).fill(D))

    def single(self, *names: str) -> Piece:
        name = self.next(*names)
        return Piece(name, self.width(name))

    def partner(self, piece: Piece, without: tuple[str, ...]) -> Piece:
        """A mixer that is as wide as `piece`, for another part beside it."""
        names = [name for name in mixers.names() if name not in (*without, piece.expression)]
        alike = [name for name in names if self.width(name) == piece.width]
        return self.single(*alike) if alike else Piece(self.named("mlp", {"inner_dim": piece.width}), piece.width)

    def part(self, piece: Piece) -> str:
        """How a piece stands inside of another: one with options needs a name."""
        return self.named(piece.expression, piece.options) if piece.options else piece.expression

    def named(self, expression: str, options: dict[str, Any], **fields: Any) -> str:
        name = f"b{len(self.blocks)}"
        self.blocks[name] = {"mixer": expression, "options": options, **fields}
        return name

    def fusion(self, parts: int, among: tuple[str, ...] = ANY) -> dict[str, Any]:
        options: dict[str, Any] = {"fusion": self.pick(among)}
        if options["fusion"] == "weighted":
            options["learned"] = self.chance(0.5)
            if self.chance(0.7):
                options["weights"] = self.rng.uniform(0.2, 1.5, parts).round(2).tolist()
        return options

    def heads(self, guest: Piece | None, lends: bool) -> Piece:
        names = [self.next(*LENDERS) if lends or self.chance(0.4) else self.next(*LINEAR), self.next(*LINEAR)]
        if self.chance(0.2):
            names.append(self.next(*LINEAR))
        parts = [self.named(name, SPLIT[name]) if name in SPLIT else name for name in names]
        forms = (
            ["{n}*{0},{m}*{1}", "{0}[{n}],{1}", "{0},{1}"] if len(parts) == 2 else ["{0},2*{1},{2}", "{1},{0},2*{2}"]
        )
        form, n = self.pick(forms), self.pick([1, 2, 3])
        options = {**self.fusion(len(parts)), "total": 4}
        if form == "{0},{1}":
            # the heads of the first part in each place of the layer; in those of a shared block they are as many
            ragged = self.chance(0.5) and "shared" not in self.axes
            options["assignment"] = 2 * ([[1], [0, 3]] if ragged else [[2], [0]])
        return Piece(f"heads({form.format(*parts, n=n, m=4 - n)})", 4 * 16, options)

    def parallel(self, guest: Piece | None, lends: bool) -> Piece:
        parts = [guest or self.single(*(LENDERS if lends else ()))]
        for _ in range(self.pick([1, 1, 1, 1, 2])):
            parts.append(self.partner(parts[0], LENDERS if lends else ()) if self.chance(0.7) else self.single(*LINEAR))
        equal = len({part.width for part in parts}) == 1
        options = self.fusion(len(parts), ANY if equal else ("concat",))
        whole = sum(part.width for part in parts)
        inner = whole if options["fusion"] == "concat" else parts[0].width
        return Piece(f"parallel({','.join(map(self.part, parts))})", inner, options)

    def modes(self, guest: Piece | None, lends: bool) -> Piece:
        part = self.single(*READABLE)
        options = {
            "default": self.pick(["attn", "linear"]),
            "qk_norm": self.pick(["none", "head"]),
            "rope": {"fraction": self.pick([0.0, 1.0])},
            "softcap": self.pick([None, 10.0]),
        }
        return Piece(f"modes({part.expression})", part.width, options)

    def route(self, guest: Piece | None, lends: bool) -> Piece:
        full = guest or self.single(*LENDERS)
        sparse = self.partner(full, LENDERS if lends or self.chance(0.5) else ())
        options = {"prefix": self.pick([2, 5]), "tie": self.chance(0.7), "width": 8, "weight": self.pick([0.0, 0.1])}
        return Piece(f"route({self.part(full)},{self.part(sparse)})", full.width, options)

    def pieces(self) -> list[Piece]:
        """Two or three kinds of layers with all compositions in them; for "kv", the first has one mixer with keys."""
        kinds, kv = [kind for kind in COMPOSITIONS if kind in self.axes], "kv" in self.axes
        inner: dict[str, str] = {}
        for host in (kind for kind in ("parallel", "route") if kind in kinds):
            free = [kind for kind in kinds if kind != host and kind not in inner.values() and inner.get(kind) != host]
            if free and (len(kinds) - len(inner) > 2 or self.chance(0.2)):
                inner[host] = self.pick(free)

        def composed(kind: str | None, lends: bool = False) -> Piece | None:
            return None if kind is None else getattr(self, kind)(composed(inner.get(kind)), lends)

        outer = [kind for kind in kinds if kind not in inner.values()]
        found = []
        if kv:
            own = next((kind for kind in outer if kind != "modes" and kind not in inner), None)
            found = [composed(own, lends=True) or self.single(*LENDERS)]
            outer = [kind for kind in outer if kind != own]
        found += [composed(kind) for kind in outer]
        if len(found) > 1 and len(self.due) > 1:
            found.append(self.parallel(None, False))
        while len(found) < 2 or (self.due and len(found) < 3):
            found.append(self.single(*self.due or (CHANGES if "loop" in self.axes else ())))
        return found[:3]

    # ------------------------------------------------------------------------------------------------ the whole model

    def model(self) -> ModelConfig:
        pieces = self.pieces()
        properties = self.properties(len(pieces))
        layers = [self.layer(piece, fields) for piece, fields in zip(pieces, properties, strict=True)]
        looped = "loop" in self.axes
        inside = looped and self.chance(0.5)
        pattern = self.pick((LOOPS if inside else PATTERNS)[len(pieces), "kv" in self.axes])
        values = {
            "d_model": D,
            "pattern": pattern.format(**dict(zip("abc", layers, strict=False))),
            "num_layers": 4 if pattern.startswith(("select", "bookend", "every")) else None,
            "vocab_size": VOCABULARY,
            "blocks": self.blocks,
            "mixers": self.mixers,
            **self.channels(),
            **self.norms(),
            "embed_scale": self.pick([1.0, 3.0]),
            "tie": self.chance(0.5),
            "logit_softcap": self.pick([None, 20.0]),
            "norm_eps": self.pick([1e-6, 1e-5]),
            "loop": self.loop(pattern) if looped else {},
            "memory": self.memory() if "memory" in self.axes else {},
            "prefix": {"meta_tokens": self.pick([1, 3])} if "prefix" in self.axes else {},
        }
        if "kv" in self.axes:
            values["share"] = {"kv": self.groups(build(ModelConfig, values))}
        return build(ModelConfig, values)

    def properties(self, kinds: int) -> list[dict[str, Any]]:
        """What the blocks of the layers say beside their mixer: a keeps its own weights where it lends its keys."""
        fields: list[dict[str, Any]] = [{} for _ in range(kinds)]
        shared = int("kv" in self.axes)
        if "shared" in self.axes:
            own = "moe" if "moe" in self.axes and self.chance(0.5) else self.channel()
            fields[shared] |= {"ffn": own, **self.sharing()}
        if "feed" in self.axes:
            common = self.named(self.next(*(n for n in mixers.names() if n != "staticqk")), {})
            self.blocks[common] |= {"ffn": self.pick(list(KINDS)), **self.sharing()}
            fields[kinds - 1 - (shared == kinds - 1)] |= {"feed": common}
        for own in fields:
            if self.chance(0.3):
                own |= self.norms()
        return fields

    def layer(self, piece: Piece, fields: dict[str, Any]) -> str:
        """How the pattern calls the layer."""
        if fields or piece.options or self.chance(0.3):
            return self.named(piece.expression, piece.options, **fields)
        return piece.expression

    def sharing(self) -> dict[str, Any]:
        lora = {"lora_rank": 2, "lora_on": self.pick([["mixer", "ffn"], ["mixer"], ["ffn.gate", "ffn.up"]])}
        return {"shared": True, **(lora if self.chance(0.6) else {})}

    def channel(self) -> str:
        return self.pick(["none", *KINDS])

    def channels(self) -> dict[str, Any]:
        """Feed-forward networks, with experts in every layer, in every second, or in none."""
        moe = "moe" in self.axes
        kinds = ["moe" if moe else self.channel(), self.channel()]
        some = f"fill(({','.join(kinds[:: self.pick([1, -1])])}))" if self.chance(0.5) else None
        given = {"ffn": kinds[0], "ffn_pattern": some, "moe": self.moe() if moe else {}}
        return {**given, "ffn_dim": 32, "ffn_bias": self.chance(0.3)}

    def moe(self) -> dict[str, Any]:
        groups = self.pick([1, 1, 2])  # a token chooses from one of them
        top_k, shared = self.pick([1, 2] if groups == 2 else [1, 2, 3]), self.pick([0, 1])
        return {
            "experts": 4,
            "top_k": top_k,
            "width": 16,
            "kind": self.pick(list(EXPERTS)),
            "router": self.pick(["softmax", "sigmoid"]),
            "renorm": top_k > 1 and self.chance(0.7),
            "scale": self.pick([1.0, 2.5]),
            "bias": self.chance(0.5),
            "shared": shared,
            "shared_gate": shared > 0 and self.chance(0.5),
            "groups": groups,
            "granularity": self.pick(["token", "chunk"]),
            "chunk": self.chunk,
            "router_at": self.pick(["ffn", "pre_attn"]),
        }

    def norms(self) -> dict[str, Any]:
        weights = {"post_alpha": self.pick([1.0, 1.5]), "post_beta": self.pick([1.0, 0.7])}
        return {"norm": self.pick(list(NORMS)), "norm_place": self.pick(get_args(Place)), **weights}

    def loop(self, pattern: str) -> dict[str, Any]:
        """How loops are run; a pattern that has them says how often."""
        inside, n = "loop(" in pattern, self.pick([2, 3])
        # shared blocks have the same options in all passes, and loops of different length no passes in common
        own = self.chance(0.6) and "shared" not in self.axes and "loop(3" not in pattern

        def options() -> dict[str, Any]:
            return {name: self.pick(changes) for name, changes in CHANGES.items() if self.chance(0.7)}

        return {
            "n": 1 if inside else n,
            "gate": self.pick(["none", "scalar", "channel"]),
            "norm": self.pick(["none", "final"]),
            "block_gate": self.pick([0, 0, 1, 2, 3]),
            "per_loop": [options() for _ in range(2 if inside else n)] if own else [],
        }

    def memory(self) -> dict[str, Any]:
        workspace = {"slots": 4, "rank": 4, "chunk": self.chunk, "write_slots": self.pick([None, 1])}
        pkm = {"rows": 4, "key_dim": 4, "value_dim": 8, "top_k": 2}
        kinds = self.pick([{"workspace": workspace}, {"pkm": pkm}, {"workspace": workspace, "pkm": pkm}])
        # a shared block has them at all its places or at none
        return {**kinds, "every": 1 if "shared" in self.axes else self.pick([1, 2])}

    def groups(self, cfg: ModelConfig) -> list[list[int]]:
        """Layers that use the keys and values of one of them: neighbours of the same kind, or all of a kind."""
        found = []
        for section in sections(cfg):
            kinds: dict[str, list[int]] = {}
            for i, layer in enumerate(section.layers, section.start):
                facts = key_facts(layer.mix)
                if len(facts) == 1 and not layer.shared and not _of_mix(layer.mix) & OWN_KEYS:
                    kinds.setdefault(str(facts), []).append(i)
            for members in kinds.values():
                size = 2 if self.chance(0.6) else len(members)
                found += [members[i : i + size] for i in range(0, len(members), size)]
        return [members for members in found if len(members) > 1]


def features(cfg: ModelConfig) -> set[str]:
    """What is in a model: its axes, mixers and fusions by name, and other choices as "key value"."""
    found = {f"tie {cfg.tie}", f"softcap {cfg.logit_softcap is not None}"}
    found |= {name for name, given in (("prefix", cfg.prefix.meta_tokens), ("kv", cfg.share.kv)) if given}
    for section in sections(cfg):
        inside = section.loops > 1
        if inside:
            found |= {"loop", f"gate {cfg.loop.gate}", f"loop norm {cfg.loop.norm}", f"eta {cfg.loop.block_gate > 0}"}
            found |= {"passes differ"} if len(section.passes) > 1 else set()
        found |= {"scanned" for g in groups(section) if g.repeats > 1}
        for layer in section.layers:
            found |= _of_layer(layer)
            if inside and layer.producer and isinstance(layer.mix, Heads):
                found.add("heads with the keys of others in a loop")
    found |= {name for name in ("workspace", "pkm") if "memory" in found and getattr(cfg.memory, name)}
    return found


def _of_layer(layer: LayerSpec) -> set[str]:
    found = _of_mix(layer.mix) | {f"ffn {layer.ffn}", f"norm {layer.norm}", f"place {layer.norm_place}"}
    given = {
        "shared": layer.shared,
        "lora": layer.lora_rank or (layer.feed and layer.feed.lora_rank),
        "memory": layer.memory,
        "feed": layer.feed,
        "moe": layer.moe,
    }
    found |= {name for name, value in given.items() if value}
    if layer.feed is not None:
        found |= _of_mix(layer.feed.mix)
    if layer.moe is not None:
        names = ("router", "granularity", "router_at", "bias", "shared", "shared_gate", "renorm", "groups")
        found |= {f"{name} {getattr(layer.moe, name)}" for name in names}
    return found


def _of_mix(mix: Mix) -> set[str]:
    if isinstance(mix, Single):
        return {mix.mixer}
    kind = type(mix).__name__.lower()
    found = {kind}.union(*map(_of_mix, mix.members))
    if found.intersection(COMPOSITIONS) - {kind} or any(type(part) is type(mix) for part in mix.members):
        found.add(f"inside {kind}")
    fusion = getattr(mix, "fusion", None)
    return found | (set() if fusion is None else {f"{kind} {fusion.fusion}"})
