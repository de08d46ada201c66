"""Suites of evaluations of trained runs, by name: what `launch.evaluate` offers, and what it leaves in its folder."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive, Raw
from hydrax.data.landmarks import Landmarks
from hydrax.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from hydrax.eval import length, recall
from hydrax.eval.perplexity import SLICES, perplexity, recall_slices
from hydrax.eval.scoring import Advance, Scorer
from hydrax.eval.tasks import accuracy, eval_rows
from hydrax.eval.texts import Texts, open_texts
from hydrax.infer import policy as policies
from hydrax.infer.policy.report import report
from hydrax.models.lm import LM, blueprint
from hydrax.tasks.base import Task
from hydrax.train.checkpoint import read_params
from hydrax.train.config import RunConfig
from hydrax.train.folder import read_config
from hydrax.train.loop import compute_dtype
from hydrax.train.probes import make_probe
from hydrax.train.source import make_task, vocabulary_of

Result = dict[str, Any]
Watch = Callable[[str], Advance]
"""Shows that something begins, and returns what is told of its progress."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all suites and runs."""

    data: str | None = None  # text in place of the runs' own validation split
    include: str | None = None  # a folder of tasks of lm-evaluation-harness
    sequences: Positive = 512  # of text at most, spread evenly over it; a sixteenth of them for extrapolation
    examples: NonNegative = 0  # of a recall set or a task of the harness at most; 0: all
    factor: Positive = 8  # of the training length that extrapolation goes to
    context: NonNegative = 0  # tokens that a prompt and its answer have; 0: the training length
    tokens_at_once: Positive = 2**14  # places of a batch


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained run, its parameters in the dtype of its training."""

    name: str
    scorer: Scorer
    cfg: RunConfig
    tokenizer: Tokenizer
    step: int  # of the checkpoint

    @property
    def model(self) -> LM:
        return self.scorer.model

    @property
    def trained(self) -> int:
        """Tokens of a training row."""
        return self.cfg.data.seq_len - self.cfg.model.prefix.meta_tokens


@dataclasses.dataclass(frozen=True)
class Suite:
    """An evaluation: `run(subject, argument, settings, advance)`, and what of its result a table shows."""

    run: Callable[[Subject, str, Settings, Advance], Result]
    shown: Callable[[Result], dict[str, float | str | None]]
    argument: str = ""  # what stands behind the colon; empty: nothing does
    optional: bool = False
    file: bool = False  # the argument ends in =<file>, which is no part of its name
    check: Callable[[str], object] = str  # raises what is wrong with the argument, whatever the run


Asked = Sequence[tuple[str, Suite, str]]
"""Suites by the name of their results, each with its argument."""


def open_run(workdir: str, name: str, tokens_at_once: int) -> Subject:
    """The newest intact checkpoint of a run.

    Raises:
      ConfigError: not a run of language modelling, or no checkpoint.
    """
    params, cfg, steps = read_params(workdir)
    plan = blueprint(cfg.model)
    arrays = {key: jnp.asarray(value) for key, value in params.items()}
    model = plan.merge(plan.cast(arrays, compute_dtype(cfg.train.dtype)))
    every = cfg.data.landmark_every
    scorer = Scorer(model, tokens_at_once, Landmarks(every, vocabulary_of(cfg.data) - 1) if every else None)
    return Subject(name, scorer, cfg, open_tokenizer(cfg.data.tokenizer), steps[0])


def evaluate(
    workdirs: Sequence[str], suites: Asked, settings: Settings, watch: Watch
) -> Iterator[tuple[str, str, Result]]:
    """Name of the run, suite and result, one after the other."""
    for workdir, name in zip(workdirs, names(workdirs), strict=True):
        subject = open_run(workdir, name, settings.tokens_at_once)
        for item, suite, argument in suites:
            yield name, item, suite.run(subject, argument, settings, watch(f"{name}: {item}"))


def present(workdirs: Sequence[str]) -> list[str]:
    """The run folders, each once.

    Raises:
      ConfigError: there are none, or one is not the folder of a run.
    """
    if not workdirs:
        raise ConfigError("workdir", "", "expected run folders, with commas between")
    for workdir in workdirs:
        read_config(pathlib.Path(workdir))
    return list(dict.fromkeys(workdirs))


def names(workdirs: Sequence[str]) -> list[str]:
    """A name per run: the last part of its folder, or all of it where that is no name of its own."""
    last = [pathlib.Path(w).resolve().name for w in workdirs]
    return [short if last.count(short) == 1 else w for short, w in zip(last, workdirs, strict=True)]


def parse(items: Sequence[str]) -> Asked:
    """The suites `name` or `name:argument`, each with the text it was asked for by.

    Raises:
      ConfigError: an unknown suite, or an argument too many or missing.
    """
    allowed = ", ".join(spelling(name) for name in SUITES)
    if not items:
        raise ConfigError("suite", "", f"expected some of {allowed}")
    found = []
    for item in dict.fromkeys(items):
        name, colon, argument = item.partition(":")
        suite = SUITES.get(name)
        if suite is None or bool(argument) > bool(suite.argument) or (colon and not argument):
            raise ConfigError("suite", item, f"expected some of {allowed}")
        if suite.argument and not suite.optional and not argument:
            raise ConfigError("suite", item, f"expected {spelling(name)}")
        suite.check(argument)
        found.append((item.partition("=")[0] if suite.file else item, suite, argument))
    return found


def spelling(name: str) -> str:
    suite = SUITES[name]
    behind = f":<{suite.argument}>" if suite.argument else ""
    return f"{name}[{behind}]" if suite.optional else name + behind


def _perplexity(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    texts = _texts(subject, settings)
    sequences = texts.cut(subject.trained, settings.sequences)
    scores = subject.scorer.texts(sequences, advance)
    return perplexity(sequences, scores, subject.tokenizer)


def _order(argument: str) -> int:
    """n of the n-grams of `recall_slices`."""
    order = int(argument) if argument.isdecimal() else 0 if argument else 2
    if order < 2:
        raise ConfigError("suite", f"recall_slices:{argument}", "expected recall_slices:<n of the n-grams, from 2>")
    return order


def _recall_slices(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    order = _order(argument)
    texts = _texts(subject, settings)
    training = _texts(subject, settings, "train")
    sequences = texts.cut(subject.trained, settings.sequences)
    scores = subject.scorer.texts(sequences, advance)
    return recall_slices(sequences, scores, training, order)


def _extrapolation(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    texts = _texts(subject, settings)
    count = max(settings.sequences // 16, 1)
    sequences = length.long_sequences(texts, subject.tokenizer.bos, subject.trained, settings.factor, count)
    losses = length.losses(subject.scorer, sequences, subject.trained, advance)
    return length.extrapolation(*losses, subject.trained)


def _examples(argument: str, limit: int | None) -> list[recall.Example]:
    kind, _, path = argument.partition("=")
    return recall.read(kind, path, limit)


def _recall(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    examples = _examples(argument, settings.examples or None)
    return recall.evaluate(
        subject.model,
        subject.tokenizer,
        examples,
        settings.context or subject.trained,
        tokens_at_once=settings.tokens_at_once,
        advance=advance,
        landmarks=subject.scorer.landmarks,
    )


def _task(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    data, rows = subject.cfg.data, settings.examples or settings.sequences
    name, *changes = (part.strip() for part in (argument or data.task or "").split(";"))
    if argument and (data.task is not None or data.tokenizer != ByteTokenizer.name):
        raise ConfigError("suite", f"task:{argument}", "expected a run of text in bytes; task alone: a run's own task")
    if not name:
        raise ConfigError("suite", "task", "expected a run that was trained on a task, or task:<name>")
    task: Task
    if argument:
        pairs = (change.partition("=") for change in changes)
        options = {option.strip(): Raw(value.strip()) for option, _, value in pairs}
        task = make_probe(name, options, subject.trained, f"task:{name}")
    else:
        task = make_task(data)
    return accuracy(subject.scorer, eval_rows(task, name, rows, data.seed), rows, task.slices, advance)


def _policy_of(argument: str) -> policies.Policy:
    return policies.of(argument.replace(";", ":", 1))


def _policy(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    policy = _policy_of(argument)
    sequences = _texts(subject, settings).cut(subject.trained, settings.sequences)
    width = max(map(len, sequences))
    rows, ids = np.zeros((2, len(sequences), width), np.int32)
    for i, tokens in enumerate(sequences):
        rows[i, : len(tokens)], ids[i, : len(tokens)] = tokens, 1
    at_once = max(settings.tokens_at_once // (8 * width), 1)  # it forms all scores
    return dataclasses.asdict(report(subject.model, rows, policy, ids, rows_at_once=at_once, advance=advance))


def _texts(subject: Subject, settings: Settings, split: Literal["train", "val"] = "val") -> Texts:
    """What the settings say, or a split of the run's own text."""
    if subject.cfg.data.task is not None:
        raise ConfigError("workdir", subject.name, f"expected a run of text; it was trained on {subject.cfg.data.task}")
    return open_texts(subject.cfg.data, subject.tokenizer, split, settings.data if split == "val" else None)


def _lm_eval(subject: Subject, argument: str, settings: Settings, advance: Advance) -> Result:
    try:
        from hydrax.eval import harness
    except ImportError as error:
        allowed = f"{error.name} is not installed; expected `pip install 'hydrax[eval]'`"
        raise ConfigError("suite", f"lm_eval:{argument}", allowed) from None
    model = harness.HydraxLM(
        subject.model,
        subject.tokenizer,
        max_length=settings.context or subject.trained,
        tokens_at_once=settings.tokens_at_once,
        advance=advance,
        landmarks=subject.scorer.landmarks,
    )
    return harness.run(model, argument, include=settings.include, limit=settings.examples or None)


def _shown_harness(result: Result) -> dict[str, float | str | None]:
    return {f"{task} {metric}".strip(): value for task, values in result.items() for metric, value in values.items()}


SUITES: Mapping[str, Suite] = {
    "perplexity": Suite(_perplexity, lambda r: {k: r[k] for k in ("loss", "stderr", "perplexity", "bits_per_byte")}),
    "extrapolation": Suite(
        _extrapolation,
        lambda r: {
            "nats to the training length": r["inside"],
            "nats beyond": r["beyond"],
            "nats beyond, in windows": r["beyond_in_windows"],
            "extrapolates": "yes" if r["extrapolates"] else "no",
        },
    ),
    "recall_slices": Suite(
        _recall_slices,
        lambda r: {f"{name}, {what}": r[name][what] for name in SLICES for what in ("loss", "accuracy", "share")},
        argument="n",
        optional=True,
        check=_order,
    ),
    "recall": Suite(
        _recall,
        lambda r: {k: r[k] for k in ("contains", "stderr", "examples", "truncated")},
        argument="kind>=<file",
        file=True,
        check=lambda argument: _examples(argument, 1),
    ),
    "task": Suite(
        _task,
        lambda r: {k: r[k] for k in ("accuracy", "stderr", "sequence_accuracy", "rows")} | r.get("slices", {}),
        argument="name[;option=value]",
        optional=True,
    ),
    "policy": Suite(
        _policy,
        lambda r: (
            {k: float(np.mean(r[k])) for k in ("recall", "error", "density")}
            | {k: r[k] for k in ("logits", "loss", "full_loss")}
        ),
        argument="name[;option=value]",
        check=_policy_of,
    ),
    "lm_eval": Suite(_lm_eval, _shown_harness, argument="task"),
}
