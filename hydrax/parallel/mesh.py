"""The device mesh, outermost (slowest network) axis first."""

import dataclasses
import math
from typing import Annotated, Literal

import jax

from hydrax.core.build import Check, ConfigError

AXES = ("replica", "fsdp", "context", "expert", "tensor")

Size = Annotated[int, Check("an integer >= 1, or -1 for all remaining devices", lambda x: x == -1 or x >= 1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes all that remain."""

    replica: Size = 1  # copies of the parameters
    fsdp: Size = -1  # data parallel, parameters sharded
    context: Size = 1  # tokens of a sequence
    expert: Size = 1  # experts of MoE layers
    tensor: Size = 1  # heads and inner widths
    layout: Literal["contiguous", "zigzag"] = "contiguous"  # of rows over context; zigzag shares causal pairs equally
    strategy: str | None = None  # over context, in order of preference: ring, ulysses, ...; None: each mixer's default

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of every axis of `AXES` for that many devices.

        Raises:
          ConfigError: more than one -1, or a product that is not the number of devices.
        """
        given = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in given if size != -1)
        if given.count(-1) > 1 or devices % known or (-1 not in given and known != devices):
            value = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, given, strict=True))
            raise ConfigError("mesh", value, f"expected sizes whose product is the {devices} devices, at most one -1")
        return tuple(devices // known if size == -1 else size for size in given)


def make_mesh(cfg: MeshConfig) -> jax.sharding.Mesh:
    """A mesh over all devices, its axes left to the compiler's propagation (`AxisType.Auto`)."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(cfg.sizes(jax.device_count()), AXES, axis_types=auto)
