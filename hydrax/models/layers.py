"""What the resolution of a model gives: one entry per layer, and how layers are run in sections and groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hydrax.core.build import Positive, PositiveFloat
from hydrax.models.mix import Mix, Single
from hydrax.nn.moe import MoEConfig

FFN = Literal["none", "swiglu", "geglu", "reglu", "sglu", "mlp", "relu2", "boom", "moe"]
Norm = Literal["rmsnorm", "rmsnorm1p", "srmsnorm", "layernorm"]
Place = Literal["pre", "reordered", "sandwich", "post"]
Changeable = Literal["mixer", "ffn", "ffn.gate", "ffn.up", "ffn.down"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A named block: a mixer or a composition with options of its own; what is None is the model's."""

    mixer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ffn: FFN | None = None
    ffn_dim: Positive | None = None
    moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over the model's
    norm: Norm | None = None
    norm_place: Place | None = None
    two_hop: bool | None = None
    post_alpha: PositiveFloat | None = None
    post_beta: PositiveFloat | None = None
    shared: bool = False  # one set of weights wherever the block occurs
    lora_rank: Positive | None = None  # low-rank changes to these weights, for every place of its own
    lora_on: tuple[Changeable, ...] = ("mixer", "ffn")  # which weights
    feed: str | None = None  # a shared block, read from [x, embeddings], whose output joins the mixer's input


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One resolved layer; nothing is left open. Equal layers in a row are scanned."""

    block: str
    mix: Mix
    ffn: str
    ffn_dim: int | None
    moe: MoEConfig | None
    norm: str
    norm_place: str
    alpha: float
    beta: float
    two_hop: bool = False  # what the FFN gives is added to the stream before the mixer
    shared: bool = False
    lora_rank: int | None = None
    lora_on: tuple[str, ...] = ()
    feed: "LayerSpec | None" = None
    memory: bool = False
    producer: int = 0  # how many layers back those keys and values were made that it attends to; 0: by itself
    produces: bool = False  # whether later layers attend to its keys and values
    opens: bool = False  # whether it is the first of a block of layers with a gate
    closes: int = 0  # how many layers the gated block has whose last it is; 0: it is not the last of one

    @property
    def mixer(self) -> str:
        """The mixer's name, or what it is composed of."""
        return self.mix.label

    @property
    def options(self) -> Any:
        """The options of a single mixer; a composition is its own description."""
        return self.mix.options if isinstance(self.mix, Single) else self.mix


@dataclasses.dataclass(frozen=True)
class Section:
    """Layers that are run one after the other, `passes` times: for each run of equal passes, its length and layers."""

    start: int
    passes: tuple[tuple[int, tuple[LayerSpec, ...]], ...]

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Those of the first pass; others differ in options, never in parameters."""
        return self.passes[0][1]

    @property
    def loops(self) -> int:
        """Number of passes."""
        return sum(n for n, _ in self.passes)


@dataclasses.dataclass(frozen=True)
class Group:
    """`repeats` repetitions of the layers `period`, the first of them at index `start`.

    `variants` are the period in every run of passes of a loop.
    """

    start: int
    period: tuple[LayerSpec, ...]
    repeats: int
    variants: tuple[tuple[LayerSpec, ...], ...]


def group(layers: Sequence[LayerSpec]) -> list[Group]:
    """The groups of layers that are run once; see `groups`."""
    return groups(Section(0, ((1, tuple(layers)),)))


def groups(section: Section, *, scan: bool = True) -> list[Group]:
    """Cuts the layers into repeated periods, so that compile time grows with the period and not with the depth.

    From the left, the period that covers most layers with at least two repeats wins (the shortest among equals);
    what does not repeat stands alone, as everything does without `scan`. Layers that share keys and values, and those
    at both ends of a gated block, repeat together or not at all.
    """
    columns = list(zip(*(layers for _, layers in section.passes), strict=True))
    found, start = [], 0
    while start < len(columns):
        rest = columns[start:]
        candidates = [(_repeats(rest, p), p) for p in range(1, len(rest) // 2 + 1)] if scan else []
        fitting = [c for c in candidates if c[0] > 1 and _closed([layers[0] for layers in rest], *c)]
        repeats, p = max(fitting, key=lambda c: (c[0] * c[1], -c[1]), default=(1, 1))
        variants = tuple(zip(*rest[:p], strict=True))
        found.append(Group(section.start + start, variants[0], repeats, variants))
        start += repeats * p
    return found


def _repeats(columns: list[tuple[LayerSpec, ...]], p: int) -> int:
    count = 1
    while columns[count * p : (count + 1) * p] == columns[:p]:
        count += 1
    return count


def _closed(layers: list[LayerSpec], repeats: int, p: int) -> bool:
    """Whether no layer of these repeated periods uses what one outside of its own period made."""
    uses = [(i, i - layer.producer) for i, layer in enumerate(layers) if layer.producer]
    uses += [(i, i + 1 - layer.closes) for i, layer in enumerate(layers) if layer.closes]
    inside = all(i // p == source // p for i, source in uses if i < repeats * p)
    return inside and not any(0 <= source < repeats * p <= i for i, source in uses)
