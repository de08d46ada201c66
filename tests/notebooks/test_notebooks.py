"""Every notebook runs from top to bottom in a folder of its own, with few steps of training, and draws its pictures."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PICTURES = {
    "00_tour": 2,
    "01_add_a_mixer": 2,
    "02_state_vs_recall": 4,
    "03_hybrids_on_every_axis": 3,
    "04_what_a_recurrent_layer_attends_to": 6,
    "05_read_a_sweep": 3,
}
QUICK = {"02_state_vs_recall", "01_add_a_mixer"}
"""Those that `make test` runs; the others train up to 18 models each, and are left to `make test-all`."""


def run(name: str, folder: pathlib.Path, environment: dict[str, str]) -> None:
    """Runs a copy of the notebook, as it is where it is opened: with the style beside it."""
    for source in (FOLDER / f"{name}.py", FOLDER / "hydrax.mplstyle", pathlib.Path(__file__).with_name("show.py")):
        shutil.copy(source, folder)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    given = {**os.environ, **cache, "PYTHONPATH": paths, "TMPDIR": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "show.py", f"{name}.py"], cwd=folder, env=given, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert len(list(folder.glob(f"{name}_*.png"))) == PICTURES[name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_notebook(name: str, tmp_path: pathlib.Path) -> None:
    run(name, tmp_path, {"HYDRAX_NOTEBOOK_STEPS": "4"})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_in_full(name: str, tmp_path: pathlib.Path) -> None:
    """As a reader runs it: all steps, and programs that are optimised."""
    run(name, tmp_path, {"XLA_FLAGS": ""})
