"""How much of the time of collectives a GPU computes as well, from a trace of `jax.profiler`."""

import pathlib

import jax
import numpy as np

DEVICE, STREAM, COLLECTIVE = "/device:GPU:", "Stream #", "nccl"
"""How names of planes, lines and kernels begin; other lines of a device repeat those of its streams."""

COPIES = ("Memcpy", "Memset")


def overlapped(folder: pathlib.Path) -> float | None:
    """Of the time of collectives on all GPUs, the share in which other kernels of the GPU run; None if there are none.

    Args:
      folder: of traces, of which the newest is taken.
    """
    traces = sorted(folder.rglob("*.xplane.pb"))
    planes = jax.profiler.ProfileData.from_file(str(traces[-1])).planes if traces else ()
    found = [_of_device(plane) for plane in planes if plane.name.startswith(DEVICE)]
    total, both = np.sum(found, axis=0) if found else (0.0, 0.0)
    return float(both / total) if total else None


def _of_device(plane: "jax.profiler.ProfilePlane") -> tuple[float, float]:
    events = [event for line in plane.lines if line.name.startswith(STREAM) for event in line.events]
    spans: tuple[list, list] = [], []
    for event in events:
        if not event.name.startswith(COPIES):
            spans[not event.name.startswith(COLLECTIVE)].append((event.start_ns, event.start_ns + event.duration_ns))
    collectives, others = (union(np.asarray(s, float).reshape(-1, 2)) for s in spans)
    either = union(np.concatenate((collectives, others)))
    return length(collectives), length(collectives) + length(others) - length(either)


def union(spans: np.ndarray) -> np.ndarray:
    """Spans [n,2] from begin to end as spans that do not overlap, in order."""
    merged: list[list[float]] = []
    for begin, end in spans[np.argsort(spans[:, 0])]:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.asarray(merged).reshape(-1, 2)


def length(spans: np.ndarray) -> float:
    """Of all together."""
    return float((spans[:, 1] - spans[:, 0]).sum())
