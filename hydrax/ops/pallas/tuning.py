"""Choices of the Hopper kernels by device."""

import dataclasses

from hydrax.ops.pallas.tiles import BLOCK


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`stages`: most chunks in shared memory, of `memory` bytes, at once; `blocks`: thread blocks on the device."""

    stages: int = 3
    memory: int = 227 * 1024
    blocks: int = 132

    def stages_of(self, moving: int, fixed: int, facts: int) -> int:
        """How many chunks of `moving` bf16 blocks and `facts` vectors fit beside the `fixed` blocks."""
        block = 2 * BLOCK**2
        return min(self.stages, (self.memory - fixed * block - 1024) // (moving * block + 4 * BLOCK * facts))


TUNING = {"NVIDIA H100 80GB HBM3": Tuning()}
"""By `device_kind`: the devices on which these kernels were checked and measured."""
