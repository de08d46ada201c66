"""The command: what it writes, that the page stands alone, and that broken folders end nothing."""

import contextlib
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ET

import pytest

import launch.report
from hydrax.report import page as pages
from hydrax.report.read import read
from hydrax.train.metrics import write_json
from tests.report.conftest import ENVIRONMENT, config, read_csv, write_run


def run(*args):
    """The exit code, stdout and stderr of launch.report, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch.report.main(["launch.report", *map(str, args)])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of finished, unfinished, failed and broken runs."""
    folder = tmp_path_factory.mktemp("made")
    runs = folder / "runs"
    for pattern in ("gla", "attn"):
        for lr in (0.001, 0.01):
            values = config(model__pattern=pattern, optim__lr=lr)
            slices = {f"length={n},depth={d}": 0.5 for n in (32, 64) for d in (0, 50)}
            summary = {"val_loss": 100 * lr, "val_accuracy": 0.5 + lr, "val_slices": slices}
            command = f"/opt/bin/python3.11 -m launch.train --config=x --config.optim.lr={lr} '--note=<b>&'"
            write_run(runs / f"{pattern}-{lr}", values, summary, environment={**ENVIRONMENT, "command": command})
    write_json(runs / "sweep.json", {"command": "/opt/bin/python -m launch.sweep --sweep=mine"})
    write_run(runs / "half", config(), None, [{"step": 7, "loss": 1.0}])
    failed = write_run(runs / "failed", config(), None)
    write_json(failed / "attempts.json", {"count": 3, "failed": "exit code 1: out of memory"})
    nan = write_run(runs / "nan", config(), {"val_loss": None, "val_accuracy": None})
    (runs / "torn").mkdir()
    (runs / "torn" / "config.json").write_text("{")
    (runs / "torn" / "summary.json").write_text('{"val_loss": 1.0}')
    (runs / "foreign").mkdir()
    (runs / "foreign" / "config.json").write_text('{"architectures": []}')
    outcome = run(f"--runs={runs}", f"--out={folder / 'out'}")
    assert nan.is_dir()
    return folder / "out", outcome


class References(html.parser.HTMLParser):
    """Everything that a page would load or run."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def test_the_page_needs_nothing_else(made):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    parser = References()
    parser.feed(text)
    assert len(parser.found) >= 10 and all(value.startswith("data:") for value in parser.found)
    assert not {"script", "link", "iframe", "object"} & set(parser.tags)
    assert not re.search(r"url\(|@import", text)
    assert parser.tags.count("img") == parser.tags.count("section") == len(list((made[0] / "figures").glob("*.svg")))


def test_pictures_are_vector_graphics_without_references(made):
    found = sorted((made[0] / "figures").glob("*.svg"))
    assert [p.stem for p in found] == sorted(p.stem for p in (made[0] / "figures").glob("*.png"))
    for path in found:
        root = ET.parse(path).getroot()
        links = [v for node in root.iter() for k, v in node.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)


def test_files(made):
    out, (code, said, _) = made
    assert code == 0
    assert {p.name for p in out.iterdir()} == {"report.html", "report.md", "figures", "tables"}
    names = {"cache", "learning_rate", "heat_length_depth", "slice_length_over_depth", "slice_depth_over_length"}
    assert {p.stem for p in (out / "figures").iterdir()} == names
    assert {p.stem for p in (out / "tables").iterdir()} == {*names, "results"}
    assert "4 runs of 2 arms, 5 plots" in said


def test_results(made):
    rows = read_csv(made[0] / "tables" / "results.csv")
    assert [(r["arm"], float(r["accuracy"]), float(r["learning rate"]), r["seeds"]) for r in rows] == [
        ("gla", 0.51, 0.01, "1"),
        ("attn", 0.51, 0.01, "1"),
    ]


def test_the_tables_of_the_page_are_the_files(made):
    text, markdown = ((made[0] / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for path in (made[0] / "tables").glob("*.csv"):
        assert f'download="{path.name}"' in text and f"(tables/{path.name})" in markdown
        header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        cells = (
            "".join(f"<th[^>]*>{re.escape(column)}</th>" for column in header) if path.stem != "results" else "<th>arm"
        )
        assert re.search(cells, text)


def test_every_task_has_plots_of_its_own(tmp_path):
    for group in ("parity", "s3"):
        for lr in (0.01, 0.02):
            data = {"data__task": "group_words", "data__task_options": {"group": group}, "optim__lr": lr}
            summary = {"val_loss": 1.0, "val_accuracy": lr}
            write_run(tmp_path / "runs" / f"{group}{lr}", config(**data), summary)
    run(f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}")
    assert {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")} == {
        "parity_learning_rate",
        "s3_learning_rate",
    }
    rows = read_csv(tmp_path / "out" / "tables" / "results.csv")
    assert [(row["task"], float(row["accuracy"])) for row in rows] == [("parity", 0.02), ("s3", 0.02)]
    run(f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'one'}", "--x=data.task_options.group")
    assert "x" in {p.stem for p in (tmp_path / "one" / "figures").glob("*.png")}


def test_evaluations_join_the_results(tmp_path):
    for i, pattern in enumerate(("gdn", "gdn,attn", "attn")):
        write_run(tmp_path / "runs" / f"r{i}", config(model__pattern=pattern), {"val_loss": 1.0 + i})
    found = {f"r{i}": {"recall_slices:4": {"order": 4, "hits": {"loss": 0.5 * i, "accuracy": None}}} for i in range(3)}
    write_json(tmp_path / "evaluation.json", {"runs": found})
    flags = [f"--runs={tmp_path / 'runs'}", f"--evaluation={tmp_path / 'evaluation.json'}", f"--out={tmp_path / 'out'}"]
    assert run(*flags)[0] == 0
    rows = read_csv(tmp_path / "out" / "tables" / "results.csv")
    assert [float(row["loss on recall hits, nats per target"]) for row in rows] == [0.0, 0.5, 1.0]
    points = read_csv(tmp_path / "out" / "tables" / "ratio_recall_slices_4_hits_loss.csv")
    assert [float(row["recall_slices:4/hits/loss"]) for row in points] == [0.0, 0.5, 1.0]


def test_runs_that_are_left_out_are_listed(made):
    out, (_, _, err) = made
    rows = {
        "half": ("broken", "ended after step 7"),
        "failed": ("failed", "exit code 1: out of memory"),
        "nan": ("finished", "no finite result"),
        "torn": ("broken", "its config.json has no section model, or cannot be read"),
        "foreign": ("broken", "ended after step 0"),
    }
    text = (out / "report.html").read_text(encoding="utf-8")
    for name, (state, why) in rows.items():
        assert f"left out: {name}: {state}, {why}\n" in err
        assert f"<tr><td>{name}</td><td>{state}</td><td>{why}</td></tr>" in text
    assert "5 runs left out" in text


def test_commands_are_quoted_as_text(made):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    assert "python -m launch.train --config=x --config.optim.lr=0.01 &#x27;--note=&lt;b&gt;&amp;&#x27;" in text
    assert "<b>" not in text and "/opt/bin" not in text
    markdown = (made[0] / "report.md").read_text(encoding="utf-8")
    assert "\npython -m launch.sweep --sweep=mine\n" in markdown
    assert "python -m launch.report --runs=" in markdown
    assert "1 x cpu" in markdown and "jax 0.10.2" in markdown


def test_a_report_is_the_same_every_time(made, tmp_path):
    runs = made[0].parent / "runs"
    run(f"--runs={runs}", f"--out={tmp_path / 'again'}")
    for path in sorted(made[0].rglob("*.svg")) + sorted(made[0].rglob("*.csv")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made[0])).read_bytes(), path.name


def test_commands_of_older_runs_are_in_their_logs(tmp_path):
    place = write_run(tmp_path / "a", config(), {"val_loss": 1.0})
    (place / "log.txt").write_text("\n== attempt 1, 2026-01-01T00:00:00+00:00: /x/python -m launch.train --a\nloss 1\n")
    assert read([tmp_path])[0][0].command == "python -m launch.train --a"


def test_several_folders_and_names_that_would_be_equal(tmp_path):
    for folder in ("x", "y"):
        write_run(tmp_path / folder / "a", config(), {"val_loss": 1.0})
    runs, _ = read([tmp_path / "x", tmp_path / "y"])
    assert [run.name for run in runs] == [f"{tmp_path}/x/a", f"{tmp_path}/y/a"]
    assert [run.name for run in read([tmp_path, tmp_path / "x"])[0]] == ["x/a", "y/a"]
    assert [run.name for run in read([tmp_path / "x" / "a"])[0]] == ["a"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--runs={tmp}/none", "--out={tmp}/out"], r"runs = '.*/none': no such folder"),
        (["--runs={tmp}/empty", "--out={tmp}/out"], r"runs = '.*/empty': no runs found; expected folders of runs"),
        (["--runs={tmp}/half", "--out={tmp}/out"], r"runs = '.*/half': no finished run \(1 broken\)"),
        (["--runs={tmp}/good", "--evaluation={tmp}/file", "--out={tmp}/out"], "evaluation = .*/file': expected"),
        (["--runs={tmp}/good", "--out={tmp}/file"], r"out = '.*/file': expected a folder"),
        (
            ["--runs={tmp}/good", "--out={tmp}/out", "--x=model.d_model"],
            r"x = 'model.d_model': expected a key in which",
        ),
        (["--runs={tmp}/good"], r"--out = None: this flag is required"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, flags, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "half", config(), None)
    write_run(tmp_path / "good", config(), {"val_loss": 1.0})
    code, out, err = run(*(flag.format(tmp=tmp_path) for flag in flags))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"error: {says}", err), err
    assert not (tmp_path / "out").exists()


def test_help_has_examples():
    code, out, _ = run("--help")
    assert code == 0 and "python -m launch.report --runs=" in out


def test_numbers_of_a_column_have_equally_many_decimals():
    table = pages.Table("x", ["a", "b", "c", "d"], [[0.5, 1e15, 0.003, None], [0.123456, 2.5e15, 0.0001, True]])
    assert pages.brief(table) == [["0.5000", "1e+15", "0.0030", ""], ["0.1235", "2.5e+15", "0.0001", "yes"]]


def test_tables_of_full_precision():
    assert pages.Table("x", ["a"], [[0.1 + 0.2]]).csv() == f"a\n{0.1 + 0.2!r}\n"
    assert json.loads(pages.Table("x", ["a"], [[1 / 3]]).csv().split("\n")[1]) == 1 / 3
