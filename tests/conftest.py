"""JAX as every test sees it: 8 virtual CPU devices, compiled programs kept between runs, shapes of ops checked."""

import contextlib
import ctypes
import gc
import os
import pathlib
import signal
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests/gpu is run with JAX_PLATFORMS=cuda
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile much and compute little: without LLVM optimisation a gradient compiles about six times faster.
    # One module per program: splitting it for parallel compilation costs a fifth more, and every core has a worker.
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    fast += " --xla_cpu_parallel_codegen_split_count=1"
    # YNNPACK's reductions read out of bounds where arrays have seven dimensions (jaxlib 0.10.2).
    safe = "--xla_cpu_experimental_ynn_fusion_type="
    os.environ["XLA_FLAGS"] = f"{fast} {safe} {os.environ.get('XLA_FLAGS', '')}"

# Matrices of numpy and scipy are small here, and threads of as many workers as there are cores wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # workers share small ones too
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Before the first import of an op: the annotations of its functions are checked on every call, while tracing.
install_import_hook("hydrax.ops", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Those of a module are dropped after it, and their memory is given back: all of them are gigabytes per worker."""
    yield
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
