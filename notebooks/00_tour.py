# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour: train a hybrid, change it, compare
#
# A *hybrid* language model stacks layers that remember in different ways. Softmax attention keeps the keys and values
# of every token and looks all of them up again, so its memory grows with the text. A recurrent layer keeps one matrix
# $S$ of fixed size; that of the gated delta rule (`gdn`) is
#
# $$ S_t = \alpha_t\,(I - \beta_t k_t k_t^\top)\,S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = S_t^\top q_t , $$
#
# it forgets by $\alpha_t$, replaces what was stored under the key $k_t$, and never grows. Which kind of layer sits
# where is one line of config. This notebook trains three such lines for a moment each, on the source of Python's
# standard library, and compares what they learn and what they cost. It takes about a minute and a half on four CPU
# cores.

# %%
import json
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import hydrax

plt.style.use("./hydrax.mplstyle")
STEPS = int(os.environ.get("HYDRAX_NOTEBOOK_STEPS", 120))  # training steps of every model
RUNS = pathlib.Path(tempfile.mkdtemp(prefix="hydrax_tour_"))  # run this cell again to start afresh

# %% [markdown]
# ## A config, and its pattern
#
# `quickstart` is one of the configs in `configs/`. We make it small. Every key can be overridden, here as on the
# command line (`python -m launch.train --config=quickstart --config.model.pattern=...`), and a misspelt one is an
# error.

# %%
PATTERNS = {"hybrid": "3*gdn,attn", "attention only": "4*attn", "recurrent only": "4*gdn"}


def config(pattern):
    """A model of four layers of width 64, and a short training."""
    return hydrax.load_config(
        "quickstart",
        **{
            "model.pattern": pattern,
            "model.d_model": 64,
            "model.mixers": {"gdn": {"heads": 2, "chunk_size": 32}, "attn": {"heads": 4}},
            "data.seq_len": 128,
            "train.steps": STEPS,
            "train.log_every": max(1, STEPS // 24),
            "train.eval_every": 0,  # only at the end
            "train.save_every": 0,
            "train.eval_rows": 64,
            "train.unroll": 1,
            "optim.warmup": min(10, STEPS // 2),
        },
    )


for name, pattern in PATTERNS.items():
    print(f"{name:15s} {pattern}")

# %% [markdown]
# ## What it costs, before anything runs
#
# `hydrax.cost` knows parameters, FLOPs and the bytes that decoding keeps: `state_bytes` of fixed size, and `kv_bytes`
# that grow with the text.

# %%
print(f"{'':15s} {'parameters':>11s} {'FLOPs/token':>12s} {'state':>8s} {'keys, values':>13s}   at 4096 tokens")
for name, pattern in PATTERNS.items():
    cost = hydrax.cost(config(pattern).model, seq_len=4096)
    flops, state, kv = cost.flops_per_token / 1e6, cost.state_bytes / 1e3, cost.kv_bytes / 1e3
    print(f"{name:15s} {cost.parameters:11,d} {flops:10.2f} M {state:5.1f} kB {kv:10.1f} kB")

# %%
lengths = 2 ** np.arange(7, 18)
fig, ax = plt.subplots()
for name, pattern in PATTERNS.items():
    ax.loglog(lengths, [hydrax.cost(config(pattern).model, seq_len=int(n)).cache_bytes for n in lengths], label=name)
ax.set(xlabel="tokens read", ylabel="bytes kept for decoding", title="Memory of one sequence")
ax.legend()
plt.show()

# %% [markdown]
# **Notice** the two regimes of the hybrid: as long as its recurrent states are the larger part it costs more than
# attention alone; from then on a fourth of it, as one layer of four keeps keys and values.
#
# ## Train them
#
# `hydrax.train_run` does in this process what `launch.train` does in a terminal. The folder gets the resolved config,
# the metrics, checkpoints and a summary; called again, it continues what was interrupted.

# %%
summaries = {}
for name, pattern in PATTERNS.items():
    summaries[name] = hydrax.train_run(config(pattern), RUNS / name.replace(" ", "_"), quiet=True)
    print(f"{name:15s} {summaries[name]['val_bits_per_byte']:.3f} bits per byte on files it has not seen")

# %% [markdown]
# Bits per byte say how many bits the model needs per byte of text, $-\frac{1}{n}\log_2 p(\text{text})$ over $n$ bytes:
# 8 for a model that knows nothing.

# %%
fig, ax = plt.subplots()
for name in PATTERNS:
    lines = (RUNS / name.replace(" ", "_") / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "bits_per_byte" in r]
    ax.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label=name)
ax.set(xlabel="training step of 8 x 128 bytes", ylabel="bits per byte (training)", title="Three patterns, same data")
ax.legend()
plt.show()

# %% [markdown]
# **Notice** that all three saw the same rows in the same order: their bumps coincide. The differences between the
# curves at the end of so short a training are differences in how fast the first statistics of text are learned, not a
# verdict. One seed and one learning rate never are: notebook `05_read_a_sweep` shows what it takes.
#
# ## Use one
#
# `hydrax.load_run` gives the trained model back. It is a function from tokens (here: bytes) to logits, and
# `hydrax.generate` continues a prompt; it decodes with the state of each layer, one token at a time.

# %%
lm, cfg = hydrax.load_run(RUNS / "hybrid")
prompt = b"def "
tokens = hydrax.generate(lm, [list(prompt)], max_new_tokens=160, temperature=0.7, top_p=0.95, seed=1)
print((prompt + bytes(t for t in tokens[0].tolist() if t < 256)).decode(errors="replace"))

# %% [markdown]
# **Try next**
#
# - `STEPS = 1000`, and look at the sample again.
# - Another line: `"2*(gla,swa)"`, `"3*mamba2,attn"`, `"attn,3*gdn"`. `hydrax.mixers.names()` lists all mixers.
# - `01_add_a_mixer` writes a new one, `03_hybrids_on_every_axis` mixes heads, branches and loops instead of layers.
