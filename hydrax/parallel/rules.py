"""One ordered table from logical axes, declared where a parameter is made, to mesh axes."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hydrax.core.typing import Array

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("replica", "fsdp", "expert")),
    ("seq", ("context",)),
    ("embed", ("fsdp", "context", "expert")),
    ("embed", ("fsdp",)),
    ("mlp", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("state_heads", ("tensor",)),
    ("inner", ("tensor",)),
    ("vocab", ("tensor",)),
    ("experts", ("expert",)),
)
"""The first row of a logical axis wins whose mesh axes are unused in the tensor and divide the dimension; an axis
without such a row (layers, head_dim, state_k, state_v, conv, rank, norm, act_embed, ...) is not sharded."""


def partition(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The `PartitionSpec` of an array of that shape whose dimensions have these logical axes."""
    used: set[str] = set()
    entries = []
    for name, size in zip(axes, shape, strict=True):
        fits = (
            on
            for logical, on in RULES
            if logical == name and used.isdisjoint(on) and size % math.prod(mesh.shape[a] for a in on) == 0
        )
        on = tuple(a for a in next(fits, ()) if mesh.shape[a] > 1)
        used.update(on)
        entries.append(on or None)
    return PartitionSpec(*entries)


def shardings(
    axes: Mapping[str, Sequence[str]], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
    """A sharding for every named array."""
    return {name: NamedSharding(mesh, partition(axes[name], shapes[name].shape, mesh)) for name in shapes}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first dimension is the global batch."""
    return NamedSharding(mesh, PartitionSpec(RULES[0][1]))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts the batch is cut into; the global batch must be a multiple."""
    return math.prod(mesh.shape[a] for a in RULES[0][1])


def local_rows(mesh: Mesh, batch: int) -> slice:
    """The rows of a global batch that the devices of this process hold."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    bounds = [rows.indices(batch)[:2] for (rows,) in held]  # type: ignore[misc]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def constrain(x: Array, axes: Sequence[str]) -> Array:
    """`x` laid out by the rules on the mesh of `jax.set_mesh`; `x` itself where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))
