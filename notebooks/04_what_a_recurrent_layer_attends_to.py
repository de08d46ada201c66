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
# # What a recurrent layer attends to
#
# A recurrent layer has no attention weights to look at. But for fixed queries, keys and gates it is linear in its
# values, so what it reads at token $i$ is a weighted sum over the tokens before, exactly as in attention:
#
# $$ o_i = \sum_{j \le i} A_{ij}\, v_j . $$
#
# For softmax attention $A$ are its weights. For the gated delta rule (`gdn`) and for Mamba-2 they follow from the
# recurrence, with everything that happened to the state between $j$ and $i$ in the product:
#
# $$ A_{ij} = \beta_j\; q_i^\top \Big(\prod_{t=j+1}^{i} \alpha_t (I - \beta_t k_t k_t^\top)\Big) k_j
# \qquad\text{and}\qquad A_{ij} = \mathrm{dt}_j\; q_i^\top k_j\, \prod_{t=j+1}^{i} \alpha_t . $$
#
# `hydrax.interp.effective_attention` gets this matrix from the layer itself, by running it on values that are columns
# of the identity ([arXiv 2403.01590](https://arxiv.org/abs/2403.01590)). We train a hybrid of all three on a text in
# which words come back, and look at who looks back. Takes about a minute and a half on four CPU cores.

# %%
import json
import os
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hydrax
from hydrax.interp import effective_attention as ea

plt.style.use("./hydrax.mplstyle")
STEPS = int(os.environ.get("HYDRAX_NOTEBOOK_STEPS", 300))
RUNS = pathlib.Path(tempfile.mkdtemp(prefix="hydrax_attends_"))

# %% [markdown]
# ## A text that repeats itself
#
# Every line is a random word, four times. The first time nobody can guess it; from then on one only has to look at what
# came after the same letters before. How long a word is differs, so the distance to look back is different each time.

# %%
rng = np.random.default_rng(0)


def line():
    word = bytes(rng.choice(list(b"abcdefghijklmnop"), rng.integers(4, 9)).tolist())
    return b" ".join([word] * 4) + b"\n"


texts = RUNS / "texts"
texts.mkdir()
for i in range(40):  # documents; hydrax holds some of them out
    (texts / f"{i}.txt").write_bytes(b"".join(line() for _ in range(400)))
print((texts / "0.txt").read_text()[:150])

# %% [markdown]
# ## A hybrid of three
#
# One layer of each kind, so that their maps can be compared. `data.path` is any file, folder or pattern of files.

# %%
KINDS = ("gdn", "mamba2", "attn")
cfg = hydrax.load_config(
    "quickstart",
    **{
        "model.pattern": ",".join(KINDS),
        "model.d_model": 64,
        "model.mixers": {
            "gdn": {"heads": 2, "chunk_size": 16},
            "mamba2": {"heads": 1, "value_heads": 2, "key_dim": 32, "value_dim": 64},
            "attn": {"heads": 2},
        },
        "data.path": str(texts),
        "data.seq_len": 64,
        "train.steps": STEPS,
        "train.batch_size": 16,
        "train.log_every": max(1, STEPS // 30),
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.eval_rows": 64,
        "train.unroll": 1,
        "optim.warmup": min(10, STEPS // 2),
    },
)
summary = hydrax.train_run(cfg, RUNS / "run", quiet=True)
lm, _ = hydrax.load_run(RUNS / "run")

records = [json.loads(text) for text in (RUNS / "run" / "metrics.jsonl").read_text().splitlines()]
records = [r for r in records if "bits_per_byte" in r]
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records])
ax.axhline(4, color="#8a8f99", linestyle=":")
ax.text(STEPS, 3.9, "letters without looking back: about 4 bits", ha="right", va="top", fontsize=8)
ax.set(xlabel="training step of 16 x 64 bytes", ylabel="bits per byte", ylim=(0, None))
plt.show()
print(f"{summary['val_bits_per_byte']:.2f} bits per byte on lines it has not seen")

# %% [markdown]
# ## Where it knows what comes
#
# The surprise of the model, $-\log_2 p$, at every byte of a new line.

# %%
word = b"kaleidop"
text = b"\n" + b" ".join([word] * 4)
PERIOD = len(word) + 1
tokens = jnp.array([list(text)])
names = [chr(c).replace("\n", "⏎").replace(" ", "·") for c in text]

logits = np.asarray(lm(tokens)[0], np.float64)
p = np.exp(logits - logits.max(-1, keepdims=True))
p /= p.sum(-1, keepdims=True)
surprise = -np.log2(p[np.arange(len(text) - 1), list(text[1:])])

fig, ax = plt.subplots(figsize=(9, 2.6))
ax.bar(np.arange(1, len(text)), surprise, color="#0072B2")
for start in range(1, len(text), PERIOD):
    ax.axvline(start - 0.5, color="#8a8f99", linewidth=0.8, linestyle="--")
ax.set_xticks(np.arange(len(text)), names)
ax.set(xlabel="byte that is predicted", ylabel="surprise (bits)")
plt.show()

# %% [markdown]
# **Notice** the first copy: nothing helps there, each letter costs the four bits of one out of sixteen. From the second
# copy on the word is known. (With few steps of training, the surprise is still everywhere.)
#
# ## Who looks where
#
# Now the matrices. Row $i$ is what the layer reads at byte $i$; bright columns are the bytes it reads from. Shown is
# $|A|$ with rows that sum to one, averaged over heads. The dotted diagonals mark what an *induction* head would read:
# the byte that followed the last time.

# %%
maps = ea.matrices(lm, tokens)  # one [1,heads,T,T] per layer
fig, panels = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True)
T = len(text)
for ax, kind, A in zip(panels, KINDS, maps, strict=True):
    picture = ax.imshow(ea.head_mean(A)[0] ** 0.5, vmin=0, vmax=1)  # the root, so that small weights are seen
    for back in range(PERIOD - 1, T, PERIOD):
        ax.plot([0, T - 1 - back], [back, T - 1], ":", color="white", linewidth=0.7)
    ax.set(title=f"layer {KINDS.index(kind) + 1}: {kind}", xlabel="byte that is read from")
    ax.set_xticks(np.arange(T), names, fontsize=6)
    ax.grid(False)
panels[0].set_yticks(np.arange(T), names, fontsize=6)
panels[0].set_ylabel("byte at which is read")
fig.colorbar(picture, ax=panels, label=r"$\sqrt{\mathrm{weight}}$", shrink=0.8)
plt.show()

# %% [markdown]
# **Notice** the division of labour that training has found. The attention layer has the diagonal: it reads the byte
# that followed the last time. It could not know which that is from letters alone, so somebody has to say where a word
# begins and what came before a letter: the recurrent layers look at the last bytes, and hold on to the beginnings of
# words (the columns) over the whole word.
#
# The same as numbers: the mean weight by distance $i - j$, in the copies after the first. A peak one less than the
# period is the byte that came next the last time.

# %%
fig, ax = plt.subplots()
for kind, A in zip(KINDS, maps, strict=True):
    weight = np.asarray(ea.head_mean(A)[0])[PERIOD + 1 :]  # rows behind the first copy
    rows = np.arange(PERIOD + 1, T)
    by_distance = [weight[np.arange(len(rows)), rows - d].mean() for d in range(PERIOD + 2)]
    ax.plot(by_distance, marker="o", markersize=4, label=kind)
ax.axvline(PERIOD - 1, color="#8a8f99", linewidth=0.8, linestyle="--")
ax.text(PERIOD - 1.1, ax.get_ylim()[1], "what followed\nthe last time", ha="right", va="top", fontsize=8)
ax.set(xlabel="distance looked back (bytes)", ylabel="mean weight")
ax.legend()
plt.show()

# %% [markdown]
# ## Negative weights
#
# Softmax weights are never negative. Those of a recurrence may be: the delta rule *takes away* what was stored under a
# key before it writes anew. Here is one head of `gdn`, with its sign.

# %%
A = np.asarray(maps[0][0, 0])
top = np.abs(A).max()
fig, ax = plt.subplots(figsize=(5.4, 4.6))
picture = ax.imshow(A, cmap="PuOr_r", vmin=-top, vmax=top)
ax.set_xticks(np.arange(T), names, fontsize=6)
ax.set_yticks(np.arange(T), names, fontsize=6)
ax.grid(False)
ax.set(title="gdn, head 1", xlabel="byte that is read from", ylabel="byte at which is read")
fig.colorbar(picture, ax=ax, label="weight")
plt.show()

# %% [markdown]
# ## Through all layers
#
# A layer reads what earlier layers wrote, so its map is not about the input. *Rollout* multiplies the maps, with the
# identity for the residual stream, $R = \hat A_3 \hat A_2 \hat A_1$ ([arXiv
# 2005.00928](https://arxiv.org/abs/2005.00928)): how much of each input byte reaches each output.

# %%
R = np.asarray(ea.rollout([ea.head_mean(A) for A in maps])[0])
fig, ax = plt.subplots(figsize=(5.4, 4.6))
picture = ax.imshow(R**0.5, vmin=0, vmax=1)
ax.set_xticks(np.arange(T), names, fontsize=6)
ax.set_yticks(np.arange(T), names, fontsize=6)
ax.grid(False)
ax.set(title="all layers", xlabel="input byte", ylabel="output at this byte")
fig.colorbar(picture, ax=ax, label=r"$\sqrt{\mathrm{share}}$")
plt.show()

# %% [markdown]
# **Try next**
#
# - The order matters: `KINDS = ("attn", "gdn", "mamba2")`. Does the first layer ever look back?
# - Leave attention out (`("gdn", "gdn", "mamba2")`): can it copy as well? For how long a word?
# - `ea.gradients` and `ea.attribution` weigh the maps by what raises a score of your choice.
