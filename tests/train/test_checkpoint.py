"""A checkpoint comes back bit by bit, on any mesh; a damaged one is noticed, whatever the damage."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.parallel.mesh import MeshConfig, make_mesh
from hydrax.train import folder
from hydrax.train.checkpoint import SEAL, Checkpoints, load_run
from hydrax.train.optim import OptimConfig, make_optimizer
from hydrax.train.state import abstract_state, new_state, shardings
from tests.tolerances import assert_trees_close
from tests.train import tiny

PLAN = tiny.plan()
TX = make_optimizer(OptimConfig(), 10, PLAN.meta)


@functools.cache
def mesh(**sizes):
    return make_mesh(build(MeshConfig, sizes))


@functools.cache
def first():
    return jax.device_get(new_state(PLAN, TX, 0, mesh(fsdp=8)))


def state(step):
    """A sharded state that is another one for every step."""
    place = shardings(abstract_state(PLAN, TX, mesh(fsdp=8)))
    return jax.device_put(jax.tree.map(lambda x: (x + step).astype(x.dtype), first()), place)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with the steps 2 and 4 of 1, 2, 3, 4 (two are kept, one is saved twice)."""
    workdir = tmp_path_factory.mktemp("run")
    cfg = tiny.config(workdir)
    folder.describe(workdir, build_with_vocabulary(cfg))
    spec = {"config": folder.as_dict(build_with_vocabulary(cfg)), "layers": []}
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2, 4, 4):
            checkpoints.save(step, state(step), {"seed": 0, "step": step}, spec)
    return workdir


def build_with_vocabulary(cfg):
    values = folder.as_dict(cfg)
    values["model"]["vocab_size"] = tiny.VOCABULARY
    return folder.parse(values, pathlib.Path())


@pytest.fixture
def run(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir, **sizes):
    with Checkpoints(workdir, keep=2) as checkpoints:
        return checkpoints.restore(abstract_state(PLAN, TX, mesh(**(sizes or {"fsdp": 8}))))


def tree_bytes(workdir):
    return {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"replica": 4, "tensor": 2}], ids=str)
def test_everything_comes_back_on_any_mesh(run, sizes):
    back = restore(run, **sizes)
    assert (back.step, back.data) == (4, {"seed": 0, "step": 4})
    assert back.spec["config"]["model"]["pattern"] == "2*attn"
    assert_trees_close("state", back.state, state(4), 0.0)
    wanted = jax.tree.map(lambda x: x.sharding, abstract_state(PLAN, TX, mesh(**sizes)))
    assert jax.tree.map(lambda x: x.sharding, back.state) == wanted


def test_nothing_saved_yet(tmp_path):
    assert restore(tmp_path) is None


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The state is copied before `save` returns: the next step overwrites its buffers while files are written."""
    expected = np.arange(4_000_000, dtype=np.float32)
    first = {"w": jax.numpy.arange(4_000_000, dtype=np.float32)}
    wipe = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, first, {}, {})
        jax.block_until_ready(wipe(first))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=here)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(abstract).state["w"], expected)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {"missing": pathlib.Path.unlink, "truncated": cut, "empty": lambda p: p.write_bytes(b""), "flipped": flip}
FILES = {
    "arrays": lambda step: max((step / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0),
    "tree": lambda step: step / "state" / "_METADATA",
    "data": lambda step: step / "data" / "metadata",
    "spec": lambda step: step / "spec" / "metadata",
    "seal": lambda step: step / SEAL,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, capsys, file, damage):
    DAMAGES[damage](FILES[file](run / "checkpoints" / "4"))
    broken = tree_bytes(run / "checkpoints" / "4")
    back = restore(run)
    assert back.step == 2
    assert_trees_close("state", back.state["params"], state(2)["params"], 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint 4 of {run} is damaged: ")
    assert tree_bytes(run / "damaged" / "4") == broken  # nothing is deleted
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2"]


def test_a_step_can_be_saved_and_damaged_again(run):
    for name in ("4", "4.1"):
        cut(FILES["arrays"](run / "checkpoints" / "4"))
        assert restore(run).step == 2
        assert (run / "damaged" / name).is_dir()
        with Checkpoints(run, keep=2) as checkpoints:
            checkpoints.save(4, state(4), {"seed": 0, "step": 4}, {})
    assert restore(run).step == 4


def test_if_all_are_damaged_nothing_is_touched(run):
    for step in ("2", "4"):
        cut(FILES["arrays"](run / "checkpoints" / step))
    before = tree_bytes(run)
    with pytest.raises(ConfigError, match=r"workdir = .*damaged \(4, 2\)") as error:
        restore(run)
    assert "\n" not in str(error.value)
    assert tree_bytes(run) == before


def test_load_run_gives_the_model_and_changes_nothing(run, capsys):
    cut(FILES["arrays"](run / "checkpoints" / "4"))
    before = tree_bytes(run)
    model, cfg = load_run(run)
    assert tree_bytes(run) == before
    assert "checkpoint 4" in capsys.readouterr().out
    assert cfg == folder.parse(folder.read_config(run), run)
    tokens = tiny.batch(2, 8)["tokens"]
    expected = PLAN.merge(jax.device_get(state(2)["params"]))
    np.testing.assert_array_equal(model(tokens), expected(tokens))


@pytest.mark.parametrize("case", ["absent", "foreign", "unsaved"])
def test_load_run_says_what_is_wrong_in_one_line(tmp_path, case):
    workdir = tmp_path / "run"
    if case != "absent":
        workdir.mkdir()
        (workdir / "notes.txt").write_text("x", encoding="utf-8")
    if case == "unsaved":
        folder.describe(workdir, tiny.config(tmp_path))
    with pytest.raises(ConfigError, match="workdir = ") as error:
        load_run(workdir)
    assert "\n" not in str(error.value)
