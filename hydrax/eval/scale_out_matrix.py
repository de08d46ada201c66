"""The matrix of `scale_out`: which models are trained on how many devices, divided how."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from hydrax.core.build import Check, ConfigError, Positive, build
from hydrax.core.config import load_config
from hydrax.models.divided import check_divided
from hydrax.parallel.mesh import AXES
from hydrax.train.config import RunConfig

PARTS = ("fsdp", "context", "tensor", "expert")

HYBRID, LINEAR = "every(3, gdn, attn)", ("allgather_state", "ring_state")
CONTEXT: dict[str, tuple[str, tuple[str, ...]]] = {
    "gdn": ("fill(gdn)", (*LINEAR, "ulysses")),
    "mamba2": ("fill(mamba2)", (*LINEAR, "ulysses")),
    "hybrid": (HYBRID, ("allgather_state, allgather_kv", "allgather_state, ring", "ring_state, ring", "ulysses")),
}
"""Pattern and strategies of the models that divide one row: of each kind the states of linear layers, then keys.

Where softmax layers have keys of other devices, the row is divided in zigzag, which gives all the same work."""


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


@dataclasses.dataclass(frozen=True)
class Settings:
    size: Literal["full", "tiny"]  # tiny: the same matrix for virtual devices of a CPU
    parts: Annotated[tuple[Literal["fsdp", "context", "tensor", "expert"], ...], Check("at least one part", bool)]
    devices: tuple[Positive, ...]  # counts; empty: 1, 2, 4, 8 as far as there are, for tiny 1 and most
    context_lens: tuple[Positive, ...]  # tokens of the one row; empty: those of the size
    cells: Annotated[str, Check("a regular expression", _compiles)]  # found in the names of those wanted
    steps: Positive  # timed, fewer where they are long
    seconds: Positive  # of a cell, at most
    profile: str | None  # folder for traces of one step of every cell


@dataclasses.dataclass(frozen=True)
class Cell:
    """A config on its mesh, and the small one that is compared with one device."""

    part: str
    model: str
    devices: int
    cfg: RunConfig
    small: RunConfig

    @property
    def name(self) -> str:
        strategy = f", {self.cfg.mesh.strategy}" if self.cfg.mesh.strategy else ""
        return f"{self.part}: {self.model}{strategy}, {self.cfg.data.seq_len:,} tokens, {self.devices} devices"


SIZES: dict[str, dict[str, Any]] = {
    "full": {"rows": 4, "seq_len": 4096, "context_lens": (131_072, 524_288, 1_048_576)},
    "tiny": {"rows": 1, "seq_len": 64, "context_lens": (128, 256)},
}
TINY = {
    "model.d_model": 64,
    "model.num_layers": 4,
    "model.ffn_dim": 128,
    "model.vocab_size": 256,
    "model.mixers.gdn": {"heads": 8, "key_dim": 8, "value_dim": 8},
    "model.mixers.attn": {"heads": 8, "kv_heads": 8, "key_dim": 8},
    "model.mixers.mamba2": {"heads": 8, "key_dim": 8, "value_dim": 16},
    "train.dtype": "float32",
    "optim.lr": 3e-3,
    "optim.warmup": 1,
    "optim.eps": 1e-2,  # at 1e-8 the first updates are signs, and rounding decides those of small gradients
}
HEADS = {  # as many as devices, for ulysses
    "model.mixers.attn": {"heads": 8, "kv_heads": 8, "key_dim": 128},
    "model.mixers.mamba2": {"heads": 8, "key_dim": 128, "value_dim": 64},
}


def cells(settings: Settings, present: int) -> list[Cell]:
    """Those that are asked for, on counts of devices that are asked for, or else 1, 2, 4, 8 of those `present`.

    Raises:
      ConfigError: more devices than there are, or no cell.
    """
    found = [cell for cell in _cells(settings, present) if re.search(settings.cells, cell.name)]
    if not found:
        allowed = "expected a regular expression found in names of the matrix (--list without --cells prints them)"
        raise ConfigError("cells", settings.cells, allowed)
    return found


def _cells(settings: Settings, present: int) -> Iterator[Cell]:
    for n in settings.devices:
        if n > present:
            raise ConfigError("devices", n, f"expected at most the {present} that are present")
    size = SIZES[settings.size]
    counts = [n for n in (1, 2, 4, 8) if n <= present]
    if settings.size == "tiny":  # compiling is most of it
        counts = [n for n in counts if n in (counts[0], counts[-1])]
    for n in settings.devices or counts:
        for part in settings.parts:
            if part == "fsdp":
                yield _cell(settings, part, "hybrid", n, size["seq_len"], size["rows"] * n, {"mesh.fsdp": n})
            elif part == "tensor" and n % 2 == 0:
                mesh = {"mesh.fsdp": n // 2, "mesh.tensor": 2}
                yield _cell(settings, part, "hybrid", n, size["seq_len"], size["rows"] * n, mesh)
            elif part == "expert":
                moe: dict[str, Any] = {
                    "model.ffn": "moe",
                    "model.moe": {"experts": 8, "top_k": 2, "width": 512, "balance": 0.01},
                }
                moe |= {"mesh.expert": n, "mesh.fsdp": 1}
                yield _cell(settings, part, "moe", n, size["seq_len"], size["rows"] * n, moe)
            elif part == "context":
                yield from _context(settings, n, settings.context_lens or size["context_lens"])


def _context(settings: Settings, n: int, lengths: tuple[int, ...]) -> Iterator[Cell]:
    for length in lengths:
        for model, (pattern, strategies) in CONTEXT.items():
            for strategy in strategies if n > 1 else [None]:
                how = {"mesh.context": n, "mesh.fsdp": 1, "mesh.strategy": strategy, "model.pattern": pattern}
                how["mesh.layout"] = (
                    "zigzag" if model == "hybrid" and strategy not in (None, "ulysses") else "contiguous"
                )
                cell = _cell(settings, "context", model, n, length, 1, {**HEADS, **how})
                check_divided(cell.cfg.model, cell.cfg.mesh, dict.fromkeys(AXES, 1) | {"context": n}, length)
                yield cell


def _cell(settings: Settings, part: str, model: str, n: int, seq_len: int, batch: int, how: dict[str, Any]) -> Cell:
    common = {"train.accumulate": 1, "data.documents": False, "train.steps": 1000, **how}
    base = "lm:1b3" if part in ("fsdp", "tensor") else "lm:340m"
    given: dict[str, Any] = {"data.seq_len": seq_len, "train.batch_size": batch}
    if settings.size == "tiny":
        whole = _config(base, {**common, **TINY, **given})
        return Cell(part, model, n, whole, whole)
    tiny = _config(base, {**common, **TINY, "data.seq_len": min(seq_len, 128), "train.batch_size": min(batch, n)})
    given |= {"model.vocab_size": 32_000} | ({"train.remat": "full"} if part == "context" else {})
    return Cell(part, model, n, _config(base, {**common, **given}), tiny)


def _config(base: str, overrides: dict[str, Any]) -> RunConfig:
    return build(RunConfig, load_config(base, **overrides).to_dict())
