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
# # Read a sweep
#
# One run of a model says little: another learning rate may suit another model, and another seed gives another number. A
# *sweep* trains every arm at several learning rates with several seeds; a *report* picks each arm's best rate and shows
# how far its seeds are apart. This notebook runs a small sweep, draws one of the report's plots by hand from its files,
# so that nothing about it is magic, and then reads the report. Takes about two minutes on four CPU cores.

# %%
import collections
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt

plt.style.use("./hydrax.mplstyle")
STEPS = int(os.environ.get("HYDRAX_NOTEBOOK_STEPS", 60))
WORK = pathlib.Path(tempfile.mkdtemp(prefix="hydrax_sweep_"))


def run(*command):
    """A command as in a terminal; returns the last lines it printed."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:] + done.stdout[-2000:])
    return "\n".join(done.stdout.splitlines()[-12:])


# %% [markdown]
# ## A sweep is a list
#
# Its file has a function `get_sweep` that returns one dict of config keys per run. `grid.product` combines them. Three
# arms: only recurrent, half and half, only attention; at three learning rates, with two seeds each.

# %%
SWEEP = WORK / "arms.py"
SWEEP.write_text(f"""
from hydrax.sweep import grid

def get_sweep(arg=""):
    base = {{
        "config": "quickstart",
        "model.d_model": 32,
        "model.mixers": {{"gla": {{"heads": 2}}, "attn": {{"heads": 2}}}},
        "data.seq_len": 64,
        "train.steps": {STEPS},
        "train.log_every": {max(1, STEPS // 12)},
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.eval_rows": 64,
        "train.unroll": 1,
        "optim.warmup": {min(10, STEPS // 2)},
        "sample.tokens": 0,
    }}
    patterns = grid.sweep("model.pattern", ["2*gla", "gla,attn", "2*attn"])
    rates = grid.sweep("optim.lr", [0.01, 0.03, 0.1])
    seeds = grid.sweep("train.seed", range(2))
    return grid.product([base], patterns, rates, seeds)
""")
print(run("launch.sweep", f"--sweep={SWEEP}", f"--workdir={WORK / 'runs'}", "--parallel=4"))

# %% [markdown]
# Several runs went on at a time, each in a process and a folder of its own. If this cell is interrupted, the same
# command skips what is finished and continues the rest. The results are also in one file, a line per run:

# %%
with open(WORK / "runs" / "results.csv", newline="") as file:
    rows = list(csv.DictReader(file))
for row in rows[:4]:
    print({key: row[key] for key in ("model.pattern", "optim.lr", "train.seed", "val_bits_per_byte")})
print(f"... {len(rows)} runs, {sum(row['state'] == 'finished' for row in rows)} of them finished")

# %% [markdown]
# ## The best learning rate of every arm
#
# Group the runs by arm and rate, and take the mean over seeds. The best rate of an arm is the one with the lowest mean,
# not the one with the luckiest seed; and it is chosen for each arm by itself, since a rate that is good for one is no
# fair choice for the others.

# %%
loss = collections.defaultdict(dict)  # arm -> rate -> one value per seed
for row in rows:
    seeds = loss[row["model.pattern"]].setdefault(float(row["optim.lr"]), [])
    seeds.append(float(row["val_bits_per_byte"]))
best = {arm: min(rates, key=lambda r, rates=rates: statistics.fmean(rates[r])) for arm, rates in loss.items()}

fig, ax = plt.subplots()
for marker, (arm, rates) in zip("osD", loss.items(), strict=True):
    means = [statistics.fmean(values) for values in rates.values()]
    (drawn,) = ax.plot(list(rates), means, marker=marker, label=arm)
    ax.fill_between(list(rates), *zip(*((min(v), max(v)) for v in rates.values()), strict=True), alpha=0.2, linewidth=0)
    at = list(rates).index(best[arm])
    ax.plot(best[arm], means[at], "o", markersize=15, fillstyle="none", color=drawn.get_color())
ax.set(xscale="log", xlabel="learning rate", ylabel="bits per byte (unseen files)", title="Rings: the best rate")
ax.set_xticks(list(next(iter(loss.values()))), [f"{rate:g}" for rate in next(iter(loss.values()))])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# The band runs from the lowest to the highest seed: it shows every value there is. (An interval of confidence from two
# seeds would look more scientific and say less.) **Notice** the distance between rates beside the distance between
# seeds: which of them would a comparison at one fixed rate have measured?
#
# ## Quality by the share of attention

# %%
fig, ax = plt.subplots()
for arm, rates in loss.items():
    values = rates[best[arm]]
    share = arm.split(",").count("attn") / 2 if "," in arm else float("attn" in arm)
    mean = statistics.fmean(values)
    ax.errorbar(
        share, mean, [[mean - min(values)], [max(values) - mean]], marker="o", markersize=8, capsize=5, linestyle="none"
    )
    ax.annotate(f"{arm}\nrate {best[arm]:g}", (share, mean), xytext=(12, 0), textcoords="offset points", va="center")
ax.set(xlabel="share of layers with attention", ylabel="bits per byte (unseen files)", xlim=(-0.1, 1.35))
ax.set_xticks([0, 0.5, 1])
plt.show()

# %% [markdown]
# If two bars overlap, this sweep has not told the two arms apart.
#
# ## The report
#
# `launch.report` does all of this from the run folders, for as many arms as there are, and writes one page with its
# plots, the table behind every plot, and the commands that made the runs.

# %%
print(run("launch.report", f"--runs={WORK / 'runs'}", f"--out={WORK / 'report'}"))
for path in sorted((WORK / "report").rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size / 1e3:8.1f} kB  {path.relative_to(WORK)}")

# %% [markdown]
# Its table of results has the same best rates as our dictionary:

# %%
with open(WORK / "report" / "tables" / "results.csv", newline="") as file:
    for row in csv.DictReader(file):
        print({key: row[key] for key in ("arm", "validation bits per byte", "lowest", "highest", "learning rate")})
print("ours:", best)

# %% [markdown]
# And these are its pictures of what we drew:

# %%
figures = sorted((WORK / "report" / "figures").glob("*.png"))
wanted = [path for path in figures if "rate" in path.stem or "ratio" in path.stem] or figures[:2]
fig, panels = plt.subplots(1, len(wanted), figsize=(5.5 * len(wanted), 4), squeeze=False)
for ax, path in zip(panels[0], wanted, strict=True):
    ax.imshow(plt.imread(path), interpolation="antialiased")
    ax.axis("off")
plt.show()

# %% [markdown]
# **Try next**
#
# - Open `report.html` in a browser: `print(WORK / "report" / "report.html")`.
# - Is the best rate of an arm at the edge of the grid? Then it is not known yet: add rates, and run the cells again;
#   what is finished is not trained twice.
# - More seeds make a band wider, not narrower: it shows the range. What becomes surer is the mean.
# - `configs/sweeps` has the sweeps of the studies; `--executor=slurm` runs them on a cluster.
