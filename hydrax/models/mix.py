"""What mixes the tokens of a layer: one mixer, or a composition of several that is a mixer itself.

A `Mix` is a frozen description, part of the resolved layer list; `build` makes the module. Compositions read `mix` of
their parts and have an output projection of their own.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

from flax import nnx

from hydrax import mixers
from hydrax.mixers import Mixer, MixerConfig


class Mix:
    """Base of the descriptions. `members` are the parts of a composition."""

    members: tuple["Mix", ...]

    @property
    def label(self) -> str:
        """What to call it in tables."""
        raise NotImplementedError

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        """The module, with fresh parameters."""
        raise NotImplementedError

    def nbytes(self, max_len: int, itemsize: int) -> tuple[int, int]:
        """Bytes of one row's state: of a fixed size, and growing with the row."""
        sizes = [part.nbytes(max_len, itemsize) for part in self.members]
        return sum(fixed for fixed, _ in sizes), sum(growing for _, growing in sizes)

    def flops(self, seq_len: int) -> float:
        """Forward FLOPs per token of the mixing itself, without projections."""
        return sum(part.flops(seq_len) for part in self.members)

    def lower_bounds(self) -> list[int]:
        """Widths of the gates whose lower bounds the model learns."""
        return [width for part in self.members for width in part.lower_bounds()]

    def replaced(self, **options: Any) -> "Mix":
        """The same with other options wherever a mixer in it has all of them."""
        members = tuple(part.replaced(**options) for part in self.members)
        return dataclasses.replace(self, members=members)  # type: ignore[type-var]

    def singles(self) -> list["Single"]:
        """The mixers in it."""
        return [single for part in self.members for single in part.singles()]


@dataclasses.dataclass(frozen=True)
class Single(Mix):
    """A mixer of the table; `options` has nothing left open."""

    members: ClassVar[tuple[Mix, ...]] = ()  # type: ignore[misc]

    mixer: str
    options: MixerConfig

    @property
    def label(self) -> str:
        return self.mixer

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return mixers.get(self.mixer)(d_model, self.options, rngs=rngs)

    def nbytes(self, max_len: int, itemsize: int) -> tuple[int, int]:
        row = mixers.row(self.mixer)
        held = row.state_bytes(self.options, max_len, itemsize)
        return (0, held) if row.grows(self.options) else (held, 0)

    def flops(self, seq_len: int) -> float:
        return mixers.row(self.mixer).flops(self.options, seq_len)

    def lower_bounds(self) -> list[int]:
        width = mixers.row(self.mixer).lower_bound
        return [] if width is None else [width(self.options)]

    def replaced(self, **options: Any) -> "Single":
        names = {f.name for f in dataclasses.fields(self.options)}
        if not options.keys() <= names:
            return self
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **options))

    def singles(self) -> list["Single"]:
        return [self]


@functools.cache
def parameter_shapes(mix: Mix, d_model: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    flat = nnx.to_flat_state(nnx.eval_shape(lambda: nnx.state(mix.build(d_model, rngs=nnx.Rngs(0)))))
    return {"/".join(map(str, path)): p.shape for path, p in flat}


def key_facts(mix: Mix) -> list[dict[str, Any]]:
    """What layers that share keys and values must agree on, for every softmax mixer in a layer."""
    names = ("kv_heads", "key_dim", "value_dim", "rope", "qk_norm", "window", "sink_tokens", "lifetimes")
    found = [single.options for single in mix.singles() if hasattr(single.options, "kv")]
    return [{name: getattr(options, name, None) for name in names} for options in found]


def landmarks(mix: Mix) -> list[int]:
    """After how many tokens of a document each mixer in a layer expects a landmark, for those that do."""
    return [single.options.section for single in mix.singles() if hasattr(single.options, "section")]


def take_projection(mixer: Mixer) -> tuple[int, int]:
    """Removes the output projection of a part, and tells the heads and values per head that it read."""
    shape = mixer.project.shape_in
    mixer.project = None
    return (1, *shape) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])
