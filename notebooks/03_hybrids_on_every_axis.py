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
# # Hybrids on every axis
#
# "Three recurrent layers to one of attention" is the best known hybrid, and only one of several directions in which two
# kinds of memory can be mixed. This notebook takes five, one line of config each, draws them, counts their cost and
# trains them for a moment. The two kinds are gated linear attention (`gla`), with a state of fixed size,
#
# $$ S_t = \mathrm{diag}(\alpha_t)\,S_{t-1} + k_t v_t^\top,\qquad o_t = S_t^\top q_t , $$
#
# and softmax attention (`attn`), which keeps all keys and values. Takes about two minutes on four CPU cores.

# %%
import json
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

import hydrax

plt.style.use("./hydrax.mplstyle")
STEPS = int(os.environ.get("HYDRAX_NOTEBOOK_STEPS", 100))
RUNS = pathlib.Path(tempfile.mkdtemp(prefix="hydrax_axes_"))

# %% [markdown]
# ## Five patterns
#
# | axis | pattern | who attends |
# |---|---|---|
# | layers | `3*gla,attn` | one layer of four |
# | heads | `4*heads(3*gla,attn)` | one head of four, in every layer; one output projection for all heads |
# | branches | `4*parallel(gla,attn)` | every layer computes both from the same input, and adds them |
# | tokens | `4*modes(gla)` | every layer reads a chunk of tokens by one of both, over the same keys and values |
# | depth | `loop(2,(gla,attn))` | two layers with one set of weights, run twice |

# %%
AXES = {
    "layers": "3*gla,attn",
    "heads": "4*heads(3*gla,attn)",
    "branches": "4*parallel(gla,attn)",
    "tokens": "4*modes(gla)",
    "depth": "loop(2,(gla,attn))",
}
CHUNK = 32  # tokens that share a mode


def config(axis):
    """A model of width 64 on bytes of Python source, and a short training."""
    cfg = hydrax.load_config(
        "quickstart",
        **{
            "model.pattern": AXES[axis],
            "model.d_model": 64,
            "model.mixers": {"gla": {"heads": 4}, "attn": {"heads": 4}},
            "data.seq_len": 128,
            "train.steps": STEPS,
            "train.log_every": max(1, STEPS // 20),
            "train.eval_every": 0,
            "train.save_every": 0,
            "train.eval_rows": 64,
            "train.unroll": 1,
            "optim.warmup": min(10, STEPS // 2),
        },
    )
    if axis == "tokens":  # every second chunk of a document by attention
        cfg.data.modes.update(schedule="chunks", chunk=CHUNK, every=2)
    return cfg


# %% [markdown]
# ## What they look like
#
# Width is depth: layers from left to right, as a token passes them. Height is what a layer consists of: its heads, or,
# in the fourth picture, the tokens it reads.

# %%
RECURRENT, ATTENTION = {"facecolor": "#56B4E9"}, {"facecolor": "#E69F00", "hatch": "///"}


def box(ax, x, y, width, height, kind):
    ax.add_patch(Rectangle((x, y), width, height, edgecolor="white", linewidth=1.5, **kind))


def layers(ax):
    for i in range(4):
        box(ax, i, 0, 0.85, 4, ATTENTION if i == 3 else RECURRENT)


def heads(ax):
    for i in range(4):
        for h in range(4):
            box(ax, i, h, 0.85, 1, ATTENTION if h == 0 else RECURRENT)


def branches(ax):
    for i in range(4):
        box(ax, i, 2.15, 0.85, 1.85, RECURRENT)
        box(ax, i, 0, 0.85, 1.85, ATTENTION)
        ax.text(i + 0.425, 2, "+", ha="center", va="center")


def tokens(ax):
    for i in range(4):
        for c in range(4):
            box(ax, i, 3 - c, 0.85, 1, ATTENTION if c % 2 else RECURRENT)
    ax.annotate("tokens", (-0.2, 0), (-0.2, 4), ha="center", arrowprops={"arrowstyle": "->"}, fontsize=8)


def depth(ax):
    for i in range(2):
        box(ax, i + 1, 0, 0.85, 4, ATTENTION if i else RECURRENT)
    bend = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.5"}
    ax.annotate("", (1.2, 4.1), (2.6, 4.1), arrowprops=bend)
    ax.text(1.9, 4.75, "twice", ha="center", fontsize=8)


fig, panels = plt.subplots(1, 5, figsize=(11, 2.6))
for ax, axis in zip(panels, AXES, strict=True):
    globals()[axis](ax)
    ax.set(xlim=(-0.5, 4.2), ylim=(-0.2, 5.2), xticks=[], yticks=[], title=axis, xlabel=AXES[axis])
    ax.spines[:].set_visible(False)
    ax.xaxis.label.set(family="monospace", size=8)
fig.legend(
    handles=[Patch(label="recurrence", **RECURRENT), Patch(label="attention", edgecolor="white", **ATTENTION)],
    loc="outside lower center",
    ncols=2,
)
plt.show()

# %% [markdown]
# ## What they cost
#
# At 8192 tokens. `state` is fixed, `keys, values` grow with the text.

# %%
costs = {axis: hydrax.cost(config(axis).model, seq_len=8192) for axis in AXES}
print(f"{'axis':10s} {'parameters':>11s} {'FLOPs/token':>12s} {'state':>9s} {'keys, values':>13s}")
for axis, cost in costs.items():
    print(
        f"{axis:10s} {cost.parameters:11,d} {cost.flops_per_token / 1e6:10.2f} M "
        f"{cost.state_bytes / 1e3:6.1f} kB {cost.kv_bytes / 1e6:10.3f} MB"
    )

# %% [markdown]
# **Notice**
#
# - `heads` keeps about as many bytes of keys and values as `layers`, spread over all depths: one head of four instead
#   of one layer of four.
# - `branches` and `tokens` pay for attention in every layer; `tokens` has hardly more parameters than a pure `gla`,
#   since both ways of reading use the same keys and values.
# - `depth` has half of the parameters, but not half of the FLOPs: each pass computes, and each pass has memory of its
#   own.
#
# ## Train them

# %%
results = {}
fig, ax = plt.subplots()
for axis in AXES:
    results[axis] = hydrax.train_run(config(axis), RUNS / axis, quiet=True)
    records = [json.loads(line) for line in (RUNS / axis / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "bits_per_byte" in r]
    ax.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label=axis)
    print(f"{axis:10s} {results[axis]['val_bits_per_byte']:.3f} bits per byte on files it has not seen")
ax.set(xlabel="training step of 8 x 128 bytes", ylabel="bits per byte (training)", title="Five axes, same data")
ax.legend(ncols=2)
plt.show()

# %% [markdown]
# ## Quality against memory
#
# The plot by which hybrids are judged: what is the quality for the bytes that decoding keeps? To the left and down is
# better.

# %%
fig, ax = plt.subplots()
for marker, axis in zip("osD^v", AXES, strict=True):
    kept, loss = costs[axis].cache_bytes / 1e6, results[axis]["val_bits_per_byte"]
    ax.plot(kept, loss, marker, markersize=9)
    ax.annotate(axis, (kept, loss), xytext=(9, 0), textcoords="offset points", va="center")
ax.set(xlabel="MB kept for decoding at 8192 tokens", ylabel="bits per byte (unseen files)", xlim=(0, 10.5))
ax.margins(y=0.2)
plt.show()

# %% [markdown]
# **Notice** how little separates them, after so few steps, from one seed and one learning rate. On short texts the
# bigrams are learned first, and for those any memory will do; `02_state_vs_recall` takes a task for which it will not.
#
# **Try next**
#
# - Compose: `"2*(heads(3*gla,attn),gla)"`, `"loop(2, 3*gla)"`, `"3*parallel(gla,swa),attn"`.
# - Make the comparison fair: `python -m launch.cost --match=parameters --compare=...` turns one integer of each model
#   until all have the same number of parameters (or FLOPs, or bytes of cache).
# - `cfg.data.modes.schedule = "linear"` for the fourth: the same weights, read by the recurrence alone.
