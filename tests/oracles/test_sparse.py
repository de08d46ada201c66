"""Sparse mixers against transformers and flash-linear-attention, with the same weights: `make oracles`."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.mixers import Context
from tests.oracles.parity import D, Params, assembler, compare, naive, torch

pytestmark = pytest.mark.oracle

B, T, H, G, K = 2, 29, 4, 2, 8
NOPE = {"heads": H, "kv_heads": G, "key_dim": K, "rope": {"fraction": 0.0}}
ROPE = NOPE | {"rope": {"fraction": 1.0}}


def inputs(**more: tuple[int, ...]) -> dict[str, np.ndarray]:
    """x, the kernels of attention, and others of given shapes."""
    shapes = {"qkv/q/kernel": (D, H, K), "qkv/k/kernel": (D, G, K), "qkv/v/kernel": (D, G, K)}
    shapes |= {"project/kernel": (H, K, D), **more}
    rng = np.random.default_rng(0)
    kernels = {name: rng.normal(size=shape) / np.sqrt(D) for name, shape in shapes.items()}
    return {"x": rng.normal(size=(B, T, D)), **kernels}


def mixer(name: str, options: Params) -> Any:
    """y of x and the parameters."""
    assemble = assembler(name, options)

    def run(x: jax.Array, **p: jax.Array) -> jax.Array:
        return assemble(p)(x, Context.of(x))[0]

    return run


def source(model: str) -> Any:
    name = f"transformers.models.{model}.modeling_{model}"
    pytest.importorskip(name, reason="needs transformers: make oracles")
    return sys.modules[name]


def projections(p: Params) -> dict[str, Any]:
    """Kernels of attention under the names of transformers."""
    rows = {f"{n}_proj.weight": p[f"qkv/{n}/kernel"].reshape(D, -1).T for n in "qkv"}
    return rows | {"o_proj.weight": p["project/kernel"].reshape(-1, D).T}


def heads(x: Any, p: Params) -> list[Any]:
    """Its q, k and v [B,T,.,K]."""
    return [torch.einsum("btd,dhk->bthk", x, p[f"qkv/{n}/kernel"]) for n in "qkv"]


def project(o: Any, p: Params) -> Any:
    return torch.einsum("bthv,hvd->btd", o, p["project/kernel"])


def turns(width: int) -> tuple[Any, Any]:
    """cos and sin [1,T,width] of RoPE by halves."""
    angles = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def causal(window: int = T) -> Any:
    """bool [T,T]"""
    t = torch.arange(T)
    return (t <= t[:, None]) & (t > t[:, None] - window)


def settings(**more: Any) -> Any:
    shape = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": K}
    return SimpleNamespace(
        **shape, attention_dropout=0.0, attention_bias=False, rms_norm_eps=1e-6, _attn_implementation="eager", **more
    )


def test_sinks_and_window_of_gpt_oss() -> None:
    WINDOW = 5

    def theirs(x: Any, sinks: Any, **p: Any) -> Any:
        layer = source("gpt_oss").GptOssAttention(
            settings(sliding_window=WINDOW, layer_types=["sliding_attention"]), layer_idx=0
        )
        mask = torch.where(causal(WINDOW), 0.0, -torch.inf)[None, None]
        # its cos and sin are those of half of the channels
        cos, sin = (a[..., : K // 2] for a in turns(K))
        return torch.func.functional_call(layer, projections(p) | {"sinks": sinks}, (x, (cos, sin), mask))[0]

    compare(mixer("swa", ROPE | {"window": WINDOW, "sinks": True}), theirs, inputs(sinks=(H,)))


def test_dynamic_mask_of_doge() -> None:
    keep = 6
    extra = {"w": (G, K, G), "a": (G,), "qkv/q_norm/weight": (K,), "qkv/k_norm/weight": (K,)}

    def theirs(x: Any, w: Any, a: Any, **p: Any) -> Any:
        layer = source("doge").DogeAttention(settings(keep_window_size=keep), layer_idx=0)
        least = torch.finfo(torch.float32).min
        mask = torch.where(causal(), 0.0, least)[None, None].expand(B, 1, T, T)
        own = {"A": a, "dt_proj.weight": w.reshape(-1, G).T}
        own |= {f"{n}_norm.weight": p[f"qkv/{n}_norm/weight"] for n in "qk"}
        return torch.func.functional_call(layer, projections(p) | own, (x, turns(K), mask))[0]

    given = inputs(**extra)
    given["a"] = np.array([1.5, 1.0])  # small ones have gradients that are differences of much larger terms
    compare(mixer("dma", ROPE | {"keep": keep}), theirs, given)


def test_lightning_indexer_of_deepseek() -> None:
    """What transformers' indexer chooses, attended to by flash-linear-attention's definition."""
    keep, n, d = 6, 8, 8  # with few heads many scores are exactly 0, and PyTorch orders equal ones in any way
    shapes = {"q": (D, n, d), "k": (D, d), "w": (D, n), "weight": (d,), "bias": (d,)}
    given = inputs(**{f"indexer/{name}": shape for name, shape in shapes.items()})
    index = {name: given.pop(f"indexer/{name}").astype(np.float32) for name in shapes}  # without gradients
    run = mixer("dsa", NOPE | {"keep": keep, "index_heads": n, "index_dim": d, "index_rope": 0.5})

    def ours(**x: jax.Array) -> jax.Array:
        return run(**x, **{f"indexer/{name}": jnp.asarray(value) for name, value in index.items()})

    def theirs(x: Any, **p: Any) -> Any:
        sizes = {"index_n_heads": n, "index_head_dim": d, "qk_rope_head_dim": d // 2, "index_topk": keep}
        indexer = source("deepseek_v32").DeepseekV32Indexer(settings(q_lora_rank=D, **sizes), layer_idx=0)
        w = {name: torch.tensor(value) for name, value in index.items()}
        own = {"wq_b.weight": w["q"].reshape(D, -1).T, "wk.weight": w["k"].T, "weights_proj.weight": w["w"].T}
        own |= {"k_norm.weight": w["weight"], "k_norm.bias": w["bias"]}
        chosen = torch.func.functional_call(indexer, own, (x, x, turns(d // 2), causal()[None], None))
        q, k, v = heads(x, p)
        return project(naive("dsa").naive_dsa(q, k, v, None, None, indices=chosen.long()), p)

    compare(ours, theirs, given)


def test_three_views_of_nsa(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions of its parts; they compute a window by a CUDA library, so that is PyTorch's here."""
    block, window, top = 4, 5, 4
    for name in ("fla.ops.utils", "fla.ops.utils.pooling"):  # import Triton; what they are asked for is not called here
        empty = ModuleType(name)
        empty.prepare_chunk_offsets = empty.mean_pooling = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, empty)

    def theirs(x: Any, **p: Any) -> Any:
        with pytest.warns(ImportWarning, match="Flash Attention"):
            nsa = naive("nsa")
        q, k, v = heads(x, p)
        means = [y[:, : T // block * block].reshape(B, -1, block, G, K).mean(2) for y in (k, v)]
        rest = [y[:, T // block * block :].mean(1, keepdim=True) for y in (k, v)]  # never seen, but it can be chosen
        means = [torch.cat(pair, 1) for pair in zip(means, rest, strict=True)]
        scale = K**-0.5
        far, _ = nsa.naive_nsa_compression(q, *means, block_size=block, scale=scale)
        chosen = nsa.naive_nsa_topk(q, means[0], top, block, scale)
        blocks = nsa.naive_nsa_selection(q, k, v, chosen, block, scale)
        near = torch.nn.functional.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)), attn_mask=causal(window), enable_gqa=True
        ).transpose(1, 2)
        gates = torch.sigmoid(torch.einsum("btd,dhn->bthn", x, p["mixture/kernel"]))
        return project(sum(gates[..., i, None] * o for i, o in enumerate((far, blocks, near))), p)

    sizes = {"kernel": block, "stride": block, "block": block, "top": top, "window": window, "rotate": "keys"}
    compare(mixer("nsa", NOPE | sizes), theirs, inputs(**{"mixture/kernel": (D, H, 3)}))
