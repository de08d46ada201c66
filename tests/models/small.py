"""Models and layers of width 16 with parameters of which none is zero, and plain fp64 formulas to hold them against."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import build
from hydrax.core.typing import Array, PyTree
from hydrax.mixers import Context, Mixer
from hydrax.models import lm
from hydrax.models.layers import LayerSpec, groups
from hydrax.models.mix import Mix
from hydrax.models.spec import ModelConfig, resolve, sections

D, VOCABULARY = 16, 23
MODEL = {
    "d_model": D,
    "vocab_size": VOCABULARY,
    "ffn_dim": 8,
    "mixers": {
        "attn": {"heads": 2, "key_dim": 4},
        "swa": {"heads": 2, "key_dim": 4, "window": 4},
        "gla": {"heads": 2, "key_dim": 4, "value_dim": 4, "gate_rank": 3},
    },
}
Params = dict[str, Array]


def config(pattern: str, **values: Any) -> ModelConfig:
    """A model of the small mixers above; `mixers` that are given add to them."""
    mixers = MODEL["mixers"] | dict(values.pop("mixers", {}))
    return build(ModelConfig, {**MODEL, "pattern": pattern, "mixers": mixers, **values})


def plan(pattern: str, *, scan: bool = True, **values: Any) -> lm.Blueprint:
    return lm.blueprint(config(pattern, **values), scan=scan)


def layers(pattern: str, **values: Any) -> tuple[LayerSpec, ...]:
    return resolve(config(pattern, **values))


def drawn(shapes: Mapping[str, Any], seed: int = 0, scale: float = 0.3) -> Params:
    """Normal parameters, each of which depends on its path and shape alone."""
    return {path: normal(path, *s.shape, seed=seed, scale=scale) for path, s in shapes.items()}


def normal(name: str, *shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    rng = np.random.default_rng([seed, *name.encode()])
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape).astype(np.int32)


def below(params: Mapping[str, Array], prefix: str) -> Params:
    """The parameters under a path."""
    return {path.removeprefix(prefix): p for path, p in params.items() if path.startswith(prefix)}


def unstacked(made: lm.Blueprint, params: Params) -> Params:
    """The parameters of a model as it has them with `scan=False`."""
    found = {path: p for path, p in params.items() if not path.startswith("periods/")}
    all_groups = [g for section in sections(made.cfg) for g in groups(section)]
    for path in params.keys() - found.keys():
        _, j, kind, i, *rest = path.split("/")
        g = all_groups[int(j)]
        for r in range(g.repeats):
            layer = g.start + r * len(g.period) + int(i)
            found["/".join(["periods", f"{layer}", kind, "0", *rest])] = params[path][r : r + 1]
    return found


def in_pieces(made: lm.Blueprint, params: Params, ids: np.ndarray, split: int) -> Array:
    """Logits of the rows `ids`, read in one call up to `split` and then token by token."""

    @jax.jit
    def run(params: Params) -> Array:
        model = made.merge(params)
        first, cache = model.prefill(jnp.asarray(ids[:, :split]), model.init_cache(*ids.shape))

        def step(cache: Any, token: Array) -> tuple[Any, Array]:
            logits, cache = model.step(token, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, jnp.asarray(ids[:, split:].T))
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

    return run(params)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The mixer of one layer as a function of its parameters."""

    graph: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Param], ...]
    params: Params

    @classmethod
    def of(cls, mix: Mix, width: int = D, **options: Any) -> "Layer":
        graph, state = nnx.split(nnx.eval_shape(lambda: mix.build(width, rngs=nnx.Rngs(0))))
        variables = tuple(nnx.to_flat_state(state))
        return cls(graph, variables, drawn({_path(path): v for path, v in variables}, **options))

    def merge(self, params: Params | None = None) -> Mixer:
        params = self.params if params is None else params
        flat = [(path, variable.replace(params[_path(path)])) for path, variable in self.variables]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def __call__(self, params: Params, x: Array, state: PyTree = None, **facts: Any) -> tuple[Array, PyTree]:
        return self.merge(params)(x, Context.of(x, **facts), state)

    def of_heads(self, params: Params, indices: list[int]) -> Params:
        """The parameters of the layer that has only these heads."""
        found = {}
        for path, variable in self.variables:
            axes = variable.get_metadata("axes")
            at = next((i for i, axis in enumerate(axes) if axis in ("heads", "kv_heads")), None)
            found[_path(path)] = (
                params[_path(path)] if at is None else params[_path(path)].take(np.asarray(indices), at)
            )
        return found


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))


# ----------------------------------------------------------------------------------------------------- plain formulas


def fp64(params: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {path: np.asarray(p, np.float64) for path, p in params.items()}


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0, axes: int | tuple[int, ...] = -1, eps: float = 1e-6):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x: np.ndarray, positions: np.ndarray, theta: float = 10000.0) -> np.ndarray:
    """x [B,T,H,K]: channels m and m + K/2 turn by the angle p·theta^(-2m/K)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[..., None, None] * theta ** -(np.arange(half) / half))
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def visible(positions: np.ndarray, seg: np.ndarray, window: int | None = None, sink_tokens: int = 0) -> np.ndarray:
    """[B,T,S]: which tokens of its own document each token sees."""
    distance = positions[:, :, None] - positions[:, None]
    near = distance < (window or np.inf)
    first = positions[:, None] < sink_tokens
    return (seg[:, :, None] == seg[:, None]) & (seg[:, :, None] != 0) & (distance >= 0) & (near | first)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, softcap: float | None = None
) -> np.ndarray:
    """o [B,T,H,V]; every key head serves as many query heads in a row."""
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    z = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    weights = softmax(np.where(seen[:, None], z, -1e30))
    return np.einsum("bhts,bshv->bthv", np.where(seen[:, None], weights, 0), v)


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """y_t = Σ_i w_i ⊙ x_{t-W+1+i} + b over axis 1, zeros before token 0."""
    W = len(weight)
    padded = np.concatenate([np.zeros_like(x[:, : W - 1]), x], axis=1)
    return sum(weight[i] * padded[:, i : i + x.shape[1]] for i in range(W)) + bias


def swa_layer(
    p: Mapping[str, np.ndarray],
    x: np.ndarray,
    positions: np.ndarray,
    seen: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """x + W_o attention(norm x) of a layer without FFN, and its keys and values, or those it is given."""
    h = rms(x, p["mixer_norm/weight"])
    q = rope(np.tensordot(h, p["mixer/qkv/q/kernel"], 1), positions)
    if keys is None:
        k, v = (np.tensordot(h, p[f"mixer/qkv/{name}/kernel"], 1) for name in "kv")
        keys = rope(k, positions), v
    return x + np.tensordot(attention(q, *keys, seen), p["mixer/project/kernel"], 2), keys
