"""Length extrapolation: small models trained on short words of a task, examined at lengths they have never seen.

Accuracies are scaled so that guessing scores 0 and knowing 1 (arXiv 2411.12537): (acc - 1/G) / (1 - 1/G) for G possible
answers.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array, Float
from hydrax.models.lm import blueprint
from hydrax.models.spec import ModelConfig, resolve
from hydrax.tasks.state_tracking import WordProblem
from hydrax.train.figure import BASELINE, INK, TRAIN, VALIDATION, blank, quiet, save
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import init_state
from hydrax.train.step import make_train_step

EXAM_SEED = 2**31
"""Of the words of the examination; training seeds count from 0."""

OPTIM = OptimConfig(lr=0.02, schedule="constant", warmup=30, weight_decay=0.0, z_loss=0.0)
"""A rate that stays high goes on driving β towards 2 and decays towards 1 when the training words are long learnt."""

SMOOTH = 8
"""Lengths that a point of the figure averages over."""

Curve = Float[np.ndarray, "seeds lengths"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How models are trained and examined; what is compared shares one."""

    seeds: int = 3  # 0, 1, ...: initial parameters and training words
    steps: int = 300
    rows: int = 64  # training words per step
    lengths: tuple[int, int] = (3, 40)  # of training words, uniform
    longest: int = 256  # length of the words of the examination
    exam_rows: int = 512  # their number
    optim: OptimConfig = OPTIM

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The lengths of training, and all beyond."""
        low, high = self.lengths
        return {f"{a}-{b}": (a, b) for a, b in ((low, high), (high + 1, self.longest))}


def scaled_accuracy(
    problem: WordProblem, model: ModelConfig, protocol: Protocol, record: Callable[[float], None]
) -> Curve:
    """Scaled accuracy at the lengths 1, 2, ... after training, per seed.

    At length n it counts the answers after n letters of the examination's words. Each is the answer to a random word
    of n letters, since a causal model does not see the rest. `record` gets the mean loss of every step.
    """
    plan = blueprint(model, unroll=len(resolve(model)))
    tx = make_optimizer(protocol.optim, protocol.steps, plan.meta)
    schedule = make_schedule(protocol.optim, protocol.steps)
    step = make_train_step(plan, tx, schedule, z_loss=protocol.optim.z_loss)
    # One seed after the other in one program: of vectorised seeds, some CPUs crash in a product (jaxlib 0.10.2).
    train = jax.jit(lambda states, words: jax.lax.map(lambda x: step(*x), (states, words)), donate_argnums=0)
    state = jax.jit(jax.vmap(lambda seed: init_state(plan, tx, jax.random.key(seed))))(np.arange(protocol.seeds))
    for n in range(protocol.steps):
        words = [problem.batch(protocol.rows, protocol.lengths, seed=s, step=n) for s in range(protocol.seeds)]
        state, metrics = train(state, jax.tree.map(lambda *rows: np.stack(rows), *words))
        record(float(metrics["loss"].mean()))

    exam = problem.batch(protocol.exam_rows, (protocol.longest, protocol.longest), seed=EXAM_SEED, step=0)

    def examine(params: dict[str, Array]) -> Float[Array, "lengths"]:
        answers = jnp.argmax(plan.merge(params)(jnp.asarray(exam["tokens"])), axis=-1)
        return jnp.mean(answers == exam["targets"], axis=0, dtype=jnp.float32)

    accuracy = np.asarray(jax.jit(lambda params: jax.lax.map(examine, params))(state["params"]), np.float64)
    return (accuracy - 1 / problem.order) / (1 - 1 / problem.order)


def over(curve: Curve, lengths: tuple[int, int]) -> Float[np.ndarray, "seeds"]:
    """The mean over a closed range of lengths."""
    low, high = lengths
    return curve[:, low - 1 : high].mean(1)


def draw(curves: Mapping[str, Mapping[str, Curve]], about: str, protocol: Protocol, path: pathlib.Path) -> None:
    """Scaled accuracy against length as a PNG: a panel per group, up to three models in each, their best seeds bold.

    `about` says what tells the models of a group apart.
    """
    figure = blank(3.6 * len(curves) + 0.6, 3.4)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    kernel = np.ones(SMOOTH) / SMOOTH
    for axes, (title, group) in zip(panels, curves.items(), strict=True):
        for color, (label, curve) in zip((VALIDATION, TRAIN, INK), group.items(), strict=False):
            best = over(curve, (protocol.lengths[1] + 1, protocol.longest)).argmax()
            for i, row in enumerate(curve):
                style: dict[str, Any] = {"linewidth": 2.0, "label": label} if i == best else {"linewidth": 0.7}
                at = np.arange(SMOOTH, protocol.longest + 1) - (SMOOTH - 1) / 2
                axes.plot(at, np.convolve(row, kernel, mode="valid"), color=color, **style)
        axes.axvline(protocol.lengths[1], color=BASELINE, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate("longest in training", (protocol.lengths[1] + 4, 0.5), color=BASELINE, fontsize=9)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xlabel("length", color=INK)
        axes.set_xlim(0, protocol.longest)
        axes.set_ylim(-0.12, 1.06)
        quiet(axes)
        axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.7), title=about)
    panels[0].set_ylabel("scaled accuracy", color=INK)
    save(figure, path)
