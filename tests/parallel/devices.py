"""What tests over virtual devices share: a mesh of one axis, and what a compiled program sends."""

import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

ROWS = PartitionSpec(None, "context")
"""Arrays [B,T,...] divided along T."""


def mesh_of(shards: int) -> Mesh:
    return jax.make_mesh((shards,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])


def count(op: str, program: str) -> int:
    """How often a compiled program, as text, calls an operation."""
    return len(re.findall(rf" {op}(?:-start)?\(", program))


def shapes(program: str) -> Sequence[list[int]]:
    """Of all arrays in a compiled program."""
    return [[int(n) for n in shape.split(",")] for shape in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program)]
