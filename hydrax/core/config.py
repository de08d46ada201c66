"""Config files: Python with `get_config(arg: str = "") -> ConfigDict`, found by path or by name.

A locked `ConfigDict` accepts only the keys it has; a section left unlocked (the options of mixers and blocks) is
free-form and checked by whoever reads it.
"""

import ast
import difflib
import importlib.util
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from hydrax.core.build import ConfigError, Raw

PACKAGE = "configs"
SWEEPS = "sweeps/"
"""Where in it the files are that define get_sweep instead of get_config."""

Mapping.register(ConfigDict)  # it has all of a mapping but the name, and `build` asks for the name


def load_config(path_or_name: str, **overrides: Any) -> ConfigDict:
    """The config of `quickstart`, `configs/lm.py`, `lm:340m`, ... with dotted keys overridden.

    Values that are `core.build.Raw` (command-line text) stay text until `core.build.build` knows their type.

    Raises:
      ConfigError: no such file, a file that fails or has no `get_config`, or an unknown key.
    """
    config = evaluate(path_or_name)
    if not isinstance(config, ConfigDict):
        raise ConfigError("config", path_or_name, f"get_config returned {type(config).__name__}, expected ConfigDict")
    for key, value in overrides.items():
        _override(config, key, value)
    return config


def evaluate(path_or_name: str, kind: str = "config") -> Any:
    """What the function `get_<kind>(arg)` of a file returns; its argument is the text after `:`.

    Raises:
      ConfigError: no such file, or one that fails or has no such function.
    """
    module, arg = load_module(path_or_name, kind)
    function = getattr(module, f"get_{kind}", None)
    if not callable(function):
        raise ConfigError(kind, path_or_name, f"expected a Python file that defines get_{kind}(arg='')")
    try:
        return function(arg)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(kind, path_or_name, _failure(error)) from error


def load_module(path_or_name: str, kind: str = "config") -> tuple[types.ModuleType, str]:
    """The module of a config file and its argument, the text after `:`."""
    name, _, arg = str(path_or_name).partition(":")
    path = find(name)
    if path is None:
        names = known(kind)
        near = difflib.get_close_matches(name.removesuffix(".py").removeprefix(f"{PACKAGE}/"), names, n=1)
        near = near or difflib.get_close_matches(pathlib.Path(name).stem, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(kind, name, f"no such file; {hint}expected a path or one of {', '.join(names)}")
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(kind, path_or_name, "expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(kind, path_or_name, _failure(error)) from error
    return module, arg


def known(kind: str = "config") -> list[str]:
    """Names of the configs that come with hydrax, or of its sweeps (kind "sweep")."""
    root = _root()
    names = (p.relative_to(root).with_suffix("").as_posix() for p in sorted(root.rglob("*.py"))) if root else ()
    names = (n for n in names if not n.endswith(("common", "__init__")))
    return [n for n in names if n.startswith(SWEEPS) == (kind == "sweep")]


def find(name: str) -> pathlib.Path | None:
    """The config file of that path or name, if there is one."""
    root = _root()
    folders = [pathlib.Path()] if root is None else [pathlib.Path(), root, root.parent]
    paths = (folder / f"{name}{end}" for folder in folders for end in ("", ".py"))
    return next((path for path in paths if path.is_file()), None)


def _root() -> pathlib.Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return pathlib.Path(next(iter(folders))) if folders else None


def _failure(error: Exception) -> str:
    """What went wrong in a config file, and where, in one line."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} in line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({pathlib.Path(frame.filename).name}, line {frame.lineno})"


def _override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key; the key must exist, except below an unlocked section."""
    names, node = key.split("."), config
    for i, name in enumerate(names[:-1]):
        _check(config, node, names, i, value)
        if name not in node:
            node[name] = ConfigDict()
        if not isinstance(node[name], ConfigDict):
            raise ConfigError(key, value, f"{'.'.join(names[: i + 1])} is a single value and has no keys")
        node = node[name]
    _check(config, node, names, len(names) - 1, value)
    old, free = node.get(names[-1]), not node.is_locked
    if isinstance(old, ConfigDict) and not isinstance(value, dict | ConfigDict):
        value, free = _literal(value), not old.is_locked
        if not (free and isinstance(value, dict)):
            allowed = ", ".join(f"{key}.{k}" for k in old) or "a mapping"
            raise ConfigError(key, value, f"this is a section; expected {allowed}")
    with node.ignore_type():
        node[names[-1]] = None  # in place of text, a `Raw` would become mere text
        node[names[-1]] = _literal(value) if free else value


def _check(config: ConfigDict, node: ConfigDict, names: list[str], i: int, value: Any) -> None:
    """Refuses a key that the locked section `node` does not have, and says which was probably meant."""
    if names[i] in node or not node.is_locked:
        return
    key, leaves = ".".join(names), list(_leaves(config))
    near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
    elsewhere = [leaf for leaf in leaves if leaf.split(".")[-1] == names[-1]]
    hint = f"did you mean {(near + elsewhere)[0]!r}? " if near + elsewhere else ""
    raise ConfigError(key, value, f"unknown key; {hint}allowed: {', '.join(node)}")


def _literal(value: Any) -> Any:
    """Command-line text without a declared type: a Python literal, true, false, or the text itself."""
    if not isinstance(value, Raw):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(value, str(value)))
    except (ValueError, SyntaxError):
        return str(value)


def _leaves(config: ConfigDict, path: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"
