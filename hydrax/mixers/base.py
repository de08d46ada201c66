"""The protocol of every sequence mixer: one `Config`, one call for training, prefill and decoding, one state pytree.

`SoftmaxMixer` is what mixers have in common that attend to keys and values by a softmax.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core import tree
from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.kv_cache import Keys
from hydrax.nn.linear import Linear
from hydrax.ops.documents import document_positions
from hydrax.parallel.shards import Shards

Attend = Callable[..., Array]
"""`nn.kv_cache.attend`, or what takes the same arguments."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a mixer may know beyond its input.

    Attributes:
      positions: int32 [B,T], index of each token inside its document.
      segment_ids: int32 [B,T], documents; 0 = right padding. None: one document per row, no padding.
      starts: bool [B], token 0 does not continue the document of the given state. None: it does.
      layer_index, depth: position of the layer among all layers (a traced scalar under the layer scan).
      lower_bounds: by width W, [layers,W] fp32 in [0,1): how little the gates of each layer may forget.
      embeddings: [B,T,D], what the first layer read: the token embeddings.
      residual: [B,T,D], the stream that the layer adds to; None: what the mixer reads.
      modes: int32 [B,T], how a block of two modes reads each token: 1 by attention, 0 by its recurrence. -1, None: the
        block's own choice.
      noise: the key of a training step's random numbers, the same for all layers; None: nothing is drawn.
      progress: fp32 scalar, the share of the training steps that lie behind; None: this is no training step, or one of
        an unknown number.
      shards: the tokens of rows are divided over devices, see `parallel.shards`; None: they are not.
      keys: what a layer without keys and values of its own attends to, see `nn.kv_cache.Keys`.
      attend: what softmax layers call in place of `nn.kv_cache.attend`: inference policies; None: that itself.
      impl: passed to the ops.
      records: where `record` puts what a layer has to say beside its output; None: nowhere.
      taps: functions applied to named intermediate arrays (interpretability, interventions): "heads", z before the
        output projection; "keys", "values" and "reads" of mixers that are linear in their values, see `Mixer`.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    starts: Bool[Array, "B"] | None = None
    layer_index: int | Array = 0
    depth: int = 1
    lower_bounds: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    embeddings: Float[Array, "B T D"] | None = None
    residual: Float[Array, "B T D"] | None = None
    modes: Int[Array, "B T"] | None = None
    noise: Array | None = None
    progress: Array | None = None
    shards: Shards | None = None
    keys: Any = None
    attend: Attend | None = None
    records: dict[str, Any] | None = None
    impl: str | None = None
    taps: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, x: Array, segment_ids: Array | None = None, **facts: Any) -> Self:
        """The context of a call that starts at position 0: positions follow from the documents."""
        if segment_ids is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        else:
            positions = document_positions(segment_ids)
        return cls(positions=positions, segment_ids=segment_ids, **facts)

    @property
    def places(self) -> dict[str, Any]:
        """Positions and documents, as ops and caches take them."""
        return {"positions": self.positions, "segment_ids": self.segment_ids}

    @property
    def rows(self) -> dict[str, Any]:
        """Documents, the devices that share rows, and the form, as convolutions and recurrences take them."""
        return {"segment_ids": self.segment_ids, "shards": self.shards, "impl": self.impl}

    @property
    def ids(self) -> Int[Array, "B T"]:
        """The documents of tokens; one per row if none are given."""
        return jnp.ones_like(self.positions) if self.segment_ids is None else self.segment_ids

    def at(self, layer_index: int | Array) -> Self:
        """The same context seen from another layer."""
        return dataclasses.replace(self, layer_index=layer_index)

    def lower_bound(self, width: int) -> Float[Array, "W"]:
        """The lower bound of this layer's gates; 0 outside of a model."""
        if width not in self.lower_bounds:
            return jnp.zeros((width,), jnp.float32)
        return self.lower_bounds[width][self.layer_index]

    def record(self, name: str, value: Any) -> None:
        """Hands `value` to whoever runs the layer: "keys" for layers that share them, losses by their name."""
        if self.records is not None:
            self.records[name] = value

    def tap(self, name: str, z: Array) -> Array:
        """`z`, after the tap of that name if one is set."""
        return self.taps[name](z) if name in self.taps else z

    def by_channel(self, name: str, z: Array) -> Array:
        """`tap` of z [B,T,H,V] of which every channel has a matrix of its own: the tap sees [B,T,HV]."""
        return self.tap(name, z.reshape(*z.shape[:2], -1)).reshape(z.shape)


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's frozen `Config`.

    `PRESETS` are published choices of options by name; a user's `preset=<name>` stands for them, and every option
    given beside it wins.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def restarts(self) -> bool:
        """Whether documents may share a row, and a state be carried; if not, whole rows are all that is served."""
        return True

    def fill(self, d_model: int) -> Self:
        """The config with every None that depends on the model width filled in.

        Raises:
          ConfigError: the width does not fit (e.g. heads do not divide it).
        """
        return self


class Mixer(nnx.Module):
    """A sequence mixer: x [B,T,D] -> y [B,T,D], carrying a state of fixed structure.

    `mix` gives z [B,T,H,V], the heads before the output projection, so that fusions can combine heads of several
    mixers; `out` is that projection. A state of zeros is the state before the first token.

    Where queries, keys and gates fix a linear map from values to what is read, `mix` taps both: "values" after their
    convolution and activation, "reads" before skip, norm and gate. Both are [B,T,heads,V] if the channels of a head
    share that map, [B,T,channels] if every channel has its own. Mixers with keys tap "keys" [B,T,heads,K] after a
    convolution and before any norm, feature map or rotation.

    The output projection is the attribute `project`; whoever joins several mixers sets it to None and has its own.
    A mixer that has a norm of its own input (`NORMS_INPUT`) reads the residual stream itself where it is alone.
    """

    Config: ClassVar[type[MixerConfig]]
    NORMS_INPUT: ClassVar[bool] = False
    project: Any

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        """`cfg` is a filled `Config`."""
        raise NotImplementedError

    def mix(self, x: Float[Array, "B T D"], ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        """Heads z [B,T,H,V] and the state after the last real token of each row (given `state`, of its structure)."""
        raise NotImplementedError

    def out(self, z: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
        """The output projection."""
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        """The state before token 0, all zeros; `max_len` bounds the tokens of one document where that matters."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """Training (no state), prefill (state from `init_state`) and decoding (T = 1) alike."""
        if state is not None and ctx.starts is not None:
            state = tree.where(ctx.starts, jax.tree.map(jnp.zeros_like, state), state)
        z, state = self.mix(x, ctx, state)
        return self.out(ctx.tap("heads", z)), state

    def step(self, x: Float[Array, "B D"], ctx: Context, state: PyTree) -> tuple[Float[Array, "B D"], PyTree]:
        """One token: the call with T = 1."""
        y, state = self(x[:, None], ctx, state)
        return y[:, 0], state


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(AttentionConfig, MixerConfig):
    """Base of the `Config` of softmax mixers with heads of one width."""

    def fill(self, d_model: int) -> Self:
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))


class SoftmaxMixer(Mixer):
    """What softmax mixers share: y = W_o (o ⊙ σ(W_g x)), and a state of the keys and values of the whole document."""

    cfg: Any

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.read_out(d_model, rngs)

    def read_out(self, d_model: int, rngs: nnx.Rngs) -> None:
        """Makes the output gate and the output projection, the last of what every mixer makes."""
        cfg = self.cfg
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        shape, axes = (cfg.heads, cfg.value_dim), ("heads", "head_dim", "embed")
        self.project = Linear(shape, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)

    def attend(
        self, q: Float[Array, "B T H K"], keys: Keys, ctx: Context, by: Attend | None = None, **options: Any
    ) -> Float[Array, "B T H V"]:
        """`kv_cache.attend`, or `by`, with the options of the config and the facts of the context."""
        return (by or kv_cache.attend)(
            q,
            keys,
            **ctx.places,
            scale=self.cfg.scale,
            softcap=self.cfg.softcap,
            shards=ctx.shards,
            impl=ctx.impl,
            **options,
        )

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_cache(batch, max_len, dtype)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of mixers.

    Attributes:
      path: `module:Class`.
      about, paper: one phrase and the arXiv number.
      transition: none | scalar | diag | full | lse | chosen | stabilised | nonlinear, how states of token ranges
        compose.
      linear: what of the state evolves linearly, each by itself: S_t = A_t S_{t-1} + B_t, where tokens and the rest of
        the state fix A and B (`interp.state_space`). Paths of leaves or parts, as "memory/v".
      tiny: options for tests at d_model 32.
      state_bytes: (filled config, max_len, bytes per element of the compute dtype) -> bytes of one row's state.
      flops: (filled config, document length) -> forward FLOPs per token of the mixing itself, without projections.
      lower_bound: (filled config) -> width of the gates whose lower bounds the model learns; None: it has none.
      head_option: the option that says how many heads the output has.
    """

    path: str
    about: str
    paper: str
    transition: str
    tiny: Mapping[str, Any]
    state_bytes: Callable[[Any, int, int], int]
    flops: Callable[[Any, int], float]
    lower_bound: Callable[[Any], int] | None = None
    head_option: str = "heads"
    linear: tuple[str, ...] = ()

    def grows(self, cfg: Any) -> bool:
        """Whether the state grows with the row (keys and values, at least up to a window) or has a fixed size."""
        return self.state_bytes(cfg, 1, 1) != self.state_bytes(cfg, 2**20, 1)


def per_head(d_model: int, heads: int) -> int:
    """d_model / heads.

    Raises:
      ConfigError: heads do not divide the width.
    """
    if d_model % heads:
        raise ConfigError("heads", heads, f"expected a divisor of d_model = {d_model}, or set the head widths")
    return d_model // heads


def default_heads(d_model: int) -> int:
    """The largest divisor of d_model up to d_model / 128, at least 1."""
    return max(h for h in range(1, max(d_model // 128, 1) + 1) if d_model % h == 0)
