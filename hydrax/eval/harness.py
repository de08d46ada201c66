"""A hydrax model as lm-evaluation-harness sees it: log-likelihoods, rolling log-likelihoods, generation.

    from lm_eval import simple_evaluate
    simple_evaluate(model=HydraxLM(model, tokenizer, max_length=2048), tasks=["hellaswag"], bootstrap_iters=0)

Text is encoded as it is, without BOS; where there is no context, a document begins (BOS). Needs the extra `eval`; no
torch. The harness's own spreading over processes needs torch, so there is one process, and batches are made here.
"""

import difflib
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hydrax.core.build import ConfigError
from hydrax.data.landmarks import Landmarks
from hydrax.data.tokenizer import Tokenizer, open_tokenizer
from hydrax.eval.completion import complete
from hydrax.eval.scoring import Advance, Scorer
from hydrax.models.lm import LM
from hydrax.train.checkpoint import load_run

Ids = list[int]
Request = tuple[Any, Ids, Ids]
"""What was asked, in words; the tokens of the context, and of the continuation."""

DRAWS = 1000
"""Of the bootstrap, for standard errors of metrics that are no means."""


@register_model("hydrax")
class HydraxLM(TemplateLM):
    """Adapter of lm_eval 0.4.13.

    Args:
      max_length: tokens the model reads at most; more lose their beginning.
      max_gen_toks: tokens generated where a task does not say.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        max_gen_toks: int = 256,
        tokens_at_once: int = 2**14,
        advance: Advance | None = None,
        landmarks: Landmarks | None = None,
    ):
        super().__init__()
        self.ids, self.max_length, self.max_gen_toks = tokenizer, max_length, max_gen_toks
        self._scorer, self._advance = Scorer(model, tokens_at_once, landmarks), advance

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HydraxLM":
        """The model of a run folder: `model="hydrax", model_args={"workdir": ...}`, and what `__init__` takes."""
        options = {k: v for k, v in arg_dict.items() if k != "workdir"}
        model, cfg = load_run(arg_dict["workdir"])
        return cls(model, open_tokenizer(cfg.data.tokenizer), **{"max_length": cfg.data.seq_len, **options})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "HydraxLM":
        """The same from `workdir=...,max_length=...`."""
        pairs = (part.partition("=")[::2] for part in arg_string.split(","))
        return cls.create_from_arg_obj({k: v if k == "workdir" else int(v) for k, v in pairs})

    @property
    def tokenizer_name(self) -> str:
        """For caches of the harness."""
        return f"hydrax-{self.ids.fingerprint[:16]}"

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.ids.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that begins one."""
        return self.ids.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Tokens of a text, BOS before them if asked for."""
        return [self.ids.bos] * bool(add_special_tokens) + self.ids.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives."""
        kept = [np.array([*context, *rest][-(self.max_length + 1) :], np.int32) for _, context, rest in requests]
        scores = self._scorer.texts(kept, self._advance)
        answers = []
        for (_, _, rest), score in zip(requests, scores, strict=True):
            scored = slice(max(len(score.nll) - len(rest), 0), None)
            answers.append((-float(score.nll[scored].sum(dtype=np.float64)), bool(score.right[scored].all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text as a document, in windows that share no prediction."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stops, which is left out; options as the harness has them.

        Raises:
          ConfigError: so many tokens to generate that no context fits.
        """
        texts = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            given = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops = tuple(stop for stop in given["until"] if stop)
            groups.setdefault((stops, given["max_gen_toks"], given.get("temperature", 0.0)), []).append(i)
        for (stops, count, temperature), members in groups.items():
            room = self.max_length - count
            if room < 1:
                allowed = f"expected more than the {count} tokens that a task wants to generate"
                raise ConfigError("max_length", self.max_length, allowed)
            prompts = [np.array(self.tok_encode(requests[i].args[0])[-room:], np.int32) for i in members]
            made = complete(
                self._scorer.model,
                self.ids,
                [p if len(p) else np.array([self.prefix_token_id], np.int32) for p in prompts],
                max_new_tokens=count,
                stops=stops,
                temperature=temperature,
                tokens_at_once=self._scorer.tokens_at_once,
                advance=self._advance,
                landmarks=self._scorer.landmarks,
            )
            for i, text in zip(members, made, strict=True):
                texts[i] = text
        return texts


def run(
    model: HydraxLM, tasks: str, *, include: str | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics and their standard errors of a task, or of all of a group, by task; zero-shot unless a task says more.

    Args:
      include: a folder of further tasks (YAML), which may read local files.
      limit: documents of a task at most.

    Raises:
      ConfigError: no such task, or its data cannot be had.
    """
    if include is not None and not pathlib.Path(include).is_dir():
        raise ConfigError("include", include, "expected a folder of tasks")
    manager = TaskManager(include_path=include, include_defaults=False)
    if tasks not in manager.all_subtasks:
        manager = _with_defaults(include)
    if not manager.match_tasks([tasks]):
        near = difflib.get_close_matches(tasks, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "expected a task of lm_eval 0.4.13 or of --include"
        raise ConfigError("suite", f"lm_eval:{tasks}", hint)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork for the bootstrap, which JAX does not survive
    try:
        found = simple_evaluate(
            model=model, tasks=[tasks], limit=limit, bootstrap_iters=DRAWS, task_manager=manager, log_samples=False
        )
    except OSError as error:  # offline, or a file is missing
        raise ConfigError("suite", f"lm_eval:{tasks}", f"its data cannot be read ({error})") from None
    assert found is not None
    results = {}
    for task, values in found["results"].items():
        numbers = {
            metric.removesuffix(",none").replace("_stderr,none", "_stderr"): float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "," in metric
        }
        results[task] = numbers
    return results


@functools.cache
def _with_defaults(include: str | None) -> TaskManager:
    """The harness's own tasks, whose thousands of files take many seconds to read, and those of a folder."""
    return TaskManager(include_path=include)
