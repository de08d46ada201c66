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
      memory: (cache, index) -> the mixer's "memory".
      index, depth: position among the layers of the model.
    """

    family: str
    module: str
    config: Params
    mixer: str
    options: Params
    convert: Callable[[Params], Params]
    call: Callable[[Any, Any, Any], Any] = lambda module, x, cache: module(x, cache_params=cache)
    cache: Callable[[Any], Any] = lambda config: transformers.DynamicCache(config=config)
    memory: Callable[[Any, int], Any] = lambda cache, index: cache.get_recurrent_state(index)
    index: int = 0
    depth: int = 2

    @functools.cached_property
    def settings(self) -> Any:
        """The config of the reference's model."""
        return config_of(self.family, hidden_size=D, num_hidden_layers=self.depth, **self.config)

    @functools.cached_property
    def theirs(self) -> Any:
        """The reference's layer, every weight random."""
        return randomised(getattr(source_of(self.family), self.module)(self.settings, self.index))

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
    """The module in evaluation mode, its weights normal, matrices divided by the root of their fan-in."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
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
        "norm_weight": p["norm.weight"].reshape(HV, V),
        "project/kernel": output(p["out_proj.weight"], HV),
    }


GATED_DELTA = {
    "linear_num_key_heads": H,
    "linear_num_value_heads": HV,
    "linear_key_head_dim": K,
    "linear_value_head_dim": V,
}
KIMI = {"linear_num_heads": H, "linear_head_dim": K}
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
    "mamba2": Layer(
        family="mamba2",
        module="Mamba2Mixer",
        config={"num_heads": HV, "head_dim": V, "state_size": K, "n_groups": H, "chunk_size": 16},
        mixer="mamba2",
        options={"heads": H, "value_heads": HV, "key_dim": K, "value_dim": V, "chunk_size": 16},
        convert=mamba2,
        memory=lambda cache, index: cache.get_recurrent_state(index).swapaxes(-1, -2),
    ),
}
