"""What the contract suites run on: every mixer of the table, small, with parameters of which none is zero."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax import mixers
from hydrax.core.build import build
from hydrax.core.typing import Array, PyTree
from hydrax.mixers import Context, Mixer, MixerConfig, Row

D = 32
CHUNK = 16
LAYER = {"layer_index": 1, "depth": 3}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "aaren": [{"slots": 3}],
    "abc": [{"feature": "silu", "norm_affine": False}],
    "agent": [{"conv_width": 0}],
    "attn": [
        {"rope": {"fraction": 0.0}, "qk_norm": "full", "scale": 0.5, "q_logscale": 3.0, "bias": True},
        {"hops": 2, "hop_map": "learned"},
    ],
    "deltanet": [{"qk_activation": "elu1", "qk_norm": "sum", "out_gate": "none"}],
    "dma": [
        {"granularity": 4, "keep_last": 0, "bias_form": "linear", "bias": True},
        {"keep_last": 0, "qk_norm": "none", "softcap": 20.0},
    ],
    "dsa": [{"keep": 100, "index_rope": 0.0, "qk_norm": "head", "softcap": 20.0, "bias": True}],
    "efficient": [{"key_norm": False}],
    "evict_linear": [
        {"memory": "gla", "fusion": "joint"},
        {"memory": "mamba2", "fusion": "joint", "feature_map": "hedgehog", "rope": {"fraction": 0.0}},
        {"memory": "kda", "window": 20},
        {"memory": "linear_attn"},
    ],
    "fastmax": [{"degree": 1}],
    "gated_conv": [
        {"kernel": "lka", "lka": {"width": 3, "spaced_width": 4, "dilation": 3}},
        {"kernel": "long", "modes": 3},
    ],
    "gecko": [{"chunk": 5, "rope_heads": 1}],
    "gdn": [{"allow_neg_eigval": False, "beta_bias": True, "value_heads": None, "rope": {"fraction": 0.5}}],
    "gsa": [{"feature": "relu", "norm_affine": False}],
    "hgrn": [{"complex": True}],
    "hcam": [{"chunk": 3, "top": 2, "kv_heads": 4, "softcap": 20.0, "out_gate": "headwise", "rope": {"fraction": 0.0}}],
    "inline": [{"activation": "silu", "conv_width": 0}],
    "infllm2": [
        {
            "block": 3,
            "kernel": 3,
            "stride": 1,
            "topk": 4,
            "init_blocks": 2,
            "local": 0,
            "dense_len": 0,
            "use_nope": True,
        }
    ],
    "kda": [{"safe_gate": True, "gate_bias": True}],
    "landmark": [{"section": 1}, {"section": 6, "qk_norm": "head", "softcap": 20.0, "out_gate": "elementwise"}],
    "lightning": [{"value_activation": "none", "position": "lrpe", "norm_affine": False, "gate_activation": "none"}],
    "linear_attn": [
        {"feature_map": "hadamard", "normalizer": "rmsnorm"},
        {"feature_map": "dpfp"},
        {"feature_map": "identity", "normalizer": "learned", "bias": True},
    ],
    "mamba": [{"bcdt_norm": True}],
    "mamba2": [
        {"heads": 2},
        {"heads": 2, "norm": "before_gate", "conv_activation": "none", "dt_min": 0.05},
        {"norm": "none"},
    ],
    "mega": [{"bias": "rotary", "heads": 1}, {"weights": "laplace"}, {"bias": "none"}],
    "megalodon": [{"heads": 1, "chunk": 16, "modes": 5, "groups": 4}],
    "mla": [{"q_rank": None, "kv_rank": 10, "rope": {"fraction": 0.0}}],  # a call of many tokens absorbs as well
    "moba": [{"block": 5, "top": 2, "route": "kv", "softcap": 20.0, "qk_norm": "head", "out_gate": "headwise"}],
    "mosa": [{"sparsity": 3, "start": 0.5, "slack": 1.0, "softcap": 20.0, "bias": True, "rope": {"fraction": 0.0}}],
    "nats": [{"capacity": 40, "softcap": 20.0, "bias": True}],
    "nonapprox": [{"qk_norm": "head"}],
    "nsa": [
        {"compress": "linear", "kv_sharing": "separate", "qk_norm": "head", "rotate": "centre"},
        {"compress": "mlp", "block": 3, "kernel": 6, "stride": 3, "local": 0, "init_blocks": 0, "softcap": 20.0},
        {"compress": "mean", "rotate": "keys", "kernel": 2, "out_gate": "headwise"},
    ],
    "rat": [{"chunk": 1, "rope": {"fraction": 0.0}}, {"chunk": 100, "groups": 4}],
    "routing": [{"route": "token", "clusters": 5, "window": 3, "softcap": 20.0, "qk_norm": "head", "bias": True}],
    # With the default epsilon an output near 0 makes the recurrence itself amplify fp32 rounding 30 times.
    "retention": [{"rope": {"style": "torchscale"}, "norm_affine": False, "norm_eps": 1e-3}],
    "stochastic": [{"window": 2, "width": 5, "table": 64, "qk_norm": "head", "out_gate": "headwise"}],
    # Without a norm of the keys, the gradient of their bias is that of a shift of all scores and nearly vanishes.
    "swa": [
        {"sinks": False, "qk_norm": "head", "out_gate": "headwise", "bias": True, "out_bias": True},
        {"pattern": "gna", "sink_tokens": 0, "gna": {"stride": 3, "dilation": 2}},
        {"pattern": "s2", "s2": {"block": 3, "local": 2, "vert_stride": 3}},
        {"pattern": "shifted_groups", "window": 6},
        {"pattern": "spans", "spans": {"block": 3, "length": 30, "rules": [[[3, 0], [0, 0.4]]]}},
        {"pattern": "log_bands", "window": 3},
    ],
    "token_gate": [{"operator": "ema", "modes": 3}],
}
"""Options, beside those of the table, that take another path through a mixer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A mixer split into structure and parameters, and the one call all tests make."""

    name: str
    row: Row
    cfg: MixerConfig
    graphdef: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Param], ...]  # (path, shape and metadata)
    params: dict[str, Array]

    def merge(self, params: dict[str, Array]) -> Mixer:
        """The mixer with these parameters."""
        flat = [(path, variable.replace(params[_name(path)])) for path, variable in self.variables]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    @property
    def remembers(self) -> bool:
        """Whether there is a state: without one, a token cannot depend on those before it."""
        return bool(jax.tree.leaves(self.init(1, 1)))

    @property
    def cast_names(self) -> set[str]:
        """The parameters used in the compute dtype; gates, norms and the like stay fp32."""
        return {_name(path) for path, variable in self.variables if variable.get_metadata()["cast"]}

    @property
    def told_names(self) -> set[str]:
        """The parameters whose gradient is a statistic, see `nn.param`."""
        return {_name(path) for path, variable in self.variables if variable.get_metadata()["rule"] != "gradient"}

    def cast(self, dtype: jnp.dtype, params: dict[str, Array] | None = None) -> dict[str, Array]:
        """The parameters as a step in that compute dtype gets them."""
        params = self.params if params is None else params
        return {name: x.astype(dtype) if name in self.cast_names else x for name, x in params.items()}

    def __call__(
        self,
        params: dict[str, Array],
        x: Array,
        seg: Array | None = None,
        *,
        positions: Array | None = None,
        state: PyTree | None = None,
        **facts: Any,
    ) -> tuple[Array, PyTree]:
        facts |= {"lower_bounds": self.lower_bounds}
        ctx = Context.of(x, None if seg is None else jnp.asarray(seg), **LAYER, **facts)
        if positions is not None:
            ctx = dataclasses.replace(ctx, positions=jnp.asarray(positions))
        return self.merge(params)(x, ctx, state)

    @property
    def lower_bounds(self) -> dict[int, Array]:
        """What a model would tell the mixer: bounds that rise from 0 in the first layer."""
        if self.row.lower_bound is None:
            return {}
        width = self.row.lower_bound(self.cfg)
        rise = np.random.default_rng(1).uniform(0, 1 / LAYER["depth"], (LAYER["depth"], width))
        return {width: jnp.asarray(np.cumsum(rise, 0) - rise[0], jnp.float32)}

    def init(self, batch: int, max_len: int, dtype: jnp.dtype = jnp.float32) -> PyTree:
        return self.merge(self.params).init_state(batch, max_len, dtype)


def tiny(name: str, chunk_size: int = CHUNK) -> dict[str, Any]:
    """The options of the table, with chunks short enough that tests cross their edges."""
    fields = {f.name for f in dataclasses.fields(mixers.get(name).Config)}
    return {**mixers.row(name).tiny, **({"chunk_size": chunk_size} if "chunk_size" in fields else {})}


@functools.cache
def case(name: str, variant: int | None = None, chunk_size: int = CHUNK) -> Case:
    """The tiny mixer of that name; norms, biases and gates are moved off their initial ones and zeros."""
    row, cls = mixers.row(name), mixers.get(name)
    options = tiny(name, chunk_size) | ({} if variant is None else VARIANTS[name][variant])
    cfg = build(cls.Config, options).fill(D)

    def split(seed: int) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(cls(D, cfg, rngs=nnx.Rngs(seed)))

    graphdef, shapes = nnx.eval_shape(lambda: split(0))
    initial = jax.jit(lambda: [v[...] for _, v in nnx.to_flat_state(split(0)[1])])()
    rng = np.random.default_rng(0)
    variables = tuple(nnx.to_flat_state(shapes))
    params = {
        _name(path): jnp.asarray(np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32))
        for (path, _), x in zip(variables, initial, strict=True)
    }
    return Case(name, row, cfg, graphdef, variables, params)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def segments(lengths: Sequence[int], T: int) -> np.ndarray:
    """Ids of a row that packs documents of these lengths; what is left of T is padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, T - len(ids))).astype(np.int32)


def inside(seg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions inside the documents of the rows [B,T], and whether a token starts one."""
    starts = np.concatenate([np.ones_like(seg[:, :1], bool), seg[:, 1:] != seg[:, :-1]], axis=1)
    index = np.arange(seg.shape[1])
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32), starts


def is_float(x: Array) -> bool:
    """Whether the leaf carries gradients."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
