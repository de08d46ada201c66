"""The share of collectives that a device hides behind its own work, read from a trace."""

import dataclasses

import jax
import numpy as np
import pytest

from hydrax.eval import overlap


@dataclasses.dataclass
class Named:
    """A plane, a line or an event of a trace."""

    name: str
    lines: tuple = ()
    events: tuple = ()
    start_ns: float = 0.0
    duration_ns: float = 0.0
    planes: tuple = ()


def event(name: str, start: float, end: float) -> Named:
    return Named(name, start_ns=start, duration_ns=end - start)


def trace(monkeypatch, tmp_path, *planes: Named) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "host.xplane.pb").touch()
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: Named("", planes=planes), raising=True)


def test_what_runs_beside_collectives(monkeypatch, tmp_path):
    kernels = event("gemm", 0, 10), event("gemm", 10, 15), event("fusion", 5, 12), event("MemcpyD2D", 30, 33)
    compute = Named("Stream #7(Compute)", events=kernels)
    network = Named("Stream #9(Compute)", events=(event("ncclDevKernel_AllGather", 8, 20), event("ncclSend", 30, 34)))
    derived = Named("XLA Ops", events=(event("all-gather", 0, 40),))
    alone = Named("Stream #9(Compute)", events=(event("ncclDevKernel_AllGather", 0, 4),))
    gpus = Named("/device:GPU:0", (compute, network, derived)), Named("/device:GPU:1", (alone,))
    trace(monkeypatch, tmp_path, *gpus, Named("/host:CPU", (network,)))
    assert overlap.overlapped(tmp_path) == (15 - 8) / (12 + 4 + 4)


def test_without_collectives_there_is_no_share(monkeypatch, tmp_path):
    assert overlap.overlapped(tmp_path) is None
    trace(monkeypatch, tmp_path, Named("/device:GPU:0", (Named("Stream #7", events=(event("gemm", 0, 1),)),)))
    assert overlap.overlapped(tmp_path) is None


@pytest.mark.parametrize("spans", [[], [[3, 4], [0, 1], [1, 2], [0.5, 0.7]]])
def test_union(spans):
    merged = overlap.union(np.asarray(spans, float).reshape(-1, 2))
    assert merged.tolist() == ([[0, 2], [3, 4]] if spans else [])
