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
# # State against recall
#
# *Multi-query associative recall* (MQAR, [arXiv 2312.04927](https://arxiv.org/abs/2312.04927)) shows a model pairs of a
# key and a value, and asks for the values later. It is the task on which kinds of memory differ most, and the one that
# explains why hybrids exist. Here we leave learning aside: keys and values are given as good vectors, and the question
# is what a memory of so many bytes can hold at best. Everything runs in seconds, so the pictures are complete curves.
# Four memories read and write by the same operations that the mixers of hydrax use:
#
# | memory | what it does with a pair | mixers |
# |---|---|---|
# | attention | keeps it: $o = \sum_j \mathrm{softmax}_j(c\, q^\top k_j)\, v_j$ | `attn` |
# | sum | adds it: $S \leftarrow S + k v^\top$ | `linear_attn` |
# | decaying sum | forgets a little, then adds: $S \leftarrow \lambda S + k v^\top$ | `lightning`, `retention` |
# | delta rule | replaces what the key holds: $S \leftarrow S + k\,(v - S^\top k)^\top$ | `deltanet`, `gdn` |

# %%
import collections
import csv
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hydrax
from hydrax import tasks
from hydrax.ops import delta, linear, softmax

plt.style.use("./hydrax.mplstyle")
V = 32  # entries of a value
VOCABULARY = 64  # tokens 1 .. 31 are keys, 32 .. 63 values

# %% [markdown]
# ## The task
#
# `hydrax.tasks` has its generator. `targets` says what must be answered after each token; -1 where nothing is asked.

# %%
task = tasks.make("mqar", {"length": 24, "pairs": (4,), "vocabulary": VOCABULARY})
sample = task.sample(np.random.default_rng(0), rows=1, split="eval")
print("reads  ", *(f"{token:3d}" for token in sample["inputs"][0]))
print("answers", *("  ." if target < 0 else f"{target:3d}" for target in sample["targets"][0]))

# %% [markdown]
# ## Four memories
#
# Every token gets a random vector: keys of unit length in $K$ dimensions, values with signs as entries. At a pair the
# memory is written to, everywhere it is read, and the answer is the value whose vector is most like what was read.


# %%
def attention(q, k, v, wrote):
    return softmax.attention(q, k, v, scale=32.0)  # a large scale: nearly a lookup


def running_sum(q, k, v, wrote):
    return linear.linear_attention(q, k, v, scale=1.0)[0]


def decaying_sum(q, k, v, wrote):
    return linear.linear_attention(q, k, v, jnp.log(jnp.array([0.95])), scale=1.0)[0]


def delta_rule(q, k, v, wrote):
    return delta.delta_rule(q, k, v, wrote, scale=1.0)[0]


MEMORIES = {"attention": attention, "sum": running_sum, "decaying sum": decaying_sum, "delta rule": delta_rule}


def accuracy(memory, K, rows=128, **options):
    """The share of right answers of a memory with keys of K dimensions."""
    rng = np.random.default_rng(0)
    task = tasks.make("mqar", {"vocabulary": VOCABULARY, **options})
    sample = task.sample(rng, rows, "eval")
    inputs, targets = sample["inputs"], sample["targets"]
    keys = rng.standard_normal((VOCABULARY, K))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values = rng.choice([-1.0, 1.0], (VOCABULARY, V))

    place = np.arange(inputs.shape[1])
    wrote = (place < sample["meta"]["context"][:, None]) & (place % 2 == 0)  # at the key of a pair
    q = keys[inputs]
    k = np.where(wrote[..., None], q, 0)
    v = np.where(wrote[..., None], values[np.roll(inputs, -1, axis=1)], 0)  # the token behind the key
    q, k, v, wrote = (jnp.asarray(x, jnp.float32)[:, :, None] for x in (q, k, v, wrote))  # one head

    read = np.asarray(jax.jit(MEMORIES[memory])(q, k, v, wrote))[:, :, 0]
    half = VOCABULARY // 2
    answers = half + (read @ values[half:].T).argmax(-1)
    return (answers == targets)[targets >= 0].mean()


# %% [markdown]
# ## Accuracy against state
#
# Sixteen pairs, in rows of 64 tokens, and keys of ever more dimensions. The state of the three recurrences is one
# matrix, $4KV$ bytes in fp32, whatever the length. Attention keeps a key and a value for every token, $4T(K+V)$ bytes.

# %%
SIZES = (2, 4, 8, 16, 32, 64)
T, PAIRS = 64, 16
fig, ax = plt.subplots()
for marker, memory in zip("osD^", MEMORIES, strict=True):
    kept = [4 * (T * (K + V) if memory == "attention" else K * V) for K in SIZES]
    found = [accuracy(memory, K, length=T, pairs=(PAIRS,)) for K in SIZES]
    ax.plot(kept, found, marker=marker, label=memory)
ax.axhline(2 / VOCABULARY, color="#8a8f99", linewidth=0.8)
ax.text(300, 2 / VOCABULARY + 0.01, "guessing", fontsize=8)
ax.set(xscale="log", xlabel="bytes of memory", ylabel="accuracy", title=f"{PAIRS} pairs in {T} tokens", ylim=(0, 1.03))
ax.legend()
plt.show()

# %% [markdown]
# **Notice**
#
# - The recurrences climb with the size of their state. $K$ dimensions have room for $K$ keys that do not disturb each
#   other; random keys do disturb, and the sum reads $v_i + \sum_{j \ne i} (k_i^\top k_j)\, v_j$, noise that grows with
#   the number of pairs over $K$.
# - The decay costs recall: what was shown first has faded when it is asked for.
# - The delta rule is behind the sum, with keys like these. To make the newest key read its value exactly, it changes
#   what all similar keys before it read; the sum leaves a little noise everywhere instead, which 32 entries of a value
#   average away. What the rule is good for comes below, and training finds keys that are less alike than random ones.
# - Attention needs few dimensions, since the softmax suppresses what is only a little similar. It pays with a memory
#   that grows with the text.
#
# ## Accuracy against the number of pairs
#
# The same the other way round: a state of fixed size, and more and more to remember.

# %%
K = 16
counts = (2, 4, 8, 12, 16, 20, 24, 28)
fig, ax = plt.subplots()
for marker, memory in zip("osD^", MEMORIES, strict=True):
    ax.plot(counts, [accuracy(memory, K, length=112, pairs=(n,)) for n in counts], marker=marker, label=memory)
ax.axvline(K, color="#8a8f99", linewidth=0.8, linestyle="--")
ax.text(K + 0.3, 0.05, "as many pairs\nas dimensions", fontsize=8)
ax.set(xlabel="pairs to remember", ylabel="accuracy", title=f"K = {K}, 112 tokens", ylim=(0, 1.03))
ax.legend()
plt.show()

# %% [markdown]
# **Notice** that no curve of a recurrence breaks at $K$: memory gets worse from the first pair on, and gracefully. A
# hybrid takes a few layers of attention for what must be exact, and recurrences for the rest.
#
# ## When a key gets a new value
#
# In the variant `forgetting` half of the keys come a second time, with another value, and the last one counts.

# %%
found = {m: accuracy(m, 32, length=96, pairs=(16,), variant="forgetting", updates=8) for m in MEMORIES}
fig, ax = plt.subplots(figsize=(6, 2.6))
bars = ax.barh(list(found), list(found.values()), color=["#0072B2", "#D55E00", "#009E73", "#CC79A7"])
ax.bar_label(bars, fmt="%.2f", padding=4)
ax.set(xlabel="accuracy", xlim=(0, 1.1), title="8 of 16 keys got a new value (K = 32)")
ax.invert_yaxis()
ax.grid(False)
plt.show()

# %% [markdown]
# **Notice** that attention is not the best here: both pairs of a key match the query equally well, and it reads their
# mean. (A trained model has positions to tell them apart.) The sum has the same trouble. The decay prefers what is
# newer, but has lost some of the keys that were not renewed. The delta rule was made for this: to write under a key is
# to replace.
#
# ## What training finds
#
# Ideal keys bound what a memory can hold; models have to find theirs. The repository has the results of 204 trained
# models, a convolution and one layer of four heads each, of 17 kinds at four learning rates with three seeds
# ([report](../docs/results/mqar_state_size_h100/report.md), with the command).

# %%
path = pathlib.Path(hydrax.__file__).parents[1] / "docs/results/mqar_state_size_h100/tables/state.csv"
trained = collections.defaultdict(list)
for row in csv.DictReader(path.open()):
    if "," in row["arm"] and "heads" not in row["arm"]:
        trained[row["arm"].split(",")[0]].append([float(row[x]) for x in ("state_bytes", "val_accuracy", "highest")])
fig, ax = plt.subplots()
for marker, (mixer, points) in zip("osD^vPX", trained.items(), strict=False):
    size, mean, best = zip(*sorted(points), strict=True)
    ax.plot(size, mean, marker=marker, label=mixer)
    ax.vlines(size, mean, best, color=ax.lines[-1].get_color(), linewidth=0.8)
ax.set(
    xscale="log",
    xlabel="bytes of state",
    ylabel="accuracy",
    title="Trained: mean of three seeds, and the best",
    ylim=(0, 1.03),
)
ax.legend()
plt.show()

# %% [markdown]
# **Notice** that the order is another one. The delta rule learns keys that do not disturb each other. And means hide
# how training goes: accuracy stays at that of guessing one of the values in the row, until all is learnt at once, and
# some seeds have not got there after 3000 steps. A low point says "not learnt yet", not "no room".
#
# **Try next**
#
# - Draw $\lambda$ of the decaying sum against accuracy, for `recall` and for `forgetting`. Where is the best one, and
#   why does `gdn` let the input decide?
# - Keys that do not disturb each other: `keys = np.eye(VOCABULARY, K)` with $K \ge 32$. Who is perfect now?
# - A gentler delta rule: multiply `wrote` by 0.5. What is won in the first picture, and lost in the last?
# - Which of these memories can be *trained* to do it is another question: `05_read_a_sweep` shows how it is asked.
