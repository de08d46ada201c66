"""The floor plan: a room imports only from rooms to its left, and nothing touches a device before it is asked to."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Rooms from left to right; those of one entry do not import one another.
FLOOR = [
    {"core"},
    {"ops"},
    {"parallel"},
    {"nn"},
    {"mixers"},
    {"models"},
    {"train"},
    {"infer"},
    {"interp", "eval", "sweep"},
    {"report"},
]
SIDE = {"data", "tasks"}  # import only core; used from train on
RANK = {room: i for i, rooms in enumerate(FLOOR) for room in rooms}
FILES = sorted((ROOT / "hydrax").rglob("*.py"))
NO_CONFIGS = ("__init__", "common")
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.stem not in NO_CONFIGS and p.parent.name != "sweeps")
SWEEPS = sorted(p for p in (ROOT / "configs" / "sweeps").glob("*.py") if p.stem not in NO_CONFIGS)


def imported(source: str) -> list[str]:
    """Absolute names of everything imported anywhere in a file, in a function or for type checking too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(name: str) -> str | None:
    """The room of `hydrax.<room>....`; None for anything else."""
    parts = name.split(".")
    return parts[1] if parts[0] == "hydrax" and len(parts) > 1 else None


def allowed(importer: str, target: str) -> bool:
    if importer == target or target == "core":
        return True
    if importer in SIDE:
        return False
    if target in SIDE:
        return RANK[importer] >= RANK["train"]
    return RANK[target] < RANK[importer]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT / "hydrax").as_posix())
def test_a_room_imports_only_from_rooms_to_its_left(path):
    importer = path.relative_to(ROOT / "hydrax").parts[0]
    if importer == "__init__.py":  # the public surface names all rooms, lazily
        return
    for name in imported(path.read_text(encoding="utf-8")):
        assert name.split(".")[0] not in ("launch", "configs", "tests"), f"{path.name} imports {name}"
        target = room(name)
        if target is not None and target != "__version__":
            assert allowed(importer, target), f"{importer}/{path.name} imports {name}"


def test_the_rules_can_fail():
    assert not allowed("nn", "mixers")
    assert not allowed("eval", "interp")
    assert not allowed("data", "ops")
    assert not allowed("models", "data")
    assert allowed("train", "data")
    assert imported("def f():\n    from hydrax.models import lm") == ["hydrax.models.lm"]


def test_mixers_never_import_mixers():
    for path in (p for p in FILES if "mixers" in p.parts and p.parent.name != "mixers"):
        others = [n for n in imported(path.read_text(encoding="utf-8")) if n.startswith("hydrax.mixers")]
        assert all(n.startswith("hydrax.mixers.base.") for n in others), f"{path.name} imports {others}"


def test_every_room_is_on_the_floor():
    rooms = {p.name for p in (ROOT / "hydrax").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert rooms <= RANK.keys() | SIDE


def test_no_file_is_called_utils():
    assert not [p for folder in ("hydrax", "configs", "launch") for p in (ROOT / folder).rglob("util*.py")]


def run_without_devices(code: str) -> None:
    """Runs code in a process in which any device query fails."""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_trap_for_device_queries_works():
    with pytest.raises(AssertionError, match="no_such_platform"):
        run_without_devices("import jax; jax.devices()")


def test_importing_everything_touches_no_device():
    modules = [p.relative_to(ROOT).with_suffix("") for f in ("hydrax", "launch") for p in (ROOT / f).rglob("*.py")]
    names = [".".join(m.parts).removesuffix(".__init__") for m in modules]
    names = [n for n in names if n.split(".")[-1] not in ("gpu", "tpu")]
    run_without_devices(f"import importlib\nfor name in {sorted(names)}: importlib.import_module(name)")


def test_configs_touch_no_device():
    names = [p.relative_to(ROOT).as_posix() for p in CONFIGS]
    assert names
    run_without_devices(f"from hydrax import load_config\nfor name in {names}: load_config(name)")


def test_sweeps_touch_no_device(tmp_path):
    names = [p.relative_to(ROOT).as_posix() for p in SWEEPS]
    assert names
    code = f"from hydrax.sweep.runs import expand\nfor name in {names}: expand(name, {str(tmp_path)!r})"
    run_without_devices(code)


def test_importing_hydrax_loads_neither_jax_nor_a_room():
    run_without_devices("import sys, hydrax; assert sys.modules.keys().isdisjoint(('jax', 'flax', 'hydrax.core'))")
