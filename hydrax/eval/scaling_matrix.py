"""The matrix of `launch.bench --scaling`: which models train on which meshes of the devices of one host.

A cell is a model and a way to divide it. Its `config(devices)` is what is timed; `small(devices)`, in fp32 and with the
same mesh, is what is compared with one device before, since not all models fit on one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hydrax.core.build import ConfigError, build
from hydrax.core.config import load_config
from hydrax.train.config import RunConfig

Mesh = Mapping[str, Any]
"""Keys of `mesh`; axes that are not named have one device."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the matrix.

    Attributes:
      group: what it is about: fsdp, tensor, expert or context.
      name: of the cell within its group.
      base: a config, under the values below.
      values: overrides of it, at full size and not.
      mesh: of that many devices.
      rows: sequences per step and device; None: one sequence, whose tokens the devices share.
      least: devices that it needs.
    """

    group: str
    name: str
    base: str
    values: Mapping[str, Any]
    mesh: Callable[[int], Mesh]
    rows: int | None = None
    least: int = 1
    smaller: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.group}/{self.name}"

    def config(self, devices: int, size: str = "full") -> RunConfig:
        """Of full size, or tiny: the same layers, narrow and short."""
        tiny = {**TINY, **self.smaller, "data.seq_len": 64} if size == "tiny" else {}
        rows = 1 if self.rows is None else devices * (1 if tiny else self.rows)
        mesh = {f"mesh.{axis}": n for axis, n in {"fsdp": 1, **self.mesh(devices)}.items()}
        values = {**COMMON, **self.values, "train.batch_size": rows, **tiny, **mesh}
        return build(RunConfig, load_config(self.base, **values).to_dict())

    def small(self, devices: int) -> RunConfig:
        return self.config(devices, "tiny")


COMMON = {"model.vocab_size": 32_000, "train.accumulate": 1}
TINY = {
    "model.d_model": 64,
    "model.num_layers": 4,
    "model.ffn_dim": 64,
    "model.vocab_size": 256,
    "model.mixers": {
        "gdn": {"heads": 8, "key_dim": 8, "value_dim": 8},
        "mamba2": {"heads": 8, "value_heads": 8, "key_dim": 8, "value_dim": 8},
        "attn": {"heads": 8, "key_dim": 8},
    },
    "train.dtype": "float32",
}
HYBRID = "every(3, gdn, attn)"
LENGTHS = (131_072, 524_288, 1_048_576)
WIDE = {"heads": 8, "key_dim": 128, "value_dim": 128}
MIXERS = {"gdn": WIDE, "mamba2": {**WIDE, "value_heads": 8}, "attn": {"heads": 8, "key_dim": 128}}
PATTERNS = {
    "gdn": ("fill(gdn)", ("allgather_state", "ring_state", "ulysses")),
    "mamba2": ("fill(mamba2)", ("allgather_state", "ring_state", "ulysses")),
    "hybrid": (HYBRID, ("allgather_state, allgather_kv", "allgather_state, ring", "ring_state, ring", "ulysses")),
}
"""Models of one long sequence, and what serves their states, and keys, on divided rows."""


def _long(model: str, strategy: str, length: int) -> Cell:
    pattern, _ = PATTERNS[model]
    values = {
        "model.pattern": pattern,
        "model.mixers": MIXERS,
        "data.seq_len": length,
        "train.remat": "full",
    }
    name = f"{model}/{strategy.replace(', ', '+')}/{length}"
    return Cell("context", name, "lm:340m", values, lambda n: {"context": n, "strategy": strategy})


CELLS = (
    Cell("fsdp", "hybrid_1b3", "lm:1b3", {"data.seq_len": 4096}, lambda n: {"fsdp": n}, rows=8),
    *(_long(model, s, T) for T in LENGTHS for model, (_, strategies) in PATTERNS.items() for s in strategies),
    Cell(
        "tensor",
        "hybrid_1b3",
        "lm:1b3",
        {"data.seq_len": 4096},
        lambda n: {"tensor": 2, "fsdp": n // 2},
        rows=4,
        least=2,
    ),
    Cell(
        "expert",
        "hybrid_moe",
        "lm:100m",
        {"data.seq_len": 4096, "model.ffn": "moe", "model.moe": {"experts": 16, "top_k": 2}},
        lambda n: {"expert": n},
        rows=8,
        smaller={"model.moe": {"experts": 8, "top_k": 2, "width": 32}},
    ),
)
"""The whole matrix. Strategies are ordered by preference: the first for states, the second for keys and values."""


def chosen(names: str) -> tuple[Cell, ...]:
    """The cells whose labels begin with one of the names, which have commas between them; all if there are none.

    Raises:
      ConfigError: a name with which none begins.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(cell.label.startswith(name) for cell in CELLS):
            groups = ", ".join(dict.fromkeys(cell.group for cell in CELLS))
            allowed = f"expected beginnings of cells, as {CELLS[0].label} or {CELLS[1].label}; groups: {groups}"
            raise ConfigError("cells", name, allowed)
    return tuple(c for c in CELLS if not wanted or any(c.label.startswith(name) for name in wanted))
