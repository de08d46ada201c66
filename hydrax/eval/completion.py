"""Text that a model continues prompts with, for many prompts at once, each up to a stop of its own."""

from collections.abc import Sequence

import numpy as np

from hydrax.data.landmarks import Landmarks
from hydrax.data.tokenizer import Tokenizer
from hydrax.eval.scoring import Advance, Tokens, batches, padded
from hydrax.infer.sample import stream
from hydrax.models.lm import LM


def complete(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    temperature: float = 0.0,
    seed: int = 0,
    tokens_at_once: int = 2**14,
    advance: Advance | None = None,
    landmarks: Landmarks | None = None,
) -> list[str]:
    """The continuation of every prompt, at most that many tokens, without its first stop and what follows it.

    The end of a document stops it, too. Temperature 0 takes the most likely token; a batch ends as soon as all its
    rows have stopped. `landmarks` are as of `infer.sample.generate`.
    """
    texts = [""] * len(prompts)
    for rows, width, chosen in batches([len(p) for p in prompts], tokens_at_once):
        lengths = np.ones(rows, np.int64)
        lengths[: len(chosen)] = [len(prompts[i]) for i in chosen]
        made: list[list[int]] = [[] for _ in chosen]
        running = set(range(len(chosen)))
        for tokens in stream(
            model,
            padded([prompts[i] for i in chosen], rows, width),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            lengths=lengths,
            landmarks=landmarks,
        ):
            for row in list(running):
                if tokens[row] == tokenizer.eos:
                    running.discard(row)
                    continue
                made[row].append(int(tokens[row]))
                text = texts[chosen[row]] = tokenizer.decode(made[row])
                if any(stop in text for stop in stops):
                    running.discard(row)
            if not running:
                break
        if advance is not None:
            advance(len(chosen))
    return [until(text, stops) for text in texts]


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
