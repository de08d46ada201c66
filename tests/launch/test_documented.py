"""What the documentation names exists: commands with their flags and config keys, files that it links."""

import importlib
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest
from absl.testing import flagsaver

from hydrax import mixers
from launch import cli

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT, ROOT / "docs", ROOT / "notebooks") for p in p.glob("*.md"))
TEXTS = [*PAGES, *sorted((ROOT / "launch").glob("*.py")), *sorted((ROOT / "configs" / "sweeps").glob("*.py"))]
BLOCK = re.compile(r"^( *)(?:\$ |srun \S+ )?((?:[A-Z_]+=\S+ )*python -m launch\..*?[^\\])$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every command that has a line, or several, of its own."""
    for match in BLOCK.finditer(text.replace("\\\\\n", "\\\n")):
        words = shlex.split(match[2].replace("\\\n", " ").rstrip("& "), comments=True)
        yield words[words.index("-m") + 1 :]


CASES = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}-{i}")
    for path in TEXTS
    for i, words in enumerate(commands(path.read_text("utf-8")))
]


@pytest.mark.parametrize("words", CASES)
def test_commands_have_flags_and_configs(words: list[str]) -> None:
    module = importlib.import_module(words[0])
    rest, overrides = cli._split(words) if "config" in module.FLAGS else (words, {})
    before = flagsaver.save_flag_values(module.FLAGS)
    assert module.FLAGS(rest) == words[:1]
    config = module.FLAGS.flag_values_dict().get("config")
    flagsaver.restore_flag_values(before, module.FLAGS)
    if config:
        cli.run_config(config, overrides)


def test_every_page_with_a_command_is_read() -> None:
    assert len(CASES) > 60
    assert ["launch.doctor"] in [case.values[0] for case in CASES]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", mixers.names())
def test_the_readme_has_a_line_with_every_mixer_and_its_paper(name: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("| `") and f"`{name}`" in line.split("|")[1] and "arxiv" in line]
    assert len(found) == 1 and f"[{mixers.row(name).paper}]" in found[0]
