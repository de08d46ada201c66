"""Whole models of transformers with small random weights, each beside the `ModelConfig` it should equal."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from hydrax.core.build import build
from hydrax.core.typing import Array
from hydrax.models import lm
from hydrax.models.layers import group
from hydrax.models.spec import ModelConfig, resolve
from tests.oracles.layers import (
    HV,
    LAYERS,
    RANK,
    H,
    K,
    V,
    config_of,
    output,
    projection,
    randomised,
    source_of,
    transformers,
)
from tests.oracles.parity import D, Params, check

DEPTH = 4
VOCABULARY = 67
FFN = 48
WINDOW = 8
EXPERTS, TOP_K, EXPERT_FFN = 6, 3, 24
HEADS, KV_HEADS, WIDTH = 4, 2, 16  # of softmax attention, where nothing else says it


@dataclasses.dataclass(frozen=True)
class Model:
    """A causal language model of transformers and its config here.

    Attributes:
      family, module: the model of transformers and its class.
      config: options of the model's config.
      ours: fields of `ModelConfig`.
      layers: weights behind the backbone's prefix -> those of every layer here.
      backbone, embedding, norm: the prefix of the layers' weights, and two names behind it.
      shared: the same weights -> those of common blocks here.
      cache: the name of the cache among the arguments.
      memory: config -> an empty cache of the reference.
    """

    family: str
    module: str
    config: Mapping[str, Any]
    ours: Mapping[str, Any]
    layers: Callable[[Params], list[Params]]
    backbone: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    shared: Callable[[Params], Params] = lambda p: {}
    cache: str = "past_key_values"
    memory: Callable[[Any], Any] = lambda config: transformers.DynamicCache(config=config)

    @functools.cached_property
    def settings(self) -> Any:
        """The config of the reference."""
        sizes = {"hidden_size": D, "num_hidden_layers": DEPTH, "vocab_size": VOCABULARY, "pad_token_id": None}
        return config_of(self.family, **{**sizes, **self.config})

    @functools.cached_property
    def theirs(self) -> Any:
        """The reference, every weight random."""
        return randomised(getattr(source_of(self.family), self.module)(self.settings))

    @functools.cached_property
    def constants(self) -> Params:
        """What the reference does not train: buffers by name."""
        return {name: b.float().numpy() for name, b in self.theirs.named_buffers()}

    @functools.cached_property
    def plan(self) -> lm.Blueprint:
        """The blueprint of the model."""
        values = {"d_model": D, "vocab_size": VOCABULARY, "tie": self.settings.tie_word_embeddings, **self.ours}
        return lm.blueprint(build(ModelConfig, values))

    def merge(self, p: Params) -> lm.LM:
        """The model, given weights of the reference."""
        inner = under({**self.constants, **p}, f"{self.backbone}.")
        given = {
            "embed/weight": rows(inner[f"{self.embedding}.weight"]),
            "norm/weight": inner[f"{self.norm}.weight"],
            **below("shared", self.shared(inner)),
        }
        if not self.settings.tie_word_embeddings:
            given["head/weight"] = rows(p["lm_head.weight"])
        layers = self.layers(inner)
        for j, g in enumerate(group(resolve(self.plan.cfg))):
            for i in range(len(g.period)):
                same = layers[g.start + i : g.start + g.repeats * len(g.period) : len(g.period)]
                given |= {f"periods/{j}/blocks/{i}/{name}": jnp.stack([p[name] for p in same]) for name in same[0]}
        check(given, self.plan.shapes)
        return self.plan.merge(given)


def rows(w: Array) -> Array:
    """A table [vocabulary, D] with zeros up to a multiple of 128 rows."""
    return jnp.pad(w, ((0, -len(w) % 128), (0, 0)))


def under(p: Params, prefix: str) -> Params:
    """The weights whose names start so, without that start."""
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def below(prefix: str, p: Params) -> Params:
    return {f"{prefix}/{name}": x for name, x in p.items()}


def each(block: Callable[[Params], Params]) -> Callable[[Params], list[Params]]:
    """Layers that correspond one to one."""
    return lambda p: [block(under(p, f"layers.{i}.")) for i in range(DEPTH)]


Kinds = Mapping[str, tuple[Callable[[Params], Params], Mapping[str, str]]]
"""By a weight that only this kind of layer has: the conversion of its mixer, and its norms."""

PRE = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
REORDERED = {"mixer_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
SANDWICH = {**REORDERED, "mixer_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
BEFORE_FFN = {"mixer_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"}
GRIFFIN = {"mixer_norm": "temporal_pre_norm", "ffn_norm": "channel_pre_norm"}


def layer(p: Params, mixer: Params, norms: Mapping[str, str], ffn: str = "mlp") -> Params:
    """A mixer, an FFN and their norms."""
    return {
        **below("mixer", mixer),
        **{f"{ours}/weight": p[f"{theirs}.weight"] for ours, theirs in norms.items()},
        **channels(under(p, f"{ffn}.")),
    }


def layers(kinds: Kinds, ffn: str = "mlp") -> Callable[[Params], list[Params]]:
    """Layers of several kinds."""

    def block(p: Params) -> Params:
        marker = next(name for name in kinds if name in p)
        convert, norms = kinds[marker]
        return layer(p, convert(under(p, f"{marker.partition('.')[0]}.")), norms, ffn)

    return each(block)


def channels(p: Params) -> Params:
    """An FFN of either kind."""
    return below("moe", experts(p)) if "experts.down_proj" in p else below("ffn", dense(p))


def dense(p: Params) -> Params:
    names = {f"{name}/kernel": f"{name}_proj.weight" for name in ("gate", "up", "down")}
    names |= {f"{name}/bias": f"{name}_proj.bias" for name in ("gate", "up", "down")}
    return {ours: p[theirs].T for ours, theirs in names.items() if theirs in p}


def experts(p: Params) -> Params:
    gate, up = jnp.split(p["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
    names = {
        "router": ("gate.weight", "router.weight"),
        "bias": ("gate.e_score_correction_bias",),
        "shared_gate/kernel": ("shared_expert_gate.weight",),
    }
    return {
        "experts/gate": gate,
        "experts/up": up,
        "experts/down": p["experts.down_proj"].swapaxes(1, 2),
        **{ours: p[name].T for ours, theirs in names.items() for name in theirs if name in p},
        **below("shared", dense({**under(p, "shared_expert."), **under(p, "shared_experts.")})),
    }


def attention(p: Params, heads: int = HEADS, kv_heads: int = KV_HEADS) -> dict[str, Array]:
    """Grouped queries, with norms of all channels and a bias of the output where there are any."""
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    norms = {name: p[f"{name}_norm.weight"] for name in counts if f"{name}_norm.weight" in p}
    return {
        **{f"qkv/{name}/kernel": projection(p[f"{name}_proj.weight"], n) for name, n in counts.items()},
        **{f"qkv/{name}_norm/weight": w.reshape(counts[name], -1) for name, w in norms.items()},
        "project/kernel": output(p["o_proj.weight"], heads),
        **({"project/bias": p["o_proj.bias"]} if "o_proj.bias" in p else {}),
    }


def gated_attention(p: Params) -> Params:
    """Qwen3-Next: an output gate beside the queries of each head, norms by head with weights 1 + w."""
    q, gate = jnp.split(p["q_proj.weight"].reshape(HEADS, 2 * WIDTH, D), 2, axis=1)
    plain = {name: w for name, w in p.items() if "norm" not in name}
    return {
        **attention({**plain, "q_proj.weight": q.reshape(-1, D)}),
        "qkv/q_norm/weight": 1 + p["q_norm.weight"],
        "qkv/k_norm/weight": 1 + p["k_norm.weight"],
        "gate/gate/kernel": projection(gate.reshape(-1, D), HEADS),
    }


few_heads = functools.partial(attention, heads=H, kv_heads=1)  # as many as the recurrence beside it


def side_by_side(p: Params) -> Params:
    """Falcon-H1: attention and Mamba-2, whose projections are one here."""
    parts = [attention(under(p, "self_attn.")), LAYERS["falcon_h1"].convert(under(p, "mamba."))]
    outputs = [part["project/kernel"].reshape(1, -1, D) for part in parts]
    inner = [{name: w for name, w in part.items() if name != "project/kernel"} for part in parts]
    return {
        **below("parts/0", inner[0]),
        **below("parts/1", inner[1]),
        "project/kernel": jnp.concatenate(outputs, axis=1),
    }


def nemotron_h(p: Params) -> list[Params]:
    """An FFN, which is a layer of its own there, belongs to the mixer before it here."""
    found: list[Params] = []
    for i in range(NEMOTRON_DEPTH):
        norm, inner = p[f"layers.{i}.norm.weight"], under(p, f"layers.{i}.mixer.")
        if "up_proj.weight" in inner:
            found[-1] = {**found[-1], "ffn_norm/weight": norm, **channels(inner)}
        else:
            convert = LAYERS["mamba2"].convert if "A_log" in inner else attention
            found.append({"mixer_norm/weight": norm, **below("mixer", convert(inner))})
    return found


def zamba2(p: Params) -> list[Params]:
    """Mamba-2, fed by the common blocks of the first two layers in turn.

    Their gate and up projections are one matrix there, and so is the narrow half of what every place adds to them.
    """
    found: list[Params] = []
    for i in range(ZAMBA2_DEPTH):
        own = under(p, f"layers.{i}.")
        mixer = LAYERS["mamba2"].convert(under(own, "mamba_decoder.mamba."))
        changes = f"layers.{i % 2}.shared_transformer.feed_forward.gate_up_proj_adapter_list.{i}"
        down, up = (p[f"{changes}.{half}.weight"].T for half in (0, 1))
        halves = zip(("gate", "up"), jnp.split(up, 2, axis=1), strict=True)
        found.append(
            {
                "mixer_norm/weight": own["mamba_decoder.input_layernorm.weight"],
                **below("mixer", mixer),
                **{f"feed/changes/ffn.{name}.kernel/up": w for name, w in halves},
                **{f"feed/changes/ffn.{name}.kernel/down": down for name in ("gate", "up")},
                "feed_out/kernel": own["linear.weight"].T,
            }
        )
    return found


def zamba2_shared(p: Params) -> Params:
    """The common blocks, where they occur first."""
    found: dict[str, Any] = {}
    for i, name in enumerate("ab"):
        own = under(p, f"layers.{i}.shared_transformer.")
        mixer = attention(under(own, "self_attn."), HEADS, HEADS)
        gate, up = jnp.split(own["feed_forward.gate_up_proj.weight"].T, 2, axis=1)
        found |= below(
            name,
            {
                "project/kernel": mixer.pop("project/kernel"),
                **below("mixer", mixer),
                "mixer_norm/weight": own["input_layernorm.weight"],
                "ffn_norm/weight": own["pre_ff_layernorm.weight"],
                "ffn/gate/kernel": gate,
                "ffn/up/kernel": up,
                "ffn/down/kernel": own["feed_forward.down_proj.weight"].T,
            },
        )
    return found


def mamba_block(family: str, p: Params) -> Params:
    """A norm and a mixer."""
    return {"mixer_norm/weight": p["norm.weight"], **below("mixer", LAYERS[family].convert(under(p, "mixer.")))}


def mamba(family: str, module: str) -> Model:
    """A stack of one mixer without FFNs."""
    layer = LAYERS[family]
    return Model(
        family=family,
        module=module,
        config={**layer.config, "tie_word_embeddings": True},
        ours={
            "pattern": f"{DEPTH}*{layer.mixer}",
            "mixers": {layer.mixer: layer.options},
            "ffn": "none",
            "norm_eps": 1e-5,
        },
        backbone="backbone",
        embedding="embeddings",
        norm="norm_f",
        layers=each(functools.partial(mamba_block, family)),
        cache="cache_params",
    )


GEMMA = {"heads": HEADS, "kv_heads": KV_HEADS, "key_dim": WIDTH, "scale": 24**-0.5, "softcap": 2.0}
GROUPED = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
MOE = {"experts": EXPERTS, "top_k": TOP_K, "width": EXPERT_FFN}

NEMOTRON_DEPTH, ZAMBA2_DEPTH = 7, 3
ZAMBA2 = {
    "mixer": "attn",
    "options": {"heads": HEADS, "rope": {"fraction": 0.0}, "scale": (D / HEADS) ** -0.5},
    "ffn": "geglu",
    "ffn_dim": FFN,
    "shared": True,
    "lora_rank": RANK,
    "lora_on": ("ffn.gate", "ffn.up"),
}

MODELS: dict[str, Model] = {
    "mamba": mamba("mamba", "MambaForCausalLM"),
    "mamba2": mamba("mamba2", "Mamba2ForCausalLM"),
    "gemma2": Model(
        family="gemma2",
        module="Gemma2ForCausalLM",
        config={
            **GROUPED,
            "head_dim": WIDTH,
            "intermediate_size": FFN,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        ours={
            "pattern": "2*(swa,attn)",
            "mixers": {"attn": GEMMA, "swa": {**GEMMA, "window": WINDOW}},
            "ffn": "geglu",
            "ffn_dim": FFN,
            "norm": "rmsnorm1p",
            "norm_place": "sandwich",
            "embed_scale": D**0.5,
            "logit_softcap": 3.0,
        },
        layers=layers({"self_attn.q_proj.weight": (attention, SANDWICH)}),
    ),
    "minimax": Model(
        family="minimax",
        module="MiniMaxForCausalLM",
        config={
            **LAYERS["minimax"].config,
            "num_key_value_heads": 1,
            "intermediate_size": EXPERT_FFN,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "layer_types": ["full_attention", *3 * ["linear_attention"]],  # its cache counts tokens in the first layer
            **{f"{part}_alpha_factor": 1.7 for part in ("linear_attn", "full_attn", "mlp")},
            **{f"{part}_beta_factor": 0.8 for part in ("linear_attn", "full_attn", "mlp")},
        },
        ours={
            "pattern": "attn,3*lightning",
            "mixers": {
                "lightning": LAYERS["minimax"].options,
                # the published model turns half of the channels, the reference all
                "attn": {"heads": H, "kv_heads": 1, "key_dim": K, "rope": {"theta": 1e6}},
            },
            "ffn": "moe",
            "moe": MOE,
            "norm_place": "post",
            "norm_eps": 1e-5,
            "post_alpha": 1.7,
            "post_beta": 0.8,
        },
        layers=layers(
            {
                "self_attn.qkv_proj.weight": (LAYERS["minimax"].convert, PRE),
                "self_attn.q_proj.weight": (few_heads, PRE),
            }
        ),
        memory=LAYERS["minimax"].cache,
    ),
    "olmo_hybrid": Model(
        family="olmo_hybrid",
        module="OlmoHybridForCausalLM",
        config={
            **LAYERS["olmo_hybrid"].config,
            **GROUPED,
            "intermediate_size": FFN,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        ours={
            "pattern": "3*gdn,full",
            "blocks": {"full": {"mixer": "attn", "norm_place": "reordered"}},
            "mixers": {
                "gdn": LAYERS["olmo_hybrid"].options,
                "attn": {"heads": HEADS, "kv_heads": KV_HEADS, "qk_norm": "full", "rope": {"theta": 5e5}},
            },
            "ffn_dim": FFN,
        },
        layers=layers(
            {
                "linear_attn.A_log": (LAYERS["olmo_hybrid"].convert, PRE),
                "self_attn.q_proj.weight": (attention, REORDERED),
            }
        ),
    ),
    "recurrent_gemma": Model(
        family="recurrent_gemma",
        module="RecurrentGemmaForCausalLM",
        config={
            "num_attention_heads": H,
            "num_key_value_heads": 1,
            "attention_window_size": WINDOW,
            "intermediate_size": 2 * FFN,
            "logits_soft_cap": 3.0,
        },
        ours={
            "num_layers": DEPTH,
            "pattern": "fill((2*rglru,swa))",
            "mixers": {
                "rglru": {"heads": H, "chunk_size": 16},
                "swa": {"heads": H, "kv_heads": 1, "window": WINDOW, "rope": {"fraction": 0.5}, "out_bias": True},
            },
            "ffn": "geglu",
            "ffn_dim": FFN,
            "ffn_bias": True,
            "norm": "rmsnorm1p",
            "embed_scale": 5.65625,  # the root of the width, which the reference rounds to bfloat16
            "logit_softcap": 3.0,
        },
        norm="final_norm",
        layers=layers(
            {
                "temporal_block.linear_x.weight": (LAYERS["recurrent_gemma"].convert, GRIFFIN),
                "temporal_block.q_proj.weight": (few_heads, GRIFFIN),
            },
            ffn="mlp_block",
        ),
    ),
    "jamba": Model(
        family="jamba",
        module="JambaForCausalLM",
        config={
            **LAYERS["jamba"].config,
            **GROUPED,
            "intermediate_size": FFN,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
        },
        ours={
            "pattern": "2*mamba,attn,mamba",
            "mixers": {
                "mamba": LAYERS["jamba"].options,
                "attn": {"heads": HEADS, "kv_heads": KV_HEADS, "rope": {"fraction": 0.0}},
            },
            "ffn_pattern": "2*(swiglu,moe)",
            "ffn_dim": FFN,
            "moe": {**MOE, "width": FFN, "renorm": False},
        },
        norm="final_layernorm",
        layers=layers(
            {
                "mamba.A_log": (LAYERS["jamba"].convert, BEFORE_FFN),
                "self_attn.q_proj.weight": (attention, BEFORE_FFN),
            },
            ffn="feed_forward",
        ),
    ),
    "qwen3_next": Model(
        family="qwen3_next",
        module="Qwen3NextForCausalLM",
        config={
            **LAYERS["qwen3_next"].config,
            **GROUPED,
            "head_dim": WIDTH,
            "intermediate_size": FFN,
            "mlp_only_layers": [0],
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": EXPERT_FFN,
            "shared_expert_intermediate_size": EXPERT_FFN,
        },
        ours={
            "pattern": "3*gdn,attn",
            "mixers": {
                "gdn": LAYERS["qwen3_next"].options,
                "attn": {
                    "heads": HEADS,
                    "kv_heads": KV_HEADS,
                    "key_dim": WIDTH,
                    "qk_norm": "head",
                    "out_gate": "elementwise",
                    "rope": {"fraction": 0.25},  # two frequencies
                },
            },
            "ffn_pattern": "swiglu,3*moe",
            "ffn_dim": FFN,
            "moe": {**MOE, "shared": 1, "shared_gate": True},
            "norm": "rmsnorm1p",
        },
        layers=layers(
            {
                "linear_attn.A_log": (LAYERS["qwen3_next"].convert, PRE),
                "self_attn.q_proj.weight": (gated_attention, PRE),
            }
        ),
    ),
    "deepseek_v3": Model(
        family="deepseek_v3",
        module="DeepseekV3ForCausalLM",
        config={
            **LAYERS["deepseek_v3"].config,
            "intermediate_size": FFN,
            "moe_intermediate_size": EXPERT_FFN,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "num_experts_per_tok": TOP_K,
            "n_group": 3,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
        ours={
            "pattern": f"{DEPTH}*mla",
            "mixers": {"mla": LAYERS["deepseek_v3"].options},
            "ffn_pattern": f"swiglu,{DEPTH - 1}*moe",
            "ffn_dim": FFN,
            "moe": {
                **MOE,
                "router": "sigmoid",
                "scale": 2.5,
                "bias": True,
                "shared": 2,
                "groups": 3,
                "top_groups": 2,
            },
        },
        layers=layers({"self_attn.kv_b_proj.weight": (LAYERS["deepseek_v3"].convert, PRE)}),
    ),
    # Of the fixed multipliers hydrax has those of embeddings and keys; the others are 1, as is their default.
    "falcon_h1": Model(
        family="falcon_h1",
        module="FalconH1ForCausalLM",
        config={
            **LAYERS["falcon_h1"].config,
            **GROUPED,
            "intermediate_size": FFN,
            "embedding_multiplier": 2.0,
            "key_multiplier": 0.5,
        },
        ours={
            "pattern": f"{DEPTH}*both",
            "blocks": {"both": {"mixer": "parallel(attn, mamba2)", "options": {"fusion": "concat"}}},
            "mixers": {
                "attn": {"heads": HEADS, "kv_heads": KV_HEADS, "scale": 0.5 * (D / HEADS) ** -0.5},
                "mamba2": LAYERS["falcon_h1"].options,
            },
            "ffn_dim": FFN,
            "norm_eps": 1e-5,
            "embed_scale": 2.0,
        },
        norm="final_layernorm",
        layers=each(lambda p: layer(p, side_by_side(p), BEFORE_FFN, "feed_forward")),
    ),
    "nemotron_h": Model(
        family="nemotron_h",
        module="NemotronHForCausalLM",
        config={
            **GROUPED,
            "num_hidden_layers": NEMOTRON_DEPTH,
            "hybrid_override_pattern": "M-M*-M-",
            "head_dim": D // HEADS,
            "mamba_num_heads": HV,
            "mamba_head_dim": V,
            "ssm_state_size": K,
            "n_groups": H,
            "chunk_size": 16,
            "intermediate_size": FFN,
        },
        ours={
            "pattern": "mamba2,bare,attn,mamba2",
            "blocks": {"bare": {"mixer": "mamba2", "ffn": "none"}},
            "mixers": {
                "mamba2": LAYERS["mamba2"].options,
                "attn": {"heads": HEADS, "kv_heads": KV_HEADS, "rope": {"fraction": 0.0}},
            },
            "ffn": "relu2",
            "ffn_dim": FFN,
            "norm_eps": 1e-5,
        },
        embedding="embeddings",
        norm="norm_f",
        layers=nemotron_h,
    ),
    # The published activation is the exact GELU; the tanh form is an option of the reference.
    "zamba2": Model(
        family="zamba2",
        module="Zamba2ForCausalLM",
        config={
            "num_hidden_layers": ZAMBA2_DEPTH,
            "layers_block_type": ZAMBA2_DEPTH * ["hybrid"],
            "num_mem_blocks": 2,
            "num_attention_heads": HEADS,
            "adapter_rank": RANK,
            "n_mamba_heads": HV,
            "mamba_d_state": K,
            "mamba_ngroups": H,
            "chunk_size": 16,
            "intermediate_size": FFN,
            "hidden_act": "gelu_pytorch_tanh",
        },
        ours={
            "pattern": "by_a,by_b,by_a",
            "blocks": {
                "a": ZAMBA2,
                "b": ZAMBA2,
                "by_a": {"mixer": "mamba2", "feed": "a"},
                "by_b": {"mixer": "mamba2", "feed": "b"},
            },
            "mixers": {"mamba2": LAYERS["mamba2"].options},
            "ffn": "none",
            "norm_eps": 1e-5,
        },
        norm="final_layernorm",
        layers=zamba2,
        shared=zamba2_shared,
    ),
}
