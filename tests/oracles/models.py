"""Whole models of transformers with small random weights, each beside the `ModelConfig` it should equal."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from hydrax.core.build import build
from hydrax.core.typing import Array
from hydrax.models import lm
from hydrax.models.spec import ModelConfig, group, resolve
from tests.oracles.layers import LAYERS, config_of, output, projection, randomised, source_of
from tests.oracles.parity import D, Params, check

DEPTH = 4
VOCABULARY = 67
FFN = 48


@dataclasses.dataclass(frozen=True)
class Model:
    """A causal language model of transformers and its config here.

    Attributes:
      family, module: the model of transformers and its class.
      config: options of the model's config.
      ours: fields of `ModelConfig`.
      backbone: prefix of the layers' weights.
      embedding, norm: names of these weights behind it.
      block: (weights of one layer) -> those of a block here.
      cache: the name of the cache among the arguments.
      centre: what is added to the weights of norms.
    """

    family: str
    module: str
    config: Mapping[str, Any]
    ours: Mapping[str, Any]
    backbone: str
    embedding: str
    norm: str
    block: Callable[[Params], Params]
    cache: str
    centre: float = 0.0

    @functools.cached_property
    def settings(self) -> Any:
        """The config of the reference."""
        sizes = {"hidden_size": D, "num_hidden_layers": DEPTH, "vocab_size": VOCABULARY, "pad_token_id": None}
        return config_of(self.family, **sizes, **self.config)

    @functools.cached_property
    def theirs(self) -> Any:
        """The reference, every weight random."""
        return randomised(getattr(source_of(self.family), self.module)(self.settings))

    @functools.cached_property
    def plan(self) -> lm.Blueprint:
        """The blueprint of the model."""
        values = {"d_model": D, "vocab_size": VOCABULARY, "tie": self.settings.tie_word_embeddings, **self.ours}
        return lm.blueprint(build(ModelConfig, values))

    def merge(self, p: Params) -> lm.LM:
        """The model, given weights of the reference."""
        given = {
            "embed/weight": rows(p[f"{self.backbone}.{self.embedding}.weight"]),
            "norm/weight": self.centre + p[f"{self.backbone}.{self.norm}.weight"],
        }
        if not self.settings.tie_word_embeddings:
            given["head/weight"] = rows(p["lm_head.weight"])
        layers = [self.block(under(p, f"{self.backbone}.layers.{i}.")) for i in range(DEPTH)]
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


def mamba_block(layer: str, p: Params) -> Params:
    """A norm and a mixer."""
    return {"mixer_norm/weight": p["norm.weight"], **below("mixer", LAYERS[layer].convert(under(p, "mixer.")))}


HEADS, KV_HEADS, WIDTH = 4, 2, 16  # a quarter of the channels turns, at two frequencies


def qwen3_next_attention(p: Params) -> Params:
    q, gate = jnp.split(p["q_proj.weight"].reshape(HEADS, 2 * WIDTH, D), 2, axis=1)  # of one head beside each other
    return {
        "qkv/q/kernel": projection(q.reshape(-1, D), HEADS),
        "qkv/k/kernel": projection(p["k_proj.weight"], KV_HEADS),
        "qkv/v/kernel": projection(p["v_proj.weight"], KV_HEADS),
        "qkv/q_norm/weight": 1 + p["q_norm.weight"],
        "qkv/k_norm/weight": 1 + p["k_norm.weight"],
        "gate/gate/kernel": projection(gate.reshape(-1, D), HEADS),
        "project/kernel": output(p["o_proj.weight"], HEADS),
    }


def qwen3_next_block(p: Params) -> Params:
    """Norms, a mixer of either kind, and a dense FFN."""
    linear, full = under(p, "linear_attn."), under(p, "self_attn.")
    mixer = LAYERS["qwen3_next"].convert(linear) if linear else qwen3_next_attention(full)
    return {
        "mixer_norm/weight": 1 + p["input_layernorm.weight"],
        "ffn_norm/weight": 1 + p["post_attention_layernorm.weight"],
        **below("mixer", mixer),
        **{f"ffn/{name}/kernel": p[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")},
    }


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
        block=functools.partial(mamba_block, family),
        cache="cache_params",
    )


MODELS = {
    "mamba": mamba("mamba", "MambaForCausalLM"),
    "mamba2": mamba("mamba2", "Mamba2ForCausalLM"),
    # Dense instead of mixture-of-experts FFNs, which the reference has as an option.
    "qwen3_next": Model(
        family="qwen3_next",
        module="Qwen3NextForCausalLM",
        config={
            **LAYERS["qwen3_next"].config,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": WIDTH,
            "intermediate_size": FFN,
            "mlp_only_layers": list(range(DEPTH)),
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
                    "rope": {"fraction": 0.25},
                },
            },
            "ffn_dim": FFN,
        },
        backbone="model",
        embedding="embed_tokens",
        norm="norm",
        block=qwen3_next_block,
        cache="past_key_values",
        centre=1.0,
    ),
}
