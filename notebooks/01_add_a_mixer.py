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
# # Add a mixer
#
# A mixer lets tokens see those before them. We write one that hydrax does not have, the minimal gated recurrence of
# [arXiv 2410.01201](https://arxiv.org/abs/2410.01201), in about forty lines:
#
# $$ h_t = a_t \odot h_{t-1} + (1 - a_t) \odot v_t, \qquad
# a_t = \sigma(W_a x_t),\quad v_t = W_v x_t,\qquad y_t = W_o\,h_t . $$
#
# Every channel keeps a running average, and the input decides how fast it moves. Then we prove that it is right, with
# the tests all mixers of hydrax pass, and train it beside `gdn`. Takes a minute and a half on four CPU cores.

# %%
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import hydrax
from hydrax.core.build import Positive
from hydrax.interp.effective_attention import walk
from hydrax.mixers import Context, Mixer, MixerConfig, Row
from hydrax.nn.linear import Linear

plt.style.use("./hydrax.mplstyle")
STEPS = int(os.environ.get("HYDRAX_NOTEBOOK_STEPS", 120))
RUNS = pathlib.Path(tempfile.mkdtemp(prefix="hydrax_mixer_"))

# %% [markdown]
# ## The definition
#
# First the recurrence as it stands in the equation, slow and obviously right. It is the definition: everything faster
# is tested against it.


# %%
def recurrent(a, b, h):
    """h_t = a_t h_{t-1} + b_t, token by token: a, b [B,T,V], h [B,V] -> all h_t [B,T,V]."""

    def token(h, ab):
        h = ab[0] * h + ab[1]
        return h, h

    _, out = jax.lax.scan(token, h, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return out.swapaxes(0, 1)


# %% [markdown]
# ## The form for training
#
# T steps, one after another, leave a machine idle. But $h \mapsto a h + b$ is an affine map, and two of them in a row
# are another one: $(a_2, b_2) \circ (a_1, b_1) = (a_2 a_1,\; a_2 b_1 + b_2)$. So chunks of tokens can be composed in
# parallel (`associative_scan`), and only the state at the end of each chunk goes from one chunk to the next.


# %%
def chunked(a, b, h, chunk=32):
    """The same numbers, `chunk` tokens at a time."""
    B, T, V = a.shape
    n = -(-T // chunk)
    pad = ((0, 0), (0, n * chunk - T), (0, 0))
    a, b = jnp.pad(a, pad, constant_values=1), jnp.pad(b, pad)  # h -> 1 h + 0 leaves the state alone
    a, b = (x.reshape(B, n, chunk, V).swapaxes(0, 1) for x in (a, b))

    def one_chunk(h, ab):
        decay, inner = jax.lax.associative_scan(lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1]), ab, axis=1)
        out = decay * h[:, None] + inner
        return out[:, -1], out

    _, out = jax.lax.scan(one_chunk, h, (a, b))
    return out.swapaxes(0, 1).reshape(B, n * chunk, V)[:, :T]


# %% [markdown]
# Their numbers agree, and so do their gradients:

# %%
keys = jax.random.split(jax.random.key(0), 3)
a = jax.nn.sigmoid(jax.random.normal(keys[0], (2, 75, 8)) + 2)
b, h0 = jax.random.normal(keys[1], (2, 75, 8)), jax.random.normal(keys[2], (2, 8))
for name, f in {"recurrent": recurrent, "chunked": chunked}.items():
    value, slope = jax.jit(jax.value_and_grad(lambda a, f=f: jnp.sum(jnp.sin(f(a, b, h0)))))(a)
    print(f"{name:10s} {value:.6f}   |gradient| {jnp.linalg.norm(slope):.6f}")

# %% [markdown]
# ## The mixer
#
# Two methods. `mix` gives what the heads read, which `project` brings back to the width of the model; `init_state` is
# the memory before the first token. One call serves training (no state), prefill (many tokens and a state) and decoding
# (one token and a state), so there is no second program that could disagree.
#
# Two lines deserve attention. Rows of training data are packed with several documents (`ctx.segment_ids`): where one
# begins, nothing may remain of the one before, so there $a_t = 0$. Id 0 is padding and must leave the state alone, so
# there $a_t = 1$ and nothing is written.

# %%
FORMS = {"recurrent": recurrent, "chunked": chunked, None: chunked}


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    value_dim: Positive | None = None  # channels V; d_model if None

    def fill(self, d_model):
        return dataclasses.replace(self, value_dim=self.value_dim or d_model)


class MinGRU(Mixer):
    Config = Config

    def __init__(self, d_model, cfg, *, rngs):
        self.cfg = cfg
        self.decay = Linear(d_model, cfg.value_dim, axes=("embed", "inner"), bias=True, bias_init=2.0, rngs=rngs)
        self.value = Linear(d_model, cfg.value_dim, axes=("embed", "inner"), rngs=rngs)
        self.project = Linear((1, cfg.value_dim), d_model, axes=(None, "inner", "embed"), residual=True, rngs=rngs)

    def mix(self, x, ctx, state):
        gate = self.decay(x).astype(jnp.float32)
        v = ctx.tap("values", self.value(x).astype(jnp.float32))
        a, b = jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate) * v  # 1 - σ(x) = σ(-x), and keeps its digits
        if ctx.segment_ids is not None:
            seg = ctx.segment_ids[..., None]
            starts = jnp.pad(seg[:, 1:] != seg[:, :-1], ((0, 0), (1, 0), (0, 0)))
            a = jnp.where(seg == 0, 1, jnp.where(starts, 0, a))
            b = jnp.where(seg == 0, 0, b)
        h0 = jnp.zeros_like(a[:, 0]) if state is None else state["memory"]
        h = FORMS[ctx.impl](a, b, h0)
        return ctx.tap("reads", h).astype(x.dtype)[:, :, None], {"memory": h[:, -1]}  # one head of V channels

    def init_state(self, batch, max_len, dtype):
        return {"memory": jnp.zeros((batch, self.cfg.value_dim), jnp.float32)}


# %% [markdown]
# ## The row
#
# To register a mixer is to add its row to the table: where it is, and what the tests and `hydrax.cost` should know. (In
# the package the row stands in `hydrax/mixers/__init__.py`, and the mixer in a file of its own.)

# %%
hydrax.mixers.TABLE["mingru"] = Row(
    path=f"{__name__}:MinGRU",
    about="gated running averages",
    paper="2410.01201",
    transition="diag",
    tiny={"value_dim": 24},
    state_bytes=lambda c, max_len, itemsize: 4 * c.value_dim,
    flops=lambda c, length: 3 * c.value_dim,
)
print(hydrax.mixers.row("mingru"))

# %% [markdown]
# ## Decoding is training
#
# Reading a text at once, and reading its first half at once and the rest token by token, must give the same output.

# %%
mixer = MinGRU(16, Config().fill(16), rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (1, 40, 16))
full, _ = mixer(x, Context.of(x))
first, state = mixer(x[:, :20], Context.of(x[:, :20]), mixer.init_state(1, 40, jnp.float32))
rest = []
for t in range(20, 40):
    y, state = mixer.step(x[:, t], Context(positions=jnp.array([[t]])), state)
    rest.append(y)
stepped = jnp.concatenate([first, jnp.stack(rest, axis=1)], axis=1)
print(f"largest difference {jnp.abs(full - stepped).max():.1e} of values up to {jnp.abs(full).max():.2f}")

# %% [markdown]
# ## The contract
#
# `tests/contract` asks the same of every row of the table: forms agree in outputs, states and all gradients; packed
# documents equal separate ones; the future does not change the past, bit by bit; padding and extremes do no harm; the
# state has the size the row says. Here are four of its questions (it lies beside `notebooks/` in a checkout; on the
# command line, for a mixer in the package: `pytest tests/contract -k mingru`).

# %%
sys.path.insert(0, os.fspath(pathlib.Path(hydrax.__file__).parents[1]))
from tests.contract import test_mixers as contract  # noqa: E402

QUESTIONS = (
    contract.test_packed_equals_separate,
    contract.test_documents_padding_and_neighbours_do_not_leak,
    contract.test_a_row_of_padding_leaves_the_state_alone,
    contract.test_taps_see_and_replace_the_heads,
)
case = contract.case("mingru")
for question in QUESTIONS:
    question(case)
    print("passed", question.__name__)

# %% [markdown]
# A test that cannot fail proves nothing. So we break the mixer: without the line that forgets at the start of a
# document, one document reads the other, and the contract says so.


# %%
class Leaky(MinGRU):
    def mix(self, x, ctx, state):
        return super().mix(x, dataclasses.replace(ctx, segment_ids=None), state)


hydrax.mixers.TABLE["leaky"] = dataclasses.replace(hydrax.mixers.row("mingru"), path=f"{__name__}:Leaky")
try:
    contract.test_packed_equals_separate(contract.case("leaky"))
except AssertionError as error:
    print("refused:", str(error).splitlines()[0])
else:
    raise RuntimeError("the contract did not notice")
del hydrax.mixers.TABLE["leaky"]

# %% [markdown]
# ## Train it
#
# A registered mixer is a word of the pattern language. Two layers of each kind, on bytes of Python source:


# %%
def config(pattern):
    return hydrax.load_config(
        "quickstart",
        **{
            "model.pattern": pattern,
            "model.d_model": 64,
            "model.mixers": {"gdn": {"heads": 2, "chunk_size": 32}},
            "data.seq_len": 128,
            "train.steps": STEPS,
            "train.log_every": max(1, STEPS // 24),
            "train.eval_every": 0,
            "train.save_every": 0,
            "train.eval_rows": 64,
            "train.unroll": 1,
            "optim.warmup": min(10, STEPS // 2),
        },
    )


fig, ax = plt.subplots()
for pattern in ("2*mingru", "2*gdn"):
    cost = hydrax.cost(config(pattern).model, seq_len=128)
    folder = RUNS / pattern.replace("*", "_")
    summary = hydrax.train_run(config(pattern), folder, quiet=True)
    records = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "bits_per_byte" in r]
    label = f"{pattern}: {cost.parameters / 1e3:.0f}k parameters, {cost.state_bytes / 1e3:.1f} kB of state"
    ax.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label=label)
    print(f"{pattern:10s} {summary['val_bits_per_byte']:.3f} bits per byte on files it has not seen")
ax.set(xlabel="training step of 8 x 128 bytes", ylabel="bits per byte (training)", title="The new mixer beside gdn")
ax.legend()
plt.show()

# %% [markdown]
# ## What a gate learned
#
# The half-life of a channel, $\ln\frac12 / \ln a_t$ tokens, says how long it remembers. A channel whose gate is always
# 0.88, as initialised ($\sigma(2)$), forgets half in 5.4 tokens. Here are the gates of both layers on a line of code.

# %%
lm, _ = hydrax.load_run(RUNS / "2_mingru")
text = b'        if value is None:\n            raise ValueError("expected a value")\n'
gates = []


def look(block, x, ctx):
    """Called before every layer runs, with what it reads."""
    gates.append(jax.nn.sigmoid(block.mixer.decay(block.mixer_norm(x)))[0])
    return ctx


walk(lm, jnp.array([list(text)]), look)
fig, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
for layer, (ax, a) in enumerate(zip(axes, gates, strict=True)):
    half_life = np.log(0.5) / np.log(np.asarray(a).clip(1e-3, 1 - 1e-3))
    order = np.argsort(half_life.mean(0))
    picture = ax.pcolormesh(half_life[:, order].T, norm="log", vmin=0.3, vmax=100)
    ax.set(title=f"layer {layer + 1}", ylabel="channel, sorted")
    ax.grid(False)
axes[1].set_xticks(np.arange(len(text)) + 0.5, [chr(c).replace("\n", "⏎").replace(" ", "·") for c in text], fontsize=7)
axes[1].set_xlabel("byte that is read")
fig.colorbar(picture, ax=axes, label="half-life of the memory (tokens)")
plt.show()

# %% [markdown]
# **Notice** that the picture has a pattern per byte: over the run of spaces every channel holds still, and each letter
# opens other gates. In the first layer a byte always looks the same, in the second it depends on what came before.
# The model decides from the content what to forget, which a constant decay could not.
#
# **Try next**
#
# - `STEPS = 600`: do the gates spread further, from channels that follow the last byte to some that span the line?
# - Let the mixer look at the previous byte as well: a short convolution in front (`hydrax.nn.conv`, as `gdn` has).
# - Bring it home: CONTRIBUTING.md lists the five steps from here to a mixer of the package. `ops.scan.linear_scan` is
#   this recurrence with documents, kernels and parallel forms done; the mixer then shrinks to twenty lines.
