"""A tiny model whose predictions are not degenerate, and text for it."""

import pathlib

import hydrax
from hydrax.models.lm import LM

CONFIG = {"d_model": 32, "pattern": "gla,swa", "mixers": {"gla": {"heads": 2}, "swa": {"heads": 2, "window": 4}}}


def model(**options: object) -> LM:
    """Of bytes; tokens follow from what was before them, not from themselves."""
    lm = hydrax.build({**CONFIG, **options}, seed=1)
    lm.embed.weight[...] *= 10
    return lm


def write(folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    """A folder with a text per file."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder
