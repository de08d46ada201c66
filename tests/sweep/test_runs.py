"""Runs of a sweep: ids that stay, commands that say what was checked, and one line for a wrong entry."""

import json
import pathlib
import re

import numpy as np
import pytest

import launch.train
from hydrax.core.build import ConfigError, build
from hydrax.core.config import known, load_config
from hydrax.sweep import command, runs, table
from hydrax.sweep.status import Status
from hydrax.train import folder
from hydrax.train.config import RunConfig
from launch import cli
from tests.sweep.conftest import BASE, run


def ids(found: list[runs.Run]) -> list[str]:
    return [r.id for r in found]


def test_ids_depend_on_the_overrides_alone(write, tmp_path):
    first = runs.expand(write([{**BASE, "optim.lr": 0.01}]), tmp_path)
    keys_turned = runs.expand(write([dict(reversed({**BASE, "optim.lr": 1e-2}.items()))]), tmp_path)
    among_others = runs.expand(write([{**BASE, "optim.lr": 0.02}, {**BASE, "optim.lr": "0.0100"}]), tmp_path)
    assert ids(first) == ids(keys_turned) == ids(among_others)[1:]
    assert len(set(ids(among_others))) == 2
    assert first[0].id == "885c6f83"  # folders of earlier versions are found again


def test_names_say_what_differs(write, tmp_path):
    grid = [{**BASE, "model.pattern": p, "optim.lr": lr} for p in ("3*(gla,attn)", "attn") for lr in (1e-3, 1e-4)]
    names = [r.name.rpartition("-")[0] for r in runs.expand(write(grid), tmp_path)]
    assert names == ["3-gla-attn-lr0.001", "3-gla-attn-lr0.0001", "attn-lr0.001", "attn-lr0.0001"]
    alone = runs.expand(write(grid[:1]), tmp_path)
    assert alone[0].name.startswith("quickstart-")


def test_a_run_that_has_a_folder_keeps_it(write, tmp_path):
    entry = {**BASE, "optim.lr": 0.01}
    (alone,) = runs.expand(write([entry]), tmp_path)
    alone.folder.mkdir()
    _, again = runs.expand(write([{**BASE, "optim.lr": 0.02}, entry]), tmp_path)
    assert again.folder == alone.folder
    assert f"--workdir={alone.folder}" in again.command


def test_entries_that_say_the_same_are_one_run(write, tmp_path):
    assert len(runs.expand(write([{**BASE, "optim.lr": 1}, {**BASE, "optim.lr": 1.0}]), tmp_path)) == 1


VALUES = {
    "optim.lr": 3e-4,
    "optim.clip": None,
    "model.pattern": "2*(gla,attn)",
    "model.mixers.gla": {"heads": 2, "chunk_size": 16},
    "model.mixers.attn.heads": 8,
    "model.tie": False,
    "sample.prompt": "a = 'b' --x",
    "data.path": None,
    "mesh.fsdp": -1,
}


def test_the_command_trains_what_was_checked(write, tmp_path, monkeypatch):
    (found,) = runs.expand(write([{**BASE, **VALUES}]), tmp_path)
    expected = load_config("quickstart", **{"train.steps": 4, **VALUES})
    assert found.cfg == build(RunConfig, expected.to_dict())
    assert found.cfg.model.mixers["gla"] == {"heads": 2, "chunk_size": 16}
    taken = []
    monkeypatch.setattr(cli, "run_config", lambda name, overrides: taken.append((name, overrides)) or exit())
    with pytest.raises(SystemExit):
        launch.train.main(["launch.train", *found.command[3:]])
    ((name, overrides),) = taken
    assert build(RunConfig, load_config(name, **overrides).to_dict()) == found.cfg


def test_numbers_of_numpy_are_numbers(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(
        "import numpy as np\nfrom hydrax.sweep import grid\ndef get_sweep(arg=''):\n"
        "    return grid.product([{'config': 'quickstart'}], grid.sweep('optim.lr', np.logspace(-3, -1, 3)),\n"
        "        grid.sweep('train.seed', np.arange(2)))\n"
    )
    found = runs.expand(str(path), tmp_path)
    rates = [r.cfg.optim.lr for r in found]
    assert rates == [x for x in np.logspace(-3, -1, 3).tolist() for _ in range(2)]
    assert [r.cfg.train.seed for r in found] == [0, 1] * 3


def test_flags_are_for_all_runs(write, tmp_path):
    sweep = write([{**BASE, "optim.lr": lr} for lr in (0.1, 0.2)])
    found = runs.expand(sweep, tmp_path, {"train.steps": "7", "config": "lm"})
    assert [(r.cfg.train.steps, r.overrides["config"]) for r in found] == [(7, "lm")] * 2
    with pytest.raises(ConfigError, match=r"^optim\.lr = '0\.3': .*my\.py varies this key"):
        runs.expand(sweep, tmp_path, {"optim.lr": "0.3"})


WRONG = [
    ({"optim.lr": "fast"}, r"optim\.lr = 'fast': expected a number"),
    ({"optim.lrr": 1}, r"optim\.lrr = '1': unknown key; did you mean 'optim\.lr'\?"),
    ({"model.pattern": "gln"}, r"model\.pattern = 'gln': 'gln' is neither a mixer nor a block; allowed: .*gla"),
    ({"train.steps": 1.5}, r"train\.steps = '1\.5': expected an integer"),
    ({"model.mixers.gdn.head": 7}, r"model\.mixers\.gdn\.head = 7: unknown key; did you mean 'heads'\?"),
    ({"sample.top_p": 0}, r"sample\.top_p = 0\.0: expected a number above 0"),
    ({"data.tokenizer": "bytes"}, r"data\.tokenizer = 'bytes': expected \"byte\" or a tokenizer\.json"),
    ({"config": "quickstrat"}, r"config = 'quickstrat': no such file; did you mean 'quickstart'\?"),
    ({"config": "lm:2b"}, r"variant = '2b': expected one of 50m, 100m, 340m, 1b3"),
]


@pytest.mark.parametrize(("entry", "says"), WRONG, ids=[next(iter(e)) for e, _ in WRONG])
def test_a_wrong_entry_is_one_line_and_nothing_runs(entry, says, write, stand_in, tmp_path):
    sweep = write([BASE, {**BASE, **entry}, BASE])
    outcome = run(f"--sweep={sweep}", f"--workdir={tmp_path / 'runs'}")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(sweep)}, entry 2 of 3, \{{.*\}}: {says}.*\n", outcome.err), outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ([], r"sweep = '.*': get_sweep returned \[\], expected a list"),
        ({"optim.lr": 1}, r"sweep = '.*': get_sweep returned \{'optim\.lr': 1\}, expected a list"),
        ([BASE, ("optim.lr", 1)], r".*entry 2 of 2 = \('optim\.lr', 1\): expected a dict"),
        ([{"optim.lr": 1}], r".*entry 1 of 1, .*: config = None: expected the config to start from"),
    ],
)
def test_a_wrong_grid(grid, says, write, tmp_path):
    outcome = run(f"--sweep={write(grid)}", f"--workdir={tmp_path / 'runs'}")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(f"error: {says}.*\n", outcome.err), outcome.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("get_sweep = 3", r"expected a Python file that defines get_sweep\(arg=''\)"),
        ("def get_sweep(arg):\n    return 1 / 0", r"ZeroDivisionError: division by zero \(my\.py, line 2\)"),
        ("import nothing_of_that_name", r"ModuleNotFoundError: .*"),
    ],
)
def test_a_file_that_fails(text, says, tmp_path):
    path = tmp_path / "my.py"
    path.write_text(text)
    outcome = run(f"--sweep={path}", f"--workdir={tmp_path / 'runs'}")
    assert outcome.code == 2
    assert re.fullmatch(f"error: sweep = '.*my.py': {says}\n", outcome.err), outcome.err


def test_a_sweep_that_is_not_there_is_guessed(tmp_path):
    outcome = run("--sweep=sweeps/ratoi", f"--workdir={tmp_path}")
    assert "error: sweep = 'sweeps/ratoi': no such file; did you mean 'sweeps/ratio'?" in outcome.err


def test_a_folder_that_cannot_be_written_is_refused(write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^workdir = '.*/file/sweep': cannot be written \(Not a directory\); expected "
    ):
        command.sweep(write([BASE]), tmp_path / "file" / "sweep")


def test_a_folder_of_another_config_is_refused(write, tmp_path):
    """The base has changed since the run began: its results would stand for something else."""
    sweep = write([{**BASE, "optim.lr": 0.01}])
    (found,) = runs.expand(sweep, tmp_path)
    found.folder.mkdir()
    values = folder.as_dict(found.cfg)
    values["model"]["vocab_size"], values["optim"]["warmup"] = 259, 11
    (found.folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"entry 1 of 1, .*workdir = .*another config; .*optim\.warmup: 11 -> 10$"):
        runs.expand(sweep, tmp_path)
    values["optim"]["warmup"] = 10
    (found.folder / "config.json").write_text(json.dumps(values))
    assert runs.expand(sweep, tmp_path) == [found]


SHIPPED = {
    "sweeps/axis": 8,
    "sweeps/extrapolation": 10,
    "sweeps/mqar_ratio": 28,
    "sweeps/mqar_state_size": 8,
    "sweeps/placement": 10,
    "sweeps/rat_chunks": 8,
    "sweeps/ratio": 21,
    "sweeps/shootout": 76,
    "sweeps/state_tracking": 8,
    "sweeps/tiny": 24,
}
"""Runs without arguments."""


@pytest.mark.parametrize("name", known("sweep"))
def test_every_shipped_sweep_expands(name, tmp_path):
    found = runs.expand(name, tmp_path)
    assert len(found) == SHIPPED[name]
    assert not any(pathlib.Path(tmp_path).iterdir())


def test_the_table_of_results_has_an_accuracy_where_there_is_one(write, tmp_path):
    found = runs.expand(write([{**BASE, "train.seed": seed} for seed in (0, 1)]), tmp_path / "runs")
    text = {"val_loss": 1.0, "val_bits_per_byte": 2.0, "parameters": 7}
    task = {"val_loss": 1.0, "val_bits_per_byte": None, "val_accuracy": 0.5}
    for summary, columns, said in ((text, ["bits/byte"], "2.0000 bits/byte"), (task, ["accuracy"], "0.5000 accuracy")):
        statuses = {run.name: Status("finished", summary=summary) for run in found}
        headers = [str(column.header) for column in table.results(found, statuses).columns]
        assert [name for name in ("accuracy", "bits/byte") if name in headers] == columns
        assert table.said(statuses[found[0].name]) == f"finished, {said}"
