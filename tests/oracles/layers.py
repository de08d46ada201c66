"""Layers of transformers with small random weights, each beside the hydrax mixer it should equal."""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.mixers import Mixer
from tests.oracles.parity import D, Params, assembler, torch

# transformers runs the Triton kernels of fla wherever it can import them; on every machine it must run its own PyTorch
# code here. Of fla only the naive files are read, by their path.
sys.modules["fla"] = None
transformers: Any = pytest.importorskip("transformers", reason="needs transformers: make oracles")

H, HV, K, V, RANK = 2, 4, 8, 16, 3
K_ROPE, Q_RANK, LRU = 4, 6, 24


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of transformers and its mixer.

    Attributes:
      family, module: the model of transformers and the class of its layer.
      config: options of the model's config.
      mixer, options: name and options of the mixer.
      convert: the reference's weights as the mixer's.
      call: (module, x, cache) -> y.
      cache: config -> an empty cache of the reference.
      entry: name of what is compared in the mixer's state.
      memory: (cache, index) -> that entry.
      index, depth: position among the layers of the model.
      buffers: constants that the model gives its layers.
    """

    family: str
    module: str
    config: Params
    mixer: str
    options: Params
    convert: Callable[[Params], Params]
    call: Callable[[Any, Any, Any], Any] = lambda module, x, cache: module(x, cache_params=cache)
    cache: Callable[[Any], Any] = lambda config: transformers.DynamicCache(config=config)
    entry: str = "memory"
    memory: Callable[[Any, int], Any] = lambda cache, index: cache.get_recurrent_state(index)
    index: int = 0
    depth: int = 2
    buffers: Params = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> Any:
        """The config of the reference's model."""
        return config_of(self.family, hidden_size=D, num_hidden_layers=self.depth, **self.config)

    @functools.cached_property
    def theirs(self) -> Any:
        """The reference's layer, every weight random."""
        module = randomised(getattr(source_of(self.family), self.module)(self.settings, self.index))
        for name, value in self.buffers.items():
            module.register_buffer(name, torch.tensor(value))
        return module

    @functools.cached_property
    def _assemble(self) -> Callable[[Params], Mixer]:
        return assembler(self.mixer, self.options)

    def ours(self, p: Params) -> Mixer:
        """The mixer, given weights of the reference."""
        return self._assemble(self.convert(p))


def source_of(family: str) -> ModuleType:
    """The file of transformers that defines a model."""
    name = family.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def config_of(family: str, **options: Any) -> Any:
    """The config of a model."""
    return transformers.AutoConfig.for_model(family, **options)


def randomised(module: Any) -> Any:
    """The module in evaluation mode, its weights normal, matrices divided by the root of their fan-in.

    Biases that select experts are weights in all but name.
    """
    rng = np.random.default_rng(0)
    biases = [b for name, b in module.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for parameter in [*module.parameters(), *biases]:
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(torch.tensor(rng.normal(size=parameter.shape) / np.sqrt(fan_in)))
    return module.eval()


def weights(module: Any) -> dict[str, np.ndarray]:
    """Its weights by name, those that are shared once."""
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def projection(w: Array, heads: int) -> Array:
    """[heads·K, D] -> [D, heads, K]."""
    return jnp.moveaxis(w.reshape(heads, -1, w.shape[-1]), -1, 0)


def output(w: Array, heads: int) -> Array:
    """[D, heads·V] -> [heads, V, D]."""
    return w.T.reshape(heads, -1, w.shape[0])


def taps(w: Array, heads: int) -> Array:
    """[heads·K, 1, W] -> [W, heads, K]."""
    return w[:, 0].T.reshape(w.shape[-1], heads, -1)


def parts(x: Array, *sizes: int) -> list[Array]:
    """Pieces of these sizes along axis 0."""
    assert sum(sizes) == x.shape[0]
    return jnp.split(x, np.cumsum(sizes)[:-1])


def by_head(w: Array, *rows: int) -> list[Array]:
    """A projection stored head by head, each head with these numbers of rows, as one projection per part."""
    pieces = parts(w.reshape(H, -1, D).swapaxes(0, 1), *rows)
    return [x.swapaxes(0, 1).reshape(-1, D) for x in pieces]


def minimax(p: Params) -> Params:
    q, k, v = by_head(p["qkv_proj.weight"], K, K, K)
    return {
        "q/kernel": projection(q, H),
        "k/kernel": projection(k, H),
        "v/kernel": projection(v, H),
        "gate/kernel": projection(p["output_gate.weight"], H),
        "norm/weight": p["norm.weight"].reshape(H, K),
        "project/kernel": output(p["out_proj.weight"], H),
    }


def delta_inputs(q: Array, k: Array, v: Array, beta: Array, conv: Array, heads: int, value_heads: int) -> Params:
    """The projections of a delta rule, with one convolution over the channels of q, k and v."""
    q_taps, k_taps, v_taps = parts(conv, len(q), len(k), len(v))
    return {
        "inputs/q/kernel": projection(q, heads),
        "inputs/k/kernel": projection(k, heads),
        "inputs/v/kernel": projection(v, value_heads),
        "inputs/q_conv/weight": taps(q_taps, heads),
        "inputs/k_conv/weight": taps(k_taps, heads),
        "inputs/v_conv/weight": taps(v_taps, value_heads),
        "inputs/beta/kernel": beta.T,
    }


def qwen3_next(p: Params) -> Params:
    r = HV // H
    q, k, v, z = by_head(p["in_proj_qkvz.weight"], K, K, r * V, r * V)
    b, a = by_head(p["in_proj_ba.weight"], r, r)
    return {
        **delta_inputs(q, k, v, b, p["conv1d.weight"], H, HV),
        "gate/kernel": projection(z, HV),
        "step_size/kernel": a.T,
        "decay/A_log": p["A_log"],
        "decay/dt_bias": p["dt_bias"],
        "norm/weight": p["norm.weight"],
        "project/kernel": output(p["out_proj.weight"], HV),
    }


def olmo_hybrid(p: Params) -> Params:
    q, k, v, b = (p[f"{name}_proj.weight"] for name in "qkvb")
    return {
        **delta_inputs(q, k, v, b, p["conv1d.weight"], H, HV),
        "gate/kernel": projection(p["g_proj.weight"], HV),
        "step_size/kernel": p["a_proj.weight"].T,
        "decay/A_log": p["A_log"],
        "decay/dt_bias": p["dt_bias"],
        "norm/weight": p["o_norm.weight"],
        "project/kernel": output(p["o_proj.weight"], HV),
    }


def kda(p: Params) -> Params:
    q, k, v, b = (p[f"{name}_proj.weight"] for name in "qkvb")
    return {
        **delta_inputs(q, k, v, b, p["conv1d.weight"], H, H),
        "decay_down/kernel": p["forget_gate.f_a_proj.weight"].T,
        "decay_up/kernel": projection(p["forget_gate.f_b_proj.weight"], H),
        "decay/A_log": p["forget_gate.A_log"].reshape(H),
        "decay/dt_bias": p["forget_gate.dt_bias"].reshape(H, K),
        "gate_down/kernel": p["g_a_proj.weight"].T,
        "gate_up/kernel": projection(p["g_b_proj.weight"], H),
        "norm/weight": p["o_norm.weight"],
        "project/kernel": output(p["o_proj.weight"], H),
    }


def mamba(p: Params) -> Params:
    x, z = parts(p["in_proj.weight"], 2 * D, 2 * D)
    dt, b, c = parts(p["x_proj.weight"], RANK, K, K)
    return {
        "x/kernel": x.T,
        "gate/kernel": z.T,
        "x_conv/weight": p["conv1d.weight"][:, 0].T,
        "x_conv/bias": p["conv1d.bias"],
        "step_down/kernel": dt.T,
        "step_up/kernel": p["dt_proj.weight"].T,
        "b/kernel": b.T,
        "c/kernel": c.T,
        "dt_bias": p["dt_proj.bias"],
        "A_log": p["A_log"],
        "skip": p["D"],
        "project/kernel": p["out_proj.weight"].T,
    }


def jamba(p: Params) -> Params:
    """With norms of what the steps, keys and queries are made of."""
    norms = {"b_norm": "b", "c_norm": "c", "step_norm": "dt"}
    return mamba(p) | {f"{ours}/weight": p[f"{theirs}_layernorm.weight"] for ours, theirs in norms.items()}


def mamba2(p: Params) -> Params:
    z, x, b, c, dt = parts(p["in_proj.weight"], HV * V, HV * V, H * K, H * K, HV)
    x_taps, b_taps, c_taps = parts(p["conv1d.weight"], HV * V, H * K, H * K)
    x_bias, b_bias, c_bias = parts(p["conv1d.bias"], HV * V, H * K, H * K)
    return {
        "x/kernel": projection(x, HV),
        "b/kernel": projection(b, H),
        "c/kernel": projection(c, H),
        "gate/kernel": projection(z, HV),
        "step_size/kernel": dt.T,
        "x_conv/weight": taps(x_taps, HV),
        "b_conv/weight": taps(b_taps, H),
        "c_conv/weight": taps(c_taps, H),
        "x_conv/bias": x_bias.reshape(HV, V),
        "b_conv/bias": b_bias.reshape(H, K),
        "c_conv/bias": c_bias.reshape(H, K),
        "decay/A_log": p["A_log"],
        "decay/dt_bias": p["dt_bias"],
        "skip": p["D"],
        **({"norm_weight": p["norm.weight"].reshape(HV, V)} if "norm.weight" in p else {}),
        "project/kernel": output(p["out_proj.weight"], HV),
    }


def mla(p: Params) -> Params:
    """Keys and values beside each other per head, the latent beside the rotary key."""
    k, v = jnp.split(p["kv_b_proj.weight"].reshape(H, K + V, RANK), [K], axis=1)
    c, k_rope = parts(p["kv_a_proj_with_mqa.weight"], RANK, K_ROPE)
    given = {
        "latent/down/kernel": c.T,
        "latent/norm/weight": p["kv_a_layernorm.weight"],
        "k_rope/kernel": projection(k_rope, 1),
        "k/kernel": projection(k.reshape(H * K, RANK), H),
        "v/kernel": projection(v.reshape(H * V, RANK), H),
        "project/kernel": output(p["o_proj.weight"], H),
    }
    if "q_proj.weight" in p:
        return {**given, "q/kernel": projection(p["q_proj.weight"], H)}
    return {
        **given,
        "q_latent/down/kernel": p["q_a_proj.weight"].T,
        "q_latent/norm/weight": p["q_a_layernorm.weight"],
        "q/kernel": projection(p["q_b_proj.weight"], H),
    }


def attend(module: Any, x: Any, cache: Any, **more: Any) -> Any:
    """A layer of softmax attention, which is given its mask."""
    seen = cache.get_seq_length() if cache else 0
    mask = torch.full((x.shape[1], seen + x.shape[1]), -torch.inf).triu(seen + 1)
    return module(x, attention_mask=mask, past_key_values=cache, **more)[0]


def attend_turned(module: Any, x: Any, cache: Any) -> Any:
    """The same, given the angles of its positions."""
    seen = cache.get_seq_length() if cache else 0
    rotary = source_of("deepseek_v3").DeepseekV3RotaryEmbedding(LAYERS["deepseek_v3"].settings)
    return attend(module, x, cache, position_embeddings=rotary(x, torch.arange(seen, seen + x.shape[1])[None]))


def rglru(p: Params) -> Params:
    def by_channel(name: str) -> Params:
        return {"kernel": projection(p[f"linear_{name}.weight"], H), "bias": p[f"linear_{name}.bias"].reshape(H, -1)}

    gates = {"keep": "recurrent_gate", "write": "input_gate"}
    return {
        **{f"x/{name}": a for name, a in by_channel("x").items()},
        **{f"gate/{name}": a for name, a in by_channel("y").items()},
        "x_conv/weight": taps(p["conv_1d.weight"], H),
        "x_conv/bias": p["conv_1d.bias"].reshape(H, -1),
        **{f"{ours}/kernel": p[f"rg_lru.{theirs}_weight"] for ours, theirs in gates.items()},
        **{f"{ours}/bias": p[f"rg_lru.{theirs}_bias"] for ours, theirs in gates.items()},
        "rate": p["rg_lru.recurrent_param"].reshape(H, -1),
        "project/kernel": output(p["linear_out.weight"], H),
        "project/bias": p["linear_out.bias"],
    }


def recur(module: Any, x: Any, cache: dict | None) -> Any:
    """A recurrent block, which keeps its state itself; the cache is told how far it is, and what the state is."""
    seen = cache.get("tokens", 0) if cache is not None else 0
    positions = torch.arange(seen, seen + x.shape[1]).expand(x.shape[:2])
    y, _ = module(x, positions, None, use_cache=cache is not None)
    if cache is not None:
        cache |= {"tokens": seen + x.shape[1], "memory": module.rg_lru.recurrent_states}
    return y


GATED_DELTA = {
    "linear_num_key_heads": H,
    "linear_num_value_heads": HV,
    "linear_key_head_dim": K,
    "linear_value_head_dim": V,
}
MAMBA2 = {"heads": H, "value_heads": HV, "key_dim": K, "value_dim": V, "chunk_size": 16}
FALCON = {
    "mamba_d_ssm": HV * V,
    "mamba_n_heads": HV,
    "mamba_d_head": V,
    "mamba_d_state": K,
    "mamba_n_groups": H,
    "mamba_chunk_size": 16,
}
KIMI = {"linear_num_heads": H, "linear_head_dim": K}
LATENT = {
    "num_attention_heads": H,
    "num_key_value_heads": H,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": K,
    "qk_rope_head_dim": K_ROPE,
    "v_head_dim": V,
}
MLA = {"heads": H, "kv_rank": RANK, "nope_dim": K, "rope_dim": K_ROPE, "value_dim": V}
GDN = {"heads": H, "value_heads": HV, "key_dim": K, "value_dim": V, "chunk_size": 16}

LAYERS = {
    # hydrax follows MiniMax's own code, whose decay factor is 1 - l/(L-1) + 1e-5; transformers divides by L-1+1e-5,
    # which is the same to fp32 at the published depth.
    "minimax": Layer(
        family="minimax",
        module="MiniMaxLightningAttention",
        config={"num_attention_heads": H, "head_dim": K, "block_size": 16},
        mixer="lightning",
        options={"preset": "minimax", "heads": H, "key_dim": K, "chunk_size": 16},
        convert=minimax,
        call=lambda module, x, cache: module(x, None, None, cache)[0],
        cache=lambda config: source_of("minimax").MiniMaxCache(),
        memory=lambda cache, index: cache.get_linear_cache(index),
        index=7,
        depth=80,
    ),
    "qwen3_next": Layer(
        family="qwen3_next",
        module="Qwen3NextGatedDeltaNet",
        config=GATED_DELTA,
        mixer="gdn",
        options={"preset": "qwen3next", **GDN},
        convert=qwen3_next,
    ),
    "olmo_hybrid": Layer(
        family="olmo_hybrid",
        module="OlmoHybridGatedDeltaNet",
        config=GATED_DELTA,
        mixer="gdn",
        options={"preset": "olmo", **GDN},
        convert=olmo_hybrid,
    ),
    "kimi_linear": Layer(
        family="kimi_linear",
        module="KimiLinearDeltaAttention",
        config=KIMI,
        mixer="kda",
        options={"heads": H, "key_dim": K, "chunk_size": 16},
        convert=kda,
    ),
    "glm5_next": Layer(  # the bounded decay
        family="glm5_next_text",
        module="Glm5NextTextLinearAttention",
        config=KIMI,
        mixer="kda",
        options={"heads": H, "key_dim": K, "safe_gate": True, "chunk_size": 16},
        convert=kda,
    ),
    "mamba": Layer(
        family="mamba",
        module="MambaMixer",
        config={"state_size": K, "time_step_rank": RANK},
        mixer="mamba",
        options={"key_dim": K, "dt_rank": RANK, "chunk_size": 16},
        convert=mamba,
    ),
    "jamba": Layer(
        family="jamba",
        module="JambaMambaMixer",
        config={"mamba_d_state": K, "mamba_dt_rank": RANK},
        mixer="mamba",
        options={"key_dim": K, "dt_rank": RANK, "bcdt_norm": True, "chunk_size": 16},
        convert=jamba,
    ),
    "mamba2": Layer(
        family="mamba2",
        module="Mamba2Mixer",
        config={"num_heads": HV, "head_dim": V, "state_size": K, "n_groups": H, "chunk_size": 16},
        mixer="mamba2",
        options=MAMBA2,
        convert=mamba2,
        memory=lambda cache, index: cache.get_recurrent_state(index).swapaxes(-1, -2),
    ),
    "falcon_h1": Layer(
        family="falcon_h1",
        module="FalconH1Mixer",
        config=FALCON,
        mixer="mamba2",
        options={**MAMBA2, "norm": "none"},
        convert=mamba2,
        memory=lambda cache, index: cache.get_recurrent_state(index).swapaxes(-1, -2),
        buffers={"mup_vector": 1.0},
    ),
    "falcon_h1_norm": Layer(
        family="falcon_h1",
        module="FalconH1Mixer",
        config={**FALCON, "mamba_rms_norm": True},
        mixer="mamba2",
        options={**MAMBA2, "norm": "before_gate"},
        convert=mamba2,
        memory=lambda cache, index: cache.get_recurrent_state(index).swapaxes(-1, -2),
        buffers={"mup_vector": 1.0},
    ),
    "deepseek_v3": Layer(
        family="deepseek_v3",
        module="DeepseekV3Attention",
        config={**LATENT, "q_lora_rank": Q_RANK},
        mixer="mla",
        options={**MLA, "q_rank": Q_RANK, "rope": {"style": "interleaved"}},
        convert=mla,
        call=attend_turned,
        entry="v",
        memory=lambda cache, index: cache.layers[index].keys.swapaxes(1, 2),
    ),
    "kimi_linear_attention": Layer(  # its rotary channels do not turn
        family="kimi_linear",
        module="KimiLinearAttention",
        config={**LATENT, "layer_types": 2 * ["full_attention"]},
        mixer="mla",
        options={**MLA, "rope": {"fraction": 0.0}},
        convert=mla,
        call=attend,
        entry="v",
        memory=lambda cache, index: cache.layers[index].keys.swapaxes(1, 2),
    ),
    "recurrent_gemma": Layer(
        family="recurrent_gemma",
        module="RecurrentGemmaRecurrentBlock",
        config={"num_attention_heads": H, "lru_width": LRU},
        mixer="rglru",
        options={"heads": H, "value_dim": LRU // H, "chunk_size": 16},
        convert=rglru,
        call=recur,
        cache=lambda config: {},
        memory=lambda cache, index: cache["memory"].reshape(-1, H, LRU // H),
    ),
}
