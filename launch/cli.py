"""What all commands share: flags, config overrides, JAX defaults, and one line for whatever the user got wrong."""

import difflib
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from logging import CRITICAL, getLogger
from typing import TYPE_CHECKING, Any, Protocol

from absl import flags, logging

from hydrax.core.build import ConfigError, Raw, build
from hydrax.core.config import find, load_config

if TYPE_CHECKING:
    from hydrax.train.config import RunConfig

Overrides = dict[str, Raw]
PREFIX = "config."
DISTRIBUTED = ("coordinator", "processes", "process_id")
HELP = ("--help", "-h", "--helpfull", "--helpshort")
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",  # JAX's 0.75 leaves a fifth of a GPU unused
    "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings of the C++ side, not its notes
}


class Main(Protocol):
    """The main of a command; argv None: that of the process."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


def command(flag_values: flags.FlagValues) -> Callable[[Callable[[Overrides], None]], Main]:
    """Makes `body(overrides)` the main of a command.

    The flags are `flag_values`, and `--config.<key>=<value>` where there is a flag `config`. Bad input, wherever it
    is noticed, ends in one line on stderr and exit code 2.
    """

    def decorate(body: Callable[[Overrides], None]) -> Main:
        def main(argv: Sequence[str] | None = None) -> None:
            try:
                body(_parse(flag_values, list(sys.argv if argv is None else argv), body.__globals__["__doc__"]))
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)

        return main

    return decorate


def run_config(name: str, overrides: Overrides) -> "RunConfig":
    """The configuration of a run from a config file and command-line overrides, checked."""
    from hydrax.train.config import RunConfig

    return build(RunConfig, load_config(name, **overrides).to_dict())


def arm_config(text: str, name: str, overrides: Overrides) -> "RunConfig":
    """The configuration of an arm beside that of `name` and `overrides`: with changes to it, or another one.

    `text` is changes `<key>=<value>` with semicolons between them; in place of the first may stand a pattern, or the
    name of another config, to which the `overrides` do not apply.
    """
    changes = dict(overrides)
    for i, piece in enumerate(part.strip() for part in text.split(";")):
        if change := re.fullmatch(r"([\w.]+)\s*=\s*(.*)", piece):
            changes[change[1].removeprefix(PREFIX)] = Raw(change[2])
        elif i > 0:
            raise ConfigError("compare", piece, "expected <key>=<value> behind a semicolon")
        elif set(piece) & set(":/") or (re.fullmatch(r"[\w.-]+", piece) and find(piece)):
            name, changes = piece, {}
        else:
            changes["model.pattern"] = Raw(piece)
    return run_config(name, changes)


def _parse(flag_values: flags.FlagValues, argv: list[str], doc: str) -> Overrides:
    """Sets the flags, and returns the overrides of the config."""
    if any(arg in HELP for arg in argv[1:]):
        from launch.help import help_text

        print(help_text(doc, flag_values))
        sys.exit(0)
    rest, overrides = _split(argv) if "config" in flag_values else (argv, {})
    flag_values.unparse_flags()
    flag_values.set_gnu_getopt(True)
    try:
        unexpected = flag_values(rest)[1:]
    except flags.Error as error:
        raise _flag_error(error, flag_values) from None
    if unexpected:
        raise ConfigError(unexpected[0], "", f"unexpected argument; expected {_spellings(flag_values)}")
    for name, flag in flag_values.flag_values_dict().items():
        if flag == "" and flag_values[name].default is None:
            raise ConfigError(f"--{name}", flag, f"expected {flag_values[name].help}")
        if isinstance(flag, float) and not math.isfinite(flag):  # nan is within all bounds
            raise ConfigError(f"--{name}", flag, f"expected a finite number: {flag_values[name].help}")
    flags.FLAGS.mark_as_parsed()  # absl's own: without this its logging complains about itself
    # What goes wrong in Orbax's threads is also raised, and then said in one line.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    _prepare_jax()
    _connect(flag_values)
    return overrides


def _split(argv: list[str]) -> tuple[list[str], Overrides]:
    """Takes `--config.<key>=<value>` and `--config.<key> <value>` out of the arguments."""
    rest, overrides, args = [], {}, iter(argv)
    for arg in args:
        name, given, value = arg.partition("=")
        if not name.lstrip("-").startswith(PREFIX) or not name.startswith("-"):
            rest.append(arg)
            continue
        if not given:
            value = next(args, "--")
            if value.startswith("--"):
                raise ConfigError(name, "", "expected a value: --config.<key>=<value>")
        overrides[name.lstrip("-").removeprefix(PREFIX)] = Raw(value)
    return rest, overrides


def _flag_error(error: flags.Error, flag_values: flags.FlagValues) -> ConfigError:
    """absl's complaint as key, value and what is allowed."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(flag_values), n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        value = error.flagvalue.partition("=")[2]
        return ConfigError(f"--{error.flagname}", value, f"unknown flag; {hint}allowed: {_spellings(flag_values)}")
    if found := re.match(r"(?:missing value for )?flags? --(\w+)(?:=(.*?):)?", str(error), re.IGNORECASE):
        name, value = found[1], found[2] or ""
        flag = flag_values[name]
        if value == str(None):
            return ConfigError(f"--{name}", None, f"this flag is required: expected {flag.help}")
        return ConfigError(f"--{name}", value, f"expected {flag.parser.syntactic_help or 'text'}: {flag.help}")
    return ConfigError("command line", "", str(error))


def _spellings(flag_values: flags.FlagValues) -> str:
    names = [f"--{name}" for name in flag_values]
    return ", ".join([*names, f"--{PREFIX}<key>"] if "config" in flag_values else names)


def _prepare_jax() -> None:
    """Defaults that must be set before the first device query; what the user has set wins."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "hydrax" / "jax"))


def _connect(flag_values: flags.FlagValues) -> None:
    """Joins the other processes of a run: those of the flags, or of Slurm and whatever else JAX detects."""
    names = DISTRIBUTED if DISTRIBUTED[0] in flag_values else ()
    given: dict[str, Any] = {name: flag_values[name].value for name in names}
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ
    if any(value is not None for value in given.values()):
        for name, value in given.items():
            if value is None:
                raise ConfigError(f"--{name}", None, f"expected with the others of --{', --'.join(DISTRIBUTED)}")
        if not re.fullmatch(r".+:\d+", given["coordinator"]):
            raise ConfigError("--coordinator", given["coordinator"], "expected host:port of process 0")
        if given["process_id"] >= given["processes"]:
            allowed = f"expected less than --processes = {given['processes']}"
            raise ConfigError("--process_id", given["process_id"], allowed)
        several = given["processes"] > 1
    if several:
        from hydrax.train.processes import join

        join(**given)
