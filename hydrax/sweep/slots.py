"""Slots: the shares of one machine that runs get, found without touching a device."""

import dataclasses
import glob
import os
import subprocess

from hydrax.core.build import ConfigError

CORES_PER_RUN = 4  # by default, where there are no accelerators


@dataclasses.dataclass(frozen=True)
class Slot:
    """One GPU or TPU chip, or some CPU cores."""

    name: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()  # those its processes may use; none: all


def make_slots(parallel: int = 0) -> list[Slot]:
    """Slots for `parallel` runs at a time; 0: one per accelerator, or per `CORES_PER_RUN` cores.

    Raises:
      ConfigError: more than there are GPUs or TPU chips.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    for platform, (devices, make) in ACCELERATORS.items():
        if wanted in ("", *platform.split()) and (found := devices()):
            if parallel > len(found):
                raise ConfigError("parallel", parallel, f"expected at most {len(found)}, one run per device")
            return [make(name) for name in found[: parallel or len(found)]]
    return _cpu_slots(parallel)


def _cpu_slots(parallel: int) -> list[Slot]:
    """Equal shares of the cores this process may use, so that no result depends on the slot; the rest is left over."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    parallel = parallel or max(1, len(cores) // CORES_PER_RUN)
    share = max(1, len(cores) // parallel)
    slots = []
    for i in range(parallel):
        own = [cores[(i * share + j) % len(cores)] for j in range(share)] if cores else []
        slots.append(Slot("cores " + ",".join(map(str, own)) if own else f"slot {i}", cores=tuple(own)))
    return slots


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, else the numbers of all GPUs."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def _tpu_chips() -> list[str]:
    """The chips of this host."""
    return [str(i) for i in range(len(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")))]


def _gpu_slot(name: str) -> Slot:
    return Slot(f"GPU {name}", {"CUDA_VISIBLE_DEVICES": name})


def _tpu_slot(name: str) -> Slot:
    """A process that knows of one chip only, with a port of its own. Not run by us."""
    port = str(8476 + int(name))
    return Slot(
        f"TPU chip {name}",
        {
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_VISIBLE_DEVICES": name,
            "TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{port}",
            "TPU_MESH_CONTROLLER_PORT": port,
        },
    )


ACCELERATORS = {"cuda gpu": (_gpus, _gpu_slot), "tpu": (_tpu_chips, _tpu_slot)}
"""By what JAX_PLATFORMS calls them."""
