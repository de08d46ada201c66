"""What models cost, for people and for files: a table of one model's layers, a table of the arms of a comparison."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from hydrax.core.build import plain
from hydrax.eval.report import write
from hydrax.models.budget import Arm
from hydrax.models.cost import Cost

UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def layers(cost: Cost) -> Table:
    """A row per kind of layer, with the sums over its layers; 9 x 2 are nine layers that are run twice."""
    result = _table(cost, "layers", "of", "parameters", "FLOPs/token", "state bytes", "KV bytes")
    for block, passes in dict.fromkeys((layer.block, layer.passes) for layer in cost.layers):
        own = [layer for layer in cost.layers if (layer.block, layer.passes) == (block, passes)]
        columns = {"parameters": 1, "flops": 1, "state_bytes": cost.batch, "kv_bytes": cost.batch}
        sums = (times * sum(getattr(layer, name) for layer in own) for name, times in columns.items())
        result.add_row(f"{len(own)}" if passes == 1 else f"{len(own)} x {passes}", escape(block), *_whole(*sums))
    if cost.shared_parameters:
        result.add_row("", "weights in common", *_whole(cost.shared_parameters))
    result.add_row("", "embedding, logits", *_whole(cost.embedding_parameters), end_section=True)
    totals = _whole(cost.parameters, cost.flops_per_token, cost.state_bytes, cost.kv_bytes)
    result.add_row(str(len(cost.layers)), "forward", *totals)
    if cost.active_parameters != cost.parameters:
        result.add_row("", "active", *_whole(cost.active_parameters))
    result.add_row("", "training step", "", *_whole(cost.train_flops_per_token))
    return result


def arms(named: Sequence[tuple[str, Arm]], what: str) -> Table:
    """A row per arm. What they are matched in, or else their parameters, is also given relative to the first."""
    knob, related = ([], "parameters") if what == "none" else (["knob"], what)
    columns = ("arm", "parameters", "active", "FLOPs/token", "state", "KV", *knob, f"{related} vs first")
    result = _table(named[0][1].cost, *columns)
    for name, arm in named:
        cost = arm.cost
        counts = [_short(n) for n in (cost.parameters, cost.active_parameters, cost.flops_per_token)]
        held = [f"{_short(n)}B" for n in (cost.state_bytes, cost.kv_bytes)]
        turned = "" if arm.knob is None else f"{arm.knob} = {arm.value}"
        result.add_row(escape(name), *counts, *held, *([turned] if knob else []), f"{arm.difference:+.2%}")
    return result


def save(out: pathlib.Path, named: Sequence[tuple[str, Arm]], what: str) -> None:
    """The arms as JSON: costs, layer by layer, and the models themselves; raises what `report.write` raises."""
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "knob": arm.knob,
            "value": arm.value,
            "difference": arm.difference,
            "cost": dataclasses.asdict(arm.cost),
            "model": plain(dataclasses.asdict(arm.config)),
        }
        for name, arm in named
    ]
    write(out, {"match": what, "arms": rows}, "json")


def _table(cost: Cost, *columns: str) -> Table:
    result = Table(*columns, title=f"{cost.batch} x {cost.seq_len:,} tokens")
    for column in result.columns:
        column.justify = "left" if column.header in ("layers", "of", "arm", "knob") else "right"
        column.no_wrap = True
    return result


def _whole(*values: float) -> list[str]:
    return [f"{value:,.0f}" for value in values]


def _short(value: float) -> str:
    """Four digits and a unit."""
    unit, scale = next(((u, s) for u, s in UNITS if value >= s), UNITS[-1])
    return f"{value / scale:.4g} {unit}"
