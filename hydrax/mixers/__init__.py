"""The table of mixers: to register one is to add its row, and to pass `tests/contract`."""

import functools
import math
from typing import Any, cast

from hydrax.core.build import ConfigError
from hydrax.core.registry import load
from hydrax.mixers.base import Context, Mixer, MixerConfig, Row
from hydrax.ops.sparse import lifetimes

TABLE: dict[str, Row] = {
    "aaren": Row(
        path="hydrax.mixers.average.slots:Aaren",
        about="softmax attention with learned queries, as a recurrence",
        paper="2405.13956",
        transition="stabilised",
        linear=("memory/numerator",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * c.heads * c.slots * (c.value_dim + 2),
        flops=lambda c, n: 2 * c.heads * c.slots * (c.key_dim + 2 * c.value_dim),
    ),
    "abc": Row(
        path="hydrax.mixers.linear.abc:ABC",
        about="slots that hold running averages of keys and values, read by a softmax",
        paper="2110.02488",
        transition="diag",
        linear=("memory/k", "memory/v"),
        tiny={"heads": 2, "slots": 8, "key_dim": 8, "value_dim": 16, "feature": "silu"},
        state_bytes=lambda c, n, b: 4 * c.heads * c.slots * (c.key_dim + c.value_dim + 1),
        flops=lambda c, n: 4 * c.heads * c.slots * (c.key_dim + c.value_dim),
    ),
    "agent": Row(
        path="hydrax.mixers.average.slots:Agent",
        about="learned agents that average the past by softmax, read by a softmax",
        paper="2312.08874",
        transition="stabilised",
        linear=("memory/numerator",),
        tiny={"heads": 2, "agents": 5, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: (
            4 * c.heads * c.agents * (c.value_dim + 2) + b * max(0, c.conv_width - 1) * c.heads * c.value_dim
        ),
        flops=lambda c, n: 2 * c.heads * (2 * c.agents * (c.key_dim + c.value_dim) + c.conv_width * c.value_dim),
    ),
    "attn": Row(
        path="hydrax.mixers.softmax.attn:Attention",
        about="causal softmax attention, grouped queries",
        paper="1706.03762",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "qk_norm": "head", "out_gate": "elementwise", "softcap": 20.0},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: c.flops(n),
    ),
    "based": Row(
        path="hydrax.mixers.linear.taylor:Based",
        about="linear attention with the Taylor polynomial of the exponential, without positions",
        paper="2402.18668",
        transition="none",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 4, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * math.prod(c.state_shape),
        flops=lambda c, n: 4 * math.prod(c.state_shape),
    ),
    "deltanet": Row(
        path="hydrax.mixers.linear.deltanet:DeltaNet",
        about="delta rule without decay",
        paper="2406.06484",
        transition="full",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16, "allow_neg_eigval": True, "out_gate": "silu"},
        state_bytes=lambda c, n, b: 4 * _matrix(c) + b * _tails(c),
        flops=lambda c, n: 6 * _matrix(c),
    ),
    "depthwise_conv": Row(
        path="hydrax.mixers.average.local:DepthwiseConv",
        about="short convolution by channel, in heads, without a gate",
        paper="2205.12956",
        transition="none",
        tiny={"heads": 2, "value_dim": 16, "width": 4},
        state_bytes=lambda c, n, b: b * (c.width - 1) * c.heads * c.value_dim,
        flops=lambda c, n: 2 * c.width * c.heads * c.value_dim,
    ),
    "dma": Row(
        path="hydrax.mixers.sparse.dma:DynamicMaskAttention",
        about="softmax attention to the keys whose values score best, each with a bias of that score",
        paper="2508.02124",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "keep": 6, "keep_last": 2},
        state_bytes=lambda c, n, b: _cache(c, c.slots(n), b, c.kv_heads, facts=3),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * lifetimes.Window(c.slots(n)).visible(n),
    ),
    "dsa": Row(
        path="hydrax.mixers.sparse.dsa:IndexedAttention",
        about="softmax attention of each query to the tokens that a small indexer scores best",
        paper="2512.02556",
        transition="chosen",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "keep": 5, "index_heads": 2, "index_dim": 8},
        state_bytes=lambda c, n, b: _cache(c, n, b) + 4 * n * c.index_dim,
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * lifetimes.Window(min(n, c.keep)).visible(n)
            + c.index_heads * (2 * c.index_dim + 2) * (n + 1) / 2
        ),
    ),
    "efficient": Row(
        path="hydrax.mixers.average.slots:Efficient",
        about="key features that average the past, each by a softmax of its own",
        paper="1812.01243",
        transition="stabilised",
        linear=("memory/numerator",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * c.heads * c.key_dim * (c.value_dim + 2),
        flops=lambda c, n: 4 * c.heads * c.key_dim * c.value_dim,
    ),
    "evict_linear": Row(
        path="hydrax.mixers.sparse.evict_linear:EvictLinear",
        about="softmax attention over a window, and a matrix state of what has left it",
        paper="2507.09025",
        transition="lse",
        linear=("memory",),
        tiny={"heads": 4, "key_dim": 8, "value_dim": 8, "window": 5, "norm_eps": 1e-3},
        state_bytes=lambda c, n, b: (
            min(n, c.window) * (c.heads * (c.key_dim + c.value_dim) * b + 8 + 4 * sum(map(math.prod, c.gates.values())))
            + 4 * math.prod(c.state_shape)
        ),
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * lifetimes.Window(c.window).visible(n)
            + (6 if "beta" in c.gates else 4) * math.prod(c.state_shape)
        ),
    ),
    "fastmax": Row(
        path="hydrax.mixers.linear.taylor:Fastmax",
        about="linear attention with a polynomial of the scores of normed queries and keys",
        paper="2402.07901",
        transition="none",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 4, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * math.prod(c.state_shape),
        flops=lambda c, n: 4 * math.prod(c.state_shape),
    ),
    "fixedqk": Row(
        path="hydrax.mixers.softmax.fixedqk:FixedQK",
        about="softmax attention with weights that depend on positions alone: an ablation",
        paper="2510.11602",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * (n + 1) / 2,
    ),
    "flow": Row(
        path="hydrax.mixers.linear.flow:Flow",
        about="linear attention in which keys compete for what flows into queries",
        paper="2202.06258",
        transition="none",
        linear=("k", "q", "k_out", "q_in", "strength", "memory"),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * (_matrix(c) + c.heads * (4 * c.key_dim + 1)),
        flops=lambda c, n: 4 * _matrix(c) + 16 * c.heads * c.key_dim,
    ),
    "gated_conv": Row(
        path="hydrax.mixers.average.gated_conv:GatedConv",
        about="gated convolution: short, without a recurrence, or of large or long kernels",
        paper="2405.07992",
        transition="none",
        tiny={"inner_dim": 48, "conv_width": 5, "conv_activation": "silu"},
        state_bytes=lambda c, n, b: c.state_bytes(b),
        flops=lambda c, n: c.flops(n),
    ),
    "gdn": Row(
        path="hydrax.mixers.linear.gdn:GatedDeltaNet",
        about="gated delta rule, scalar decay",
        paper="2412.06464",
        transition="full",
        linear=("memory",),
        tiny={"heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 16, "allow_neg_eigval": True},
        state_bytes=lambda c, n, b: 4 * _matrix(c) + b * _tails(c),
        flops=lambda c, n: 6 * _matrix(c),
    ),
    "gecko": Row(
        path="hydrax.mixers.average.megalodon:Gecko",
        about="megalodon over two chunks, with a memory of those before",
        paper="2601.06463",
        transition="stabilised",
        linear=("memory/averages", "memory/values"),
        tiny={"heads": 2, "key_dim": 8, "inner_dim": 32, "chunk": 3, "modes": 3, "groups": 8},
        state_bytes=lambda c, n, b: c.fixed_bytes + _chunk_cache(c, n, b, 2 * c.key_dim),
        flops=lambda c, n: (
            _averaged(c)
            + 2 * c.heads * (c.key_dim + c.value_dim) * c.alive.visible(n)
            + (6 * c.heads * c.key_dim * c.value_dim if n > c.alive.reach else 0)
        ),
    ),
    "gla": Row(
        path="hydrax.mixers.linear.gla:GLA",
        about="gated linear attention, decay per key channel",
        paper="2312.06635",
        transition="diag",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16, "gate_rank": 4},
        state_bytes=lambda c, n, b: 4 * _matrix(c),
        flops=lambda c, n: 4 * _matrix(c),
    ),
    "gsa": Row(
        path="hydrax.mixers.linear.gsa:GSA",
        about="slots that forget by a gate, read by a softmax",
        paper="2409.07146",
        transition="diag",
        linear=("memory",),
        tiny={"heads": 2, "slots": 8, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * c.heads * c.slots * (c.key_dim + c.value_dim),
        flops=lambda c, n: 4 * c.heads * c.slots * (c.key_dim + c.value_dim),
    ),
    "hcam": Row(
        path="hydrax.mixers.sparse.hcam:HierarchicalChunkAttention",
        about="softmax attention over the last chunks, and inside the chunks whose mean keys score highest",
        paper="2105.14039",
        transition="groups",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "chunk": 4, "top": 4},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * min((n + 1) / 2, c.chunk * (1.5 + c.top))
            + 2 * c.heads * c.key_dim * n / (2 * c.chunk)
        ),
    ),
    "hgrn": Row(
        path="hydrax.mixers.linear.hgrn:HGRN",
        about="gated recurrence per channel, forget gates bounded by depth",
        paper="2311.04823",
        transition="diag",
        linear=("memory",),
        tiny={"value_dim": 24},
        state_bytes=lambda c, n, b: 4 * c.value_dim * (2 if c.complex else 1),
        flops=lambda c, n: c.value_dim * (13 if c.complex else 4),
        lower_bound=lambda c: c.value_dim,
    ),
    "hgrn2": Row(
        path="hydrax.mixers.linear.hgrn2:HGRN2",
        about="gated linear attention whose keys are what its gates forget",
        paper="2404.07904",
        transition="diag",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * _matrix(c),
        flops=lambda c, n: 4 * _matrix(c),
        lower_bound=lambda c: c.heads * c.key_dim,
    ),
    "inline": Row(
        path="hydrax.mixers.linear.inline:InLine",
        about="the covariance of keys and values so far, read by queries, beside the mean of the values",
        paper="2412.06590",
        transition="scalar",
        linear=("k", "v", "memory"),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: (
            4 * (_matrix(c) + c.heads * (c.key_dim + c.value_dim))
            + b * max(0, c.conv_width - 1) * c.heads * c.value_dim
        ),
        flops=lambda c, n: 4 * _matrix(c) + 2 * c.conv_width * c.heads * c.value_dim,
    ),
    "infllm2": Row(
        path="hydrax.mixers.sparse.infllm2:SpanScoredAttention",
        about="softmax attention to near blocks of tokens, and to those that means of short spans score",
        paper="2509.24663",
        transition="chosen",
        tiny={
            "heads": 4,
            "kv_heads": 2,
            "key_dim": 8,
            "block": 4,
            "kernel": 4,
            "stride": 2,
            "topk": 3,
            "local": 1,
            "dense_len": 9,
        },
        state_bytes=lambda c, n, b: _cache(c, n, b) + 4 * -(-n // c.stride) * c.kv_heads * c.key_dim,
        flops=lambda c, n: (
            2
            * c.heads
            * (c.key_dim + c.value_dim)
            * lifetimes.Window(max(c.dense_len, c.block * c.choice.count)).visible(n)
            + 2 * c.heads * c.key_dim * n / (2 * c.stride)
        ),
    ),
    "kda": Row(
        path="hydrax.mixers.linear.kda:KimiDeltaAttention",
        about="gated delta rule, decay per key channel",
        paper="2510.26692",
        transition="full",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16, "gate_rank": 4, "allow_neg_eigval": True},
        state_bytes=lambda c, n, b: 4 * _matrix(c) + b * _tails(c),
        flops=lambda c, n: 6 * _matrix(c),
    ),
    "lightning": Row(
        path="hydrax.mixers.linear.lightning:Lightning",
        about="linear attention with a constant decay per head and layer",
        paper="2405.17381",
        transition="scalar",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * math.prod(c.state_shape),
        flops=lambda c, n: 4 * math.prod(c.state_shape),
    ),
    "landmark": Row(
        path="hydrax.mixers.sparse.landmark:LandmarkAttention",
        about="softmax attention in which the last token of every section weighs its section",
        paper="2305.16300",
        transition="groups",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "section": 3},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * (n + 1) / 2,
    ),
    "linear_attn": Row(
        path="hydrax.mixers.linear.linear_attn:LinearAttention",
        about="linear attention without decay, by a choice of feature maps",
        paper="2006.16236",
        transition="none",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16, "feature_map": "hedgehog"},
        state_bytes=lambda c, n, b: 4 * math.prod(c.state_shape),
        flops=lambda c, n: 4 * (math.prod(c.state_shape) + c.heads * c.map_matrices * c.key_dim**2),
    ),
    "lstm": Row(
        path="hydrax.mixers.average.lstm:LSTM",
        about="the LSTM, heads with a recurrent matrix each: serial, however it is trained",
        paper="2510.06828",
        transition="nonlinear",
        tiny={"heads": 2, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * 2 * c.heads * c.value_dim,
        flops=lambda c, n: 2 * 4 * c.heads * c.value_dim**2,
    ),
    "mamba": Row(
        path="hydrax.mixers.linear.mamba:Mamba",
        about="selective state space, decay per channel and state",
        paper="2312.00752",
        transition="diag",
        linear=("memory",),
        tiny={"value_dim": 24, "key_dim": 4, "dt_rank": 3},
        state_bytes=lambda c, n, b: c.value_dim * (4 * c.key_dim + b * (c.conv_width - 1)),
        flops=lambda c, n: 4 * c.value_dim * c.key_dim,
    ),
    "mamba2": Row(
        path="hydrax.mixers.linear.mamba2:Mamba2",
        about="state-space duality, scalar decay, grouped keys and queries",
        paper="2405.21060",
        transition="scalar",
        linear=("memory",),
        tiny={"heads": 1, "value_heads": 4, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * _matrix(c) + b * _tails(c),
        flops=lambda c, n: 4 * _matrix(c),
        head_option="value_heads",
    ),
    "max_pool": Row(
        path="hydrax.mixers.average.local:MaxPool",
        about="largest of the last few tokens, by channel",
        paper="2205.12956",
        transition="none",
        tiny={"heads": 2, "value_dim": 16, "width": 3},
        state_bytes=lambda c, n, b: 4 * (c.width - 1) * c.heads * c.value_dim,
        flops=lambda c, n: (c.width - 1) * c.heads * c.value_dim,
    ),
    "mega": Row(
        path="hydrax.mixers.average.mega:Mega",
        about="moving averages, and softmax attention in chunks over what they make of the tokens",
        paper="2209.10655",
        transition="groups",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "inner_dim": 32, "chunk": 6, "modes": 3},
        state_bytes=lambda c, n, b: (
            4 * c.width * c.modes + min(n, c.chunk) * ((c.heads * c.key_dim + c.inner_dim) * b + 8)
        ),
        flops=lambda c, n: 4 * c.width * c.modes + 2 * (c.heads * c.key_dim + c.inner_dim) * c.visible(n),
    ),
    "megalodon": Row(
        path="hydrax.mixers.average.megalodon:Megalodon",
        about="softmax attention in chunks over complex moving averages, under a norm by the past",
        paper="2404.08801",
        transition="lse",
        linear=("memory/averages",),
        tiny={"heads": 2, "key_dim": 8, "inner_dim": 32, "chunk": 6, "modes": 3, "groups": 8},
        state_bytes=lambda c, n, b: c.fixed_bytes + _chunk_cache(c, n, b, c.key_dim),
        flops=lambda c, n: _averaged(c) + 2 * c.heads * (c.key_dim + c.value_dim) * c.alive.visible(n),
    ),
    "mla": Row(
        path="hydrax.mixers.softmax.mla:LatentAttention",
        about="softmax attention whose keys and values are made of one low-rank latent",
        paper="2405.04434",
        transition="lse",
        tiny={"heads": 4, "q_rank": 24, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 12},
        state_bytes=lambda c, n, b: n * ((c.kv_rank + c.rope_dim) * b + 8),
        flops=lambda c, n: 2 * c.heads * (c.nope_dim + c.rope_dim + c.value_dim) * (n + 1) / 2,
    ),
    "mlp": Row(
        path="hydrax.mixers.softmax.mlp:MLP",
        about="no mixing at all, as many parameters as softmax attention: an ablation",
        paper="2510.11602",
        transition="none",
        tiny={"inner_dim": 24},
        state_bytes=lambda c, n, b: 0,
        flops=lambda c, n: 0,
    ),
    "moba": Row(
        path="hydrax.mixers.sparse.moba:BlockAttention",
        about="softmax attention to the own block of tokens, and to those whose mean keys score best",
        paper="2502.13189",
        transition="chosen",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "block": 3, "top": 3},
        state_bytes=lambda c, n, b: _cache(c, n, b) + 4 * -(-n // c.block) * c.kv_heads * c.key_dim,
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * min((n + 1) / 2, c.block * (c.top - 0.5))
            + 2 * c.heads * c.key_dim * n / (2 * c.block)
        ),
    ),
    "mosa": Row(
        path="hydrax.mixers.sparse.mosa:MixtureOfSparseAttention",
        about="every head attends among the tokens that it chooses itself",
        paper="2505.00315",
        transition="lse",
        tiny={"heads": 4, "key_dim": 8, "sparsity": 1, "start": 0.0},
        state_bytes=lambda c, n, b: _cache(c, c.slots(n), b, c.kv_heads, facts=2) + 4 * c.heads,
        flops=lambda c, n: c.heads * (c.key_dim + c.value_dim) * c.slots(n) * (c.slots(n) + 1) / n,
    ),
    "nats": Row(
        path="hydrax.mixers.sparse.nats:NeuralAttentionSearch",
        about="softmax attention whose keys live for ever, until the next such key, or for a window",
        paper="2502.13251",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "sliding": 4},
        state_bytes=lambda c, n, b: _cache(c, c.slots(n), b, c.kv_heads, facts=3) + 4 * c.kv_heads * bool(c.capacity),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * (n + 1) / 2,
    ),
    "nonapprox": Row(
        path="hydrax.mixers.linear.nonapprox:NonApprox",
        about="softmax over the past of scores that each belong to one token: an ablation",
        paper="2510.11602",
        transition="stabilised",
        linear=("memory/numerator",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * c.heads * (c.value_dim + 2),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + 2 * c.value_dim),
    ),
    "nsa": Row(
        path="hydrax.mixers.sparse.nsa:NativeSparseAttention",
        about="softmax attention to spans made into tokens, the blocks these choose, and a window, gated",
        paper="2502.11089",
        transition="chosen",
        tiny={
            "heads": 4,
            "kv_heads": 2,
            "key_dim": 8,
            "block": 4,
            "kernel": 4,
            "stride": 2,
            "top": 3,
            "window": 5,
            "compress": "weighted",
        },
        state_bytes=lambda c, n, b: (
            _cache(c, n, b)
            + (_cache(c, min(n, c.window), b) if c.kv_sharing == "separate" else 0)
            + 4 * -(-n // c.stride) * c.roles * c.kv_heads * (c.key_dim + c.value_dim)
        ),
        flops=lambda c, n: (
            2
            * c.heads
            * (c.key_dim + c.value_dim)
            * (
                lifetimes.Window(c.block * c.top).visible(n)
                + lifetimes.Window(c.window).visible(n)
                + n / (2 * c.stride)
            )
            + c.compress_flops
        ),
    ),
    "rat": Row(
        path="hydrax.mixers.average.rat:Rat",
        about="gated averages within chunks, softmax attention to the ends of chunks",
        paper="2507.04416",
        transition="chosen",
        linear=("memory",),
        tiny={"heads": 4, "groups": 2, "width": 8, "chunk": 4},
        state_bytes=lambda c, n, b: 8 * c.heads * c.width + c.slots(n) * (2 * c.heads * c.width * b + 8),
        flops=lambda c, n: 4 * c.heads * c.width * (n / (2 * c.chunk) + 1),
    ),
    "retention": Row(
        path="hydrax.mixers.linear.retention:Retention",
        about="linear attention with rotary positions and a constant decay per head",
        paper="2307.08621",
        transition="scalar",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 8, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * _matrix(c),
        flops=lambda c, n: 4 * _matrix(c),
    ),
    "rglru": Row(
        path="hydrax.mixers.linear.rglru:RGLRU",
        about="gated recurrence per channel whose decay sets how much it writes",
        paper="2402.19427",
        transition="diag",
        linear=("memory",),
        tiny={"heads": 2, "value_dim": 12},
        state_bytes=lambda c, n, b: c.heads * c.value_dim * (4 + b * (c.conv_width - 1)),
        flops=lambda c, n: 4 * c.heads * c.value_dim,
    ),
    "routing": Row(
        path="hydrax.mixers.sparse.routing:RoutingAttention",
        about="softmax attention to the last tokens of one's own cluster, found by k-means over keys",
        paper="2003.05997",
        transition="groups",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "clusters": 3, "window": 4},
        state_bytes=lambda c, n, b: _cache(c, c.slots(n), b, c.kv_heads, facts=4) + 4 * c.kv_heads * c.clusters,
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * lifetimes.Window(c.window).visible(max(1, n // c.clusters))
            + 2 * c.kv_heads * c.clusters * c.key_dim
        ),
    ),
    "sha_rnn": Row(
        path="hydrax.mixers.average.lstm:ShaRNN",
        about="the LSTM, and one softmax attention to its outputs without projections to keys and values",
        paper="1911.11423",
        transition="nonlinear",
        tiny={"heads": 2, "value_dim": 16, "window": 7},
        state_bytes=lambda c, n, b: 4 * 2 * c.heads * c.value_dim + c.slots(n) * (c.heads * c.value_dim * b + 8),
        flops=lambda c, n: 4 * c.heads * c.value_dim * (2 * c.value_dim + lifetimes.Window(c.slots(n)).visible(n)),
    ),
    "short_long_conv": Row(
        path="hydrax.mixers.average.mega:ShortLongConv",
        about="linear attention over a short and a long convolution",
        paper="2406.08128",
        transition="diag",
        tiny={"heads": 2, "key_dim": 8, "inner_dim": 32, "modes": 3},
        state_bytes=lambda c, n, b: c.state_bytes(b),
        flops=lambda c, n: c.flops(n),
        linear=("filter", "memory"),
    ),
    "staticqk": Row(
        path="hydrax.mixers.softmax.staticqk:StaticQK",
        about="softmax attention with queries and keys of the token embeddings: an ablation",
        paper="2510.11602",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * (n + 1) / 2,
    ),
    "stochastic": Row(
        path="hydrax.mixers.sparse.stochastic:StochasticAttention",
        about="softmax attention over a sliding window, and over one in a random order of the tokens",
        paper="2604.00754",
        transition="groups",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "window": 4, "width": 8, "table": 16},
        state_bytes=lambda c, n, b: _cache(c, n, b),
        flops=lambda c, n: (
            2 * c.heads * (c.key_dim + c.value_dim) * (lifetimes.Window(c.window).visible(n) + min(n, c.width + 1) / 2)
        ),
    ),
    "swa": Row(
        path="hydrax.mixers.sparse.swa:SlidingWindowAttention",
        about="softmax attention over a sliding window, or another static pattern of keys",
        paper="2309.17453",
        transition="lse",
        tiny={"heads": 4, "kv_heads": 2, "key_dim": 8, "window": 7, "sinks": True, "sink_tokens": 2},
        state_bytes=lambda c, n, b: _cache(c, c.lifetimes.slots(n), b, c.lifetimes.rows),
        flops=lambda c, n: 2 * c.heads * (c.key_dim + c.value_dim) * c.lifetimes.visible(n),
    ),
    "taylor": Row(
        path="hydrax.mixers.linear.taylor:Taylor",
        about="attention with the exponential's Taylor polynomial of degree 2: an ablation",
        paper="2510.11602",
        transition="none",
        linear=("memory",),
        tiny={"heads": 2, "key_dim": 4, "value_dim": 16},
        state_bytes=lambda c, n, b: 4 * math.prod(c.state_shape),
        flops=lambda c, n: 4 * math.prod(c.state_shape),
    ),
    "token_gate": Row(
        path="hydrax.mixers.average.token_gate:TokenGate",
        about="what is read, gated by a small network that looks along the row and over channels",
        paper="2403.02411",
        transition="diag",
        tiny={"taps": 3, "inner_dim": 48},
        state_bytes=lambda c, n, b: c.state_bytes(b),
        flops=lambda c, n: c.flops,
    ),
}


def _value_heads(c: Any) -> int:
    return getattr(c, "value_heads", c.heads)


def _matrix(c: Any) -> int:
    """Entries of a matrix state, K × V per value head."""
    return _value_heads(c) * c.key_dim * c.value_dim


def _tails(c: Any) -> int:
    """Entries that the short convolutions on queries, keys and values keep."""
    return (c.conv_width - 1) * (2 * c.heads * c.key_dim + _value_heads(c) * c.value_dim)


def _cache(c: Any, slots: int, b: int, by_head: int = 1, facts: int = 2) -> int:
    """Bytes of the keys and values of that many tokens; 0 if another has them.

    With them, of all heads or `by_head`, 4 bytes each for position, document and what else there is in `facts`.
    """
    return 0 if c.kv == "shared" else slots * (c.kv_heads * (c.key_dim + c.value_dim) * b + 4 * facts * by_head)


def _chunk_cache(c: Any, n: int, b: int, keys: int) -> int:
    """Bytes of the tokens whose chunks are visible, with so many key channels per head."""
    return min(n, c.alive.reach) * (c.heads * (keys + c.value_dim) * b + 8)


def _averaged(c: Any) -> int:
    """FLOPs of complex averages: h ← q h + p x, Re γ h."""
    return 14 * c.width * c.modes


def names() -> list[str]:
    """All registered mixers."""
    return sorted(TABLE)


def row(name: str) -> Row:
    """The table row of a mixer.

    Raises:
      ConfigError: no mixer of that name.
    """
    if name not in TABLE:
        raise ConfigError("mixer", name, f"expected one of {', '.join(names())}")
    return TABLE[name]


@functools.cache
def get(name: str) -> type[Mixer]:
    """The class of a mixer."""
    return cast(type[Mixer], load(row(name).path))


__all__ = ["TABLE", "Context", "Mixer", "MixerConfig", "Row", "get", "names", "row"]
