"""The text of `--help`: a command, its flags, and every config key, mixer, task and policy, read from dataclasses."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from hydrax.core.build import Check

WIDTH = 118


def help_text(doc: str, flag_values: flags.FlagValues) -> str:
    """Help of the command with that module docstring and those flags."""
    lines = [doc.strip(), "", "Flags:", *_flags(flag_values)]
    if "config" in flag_values:
        lines += ["", "Config keys, set with --config.<key>=<value>:", *_keys()]
        lines += ["", "Mixers, and their options --config.model.mixers.<mixer>.<option>=<value>:", *_mixers()]
        lines += ["", "Tasks (--config.data.task), and their options --config.data.task_options.<option>=<value>:"]
        lines += _tasks()
    if "policy" in flag_values:
        lines += ["", "Policies, and their options --policy=<name>:<option>=<value>,...:", *_policies()]
    return "\n".join(lines)


def comments(cls: type) -> dict[str, str]:
    """Field name -> the comment behind the field, or its line in the docstring, of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found |= dict(_attributes(inspect.cleandoc(base.__doc__ or "")))
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.encode().splitlines()
        for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].decode()
                found[node.target.id] = behind.partition("#")[2].strip() or found.get(node.target.id, "")
    return found


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    """What the section `Attributes:` of a docstring says of each."""
    for names, text in re.findall(
        r"^  (\w+(?:, \w+)*): (.+(?:\n    .+)*)", doc.partition("Attributes:\n")[2], re.MULTILINE
    ):
        for name in names.split(", "):
            yield name, " ".join(text.split()).rstrip(".")


def _flags(flag_values: flags.FlagValues) -> Iterator[str]:
    for name in flag_values:
        flag = flag_values[name]
        text = " ".join((flag.help or "").split())
        required = not all(validator.checker(None) for validator in flag.validators)
        yield _entry(f"--{name}", dataclasses.MISSING if required else flag.default, text)


def _keys() -> Iterator[str]:
    from hydrax.train.config import RunConfig

    for section in dataclasses.fields(RunConfig):
        yield ""
        yield from _fields(typing.get_type_hints(RunConfig)[section.name], f"{section.name}.")


def _mixers() -> Iterator[str]:
    from hydrax import mixers

    for name in mixers.names():
        row = mixers.row(name)
        yield ""
        yield f"  {name}: {row.about} (arXiv {row.paper})"
        config = mixers.get(name).Config
        if config.PRESETS:
            yield _entry("  preset", None, f"published options by name; one of {', '.join(config.PRESETS)}")
        yield from _fields(config, "  ")


def _tasks() -> Iterator[str]:
    from hydrax import tasks

    for name, task in tasks.TABLE.items():
        yield ""
        yield f"  {name}: {(inspect.getdoc(task) or '').partition(chr(10))[0]}"
        yield from (line for line in _fields(task, "  ") if line.split()[0] != "length")  # it is data.seq_len


def _policies() -> Iterator[str]:
    from hydrax.infer.policy import POLICIES

    for name, policy in POLICIES.items():
        yield ""
        yield f"  {name}: {policy.ABOUT}"
        yield from _fields(policy, "  ")


def _fields(cls: Any, prefix: str) -> Iterator[str]:
    hints, about = typing.get_type_hints(cls, include_extras=True), comments(cls)
    for field in dataclasses.fields(cls):
        section = next((h for h in (hints[field.name], *typing.get_args(hints[field.name])) if _is_section(h)), None)
        text = "; ".join(filter(None, (about.get(field.name), _allowed(hints[field.name]))))
        if section is None:
            yield _entry(prefix + field.name, _default(field), text)
        else:
            yield from _fields(section, f"{prefix}{field.name}.")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _allowed(hint: Any) -> str:
    """The choices or the range an annotation declares."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    checks = [a.allowed for a in args if isinstance(a, Check)]
    return "; ".join(checks + [text for a in args if typing.get_args(a) and (text := _allowed(a))])


def _entry(name: str, default: Any, text: str) -> str:
    shown = "required" if default is dataclasses.MISSING else repr(default) if default == "" else str(default)
    return textwrap.fill(f"  {name:<26} {shown:<14} {text}", WIDTH, subsequent_indent=" " * 44, drop_whitespace=True)
