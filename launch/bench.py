"""Measures time per token and memory of mixers, each alone as one layer, at several lengths.

    python -m launch.bench --mixers=gdn,gla --d_model=256 --seq_lens=4096,65536 --out=runs/bench.json
    python -m launch.bench --d_model=1024 --dtype=bfloat16 --seq_lens=4096,32768,65536 --threads=8 --out=runs/gpu.json
    python -m launch.bench --scaling --out=runs/scaling.json
    python -m launch.bench --scaling --cells="fsdp.* 8 devices" --profile=runs/traces
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m launch.bench --scaling --size=tiny --out=runs/scaling.json

With --scaling, training steps of whole models on 1, 2, 4, 8 devices of this host instead: compared with one device,
then timed (docs/clusters.md); its flags say so. The file holds command, environment, settings and rows, and is written
anew after every mixer or cell; a picture lies beside it. With --scaling a file that is there is continued: cells that
it has without an error are not measured again.
"""

import dataclasses
import os
import pathlib
import shlex
import sys

from absl import flags
from rich.console import Console
from rich.progress import track

from hydrax.core.build import Raw, build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("mixers", "all", "names, or all with a recurrent state", flag_values=FLAGS)
flags.DEFINE_integer("d_model", 256, "width of the layer", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "rows", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("seq_lens", "4096,65536", "tokens of a row, several lengths", flag_values=FLAGS)
flags.DEFINE_string("dtype", "float32", "of activations and matrices: float32 or bfloat16", flag_values=FLAGS)
flags.DEFINE_string("impl", "", "implementation of the ops; empty: their choice", flag_values=FLAGS)
flags.DEFINE_bool("forward_only", False, "leave out the backward pass", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 20, "samples of a time, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("seconds", 3.0, "of measuring, after which a time gets no further sample", flag_values=FLAGS)
flags.DEFINE_integer("threads", 1, "programs of a mixer compiled at the same time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("isolate", False, "a new process for every mixer", flag_values=FLAGS)
flags.DEFINE_bool("scaling", False, "training steps on several devices instead of mixers", flag_values=FLAGS)
flags.DEFINE_string("size", "full", "scaling: models, full, or tiny for virtual CPU devices", flag_values=FLAGS)
flags.DEFINE_string("parts", "fsdp,context,tensor,expert", "scaling: of the matrix", flag_values=FLAGS)
flags.DEFINE_string("devices", "", "scaling: counts, as 1,2; empty: 1, 2, 4, 8 of those present", flag_values=FLAGS)
flags.DEFINE_string("context_lens", "", "scaling: tokens of the row of context, several lengths", flag_values=FLAGS)
flags.DEFINE_string("cells", "", "scaling: a regular expression found in the names of cells to run", flag_values=FLAGS)
flags.DEFINE_bool("list", False, "scaling: only print the names of cells", flag_values=FLAGS)
flags.DEFINE_integer("steps", 10, "scaling: timed steps of a cell, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("cell_seconds", 1200, "scaling: of a cell as a whole, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("profile", "", "scaling: a folder for a trace of one step per cell", flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    # The command as it was given; its results themselves say where they are.
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    command, out = shlex.join(["python", "-m", "launch.bench", *given]), pathlib.Path(FLAGS.out) if FLAGS.out else None
    console = Console(width=max(170 if FLAGS.scaling else 120, Console().width))
    (_scaling if FLAGS.scaling else _mixers)(command, out, console)


def _scaling(command: str, out: pathlib.Path | None, console: Console) -> None:
    # Without NVLink multicast (NVLS): NCCL fails where a host or container does not offer it, and all hosts are to be
    # measured alike. For all processes of the cells, which inherit it.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    import jax

    # They also find what earlier ones have compiled; the option of this process is not theirs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.values["jax_compilation_cache_dir"]
    from hydrax.eval import report, scale_out, scale_out_report
    from hydrax.eval.scale_out_matrix import Settings, cells

    lists = {name: [Raw(n) for n in str(FLAGS[name].value).split(",") if n] for name in ("devices", "context_lens")}
    values = {"size": FLAGS.size, "parts": FLAGS.parts.split(","), "cells": FLAGS.cells, "steps": FLAGS.steps, **lists}
    settings = build(Settings, {**values, "seconds": FLAGS.cell_seconds, "profile": FLAGS.profile or None})
    number, environment = scale_out.look()
    chosen = cells(settings, number)
    if FLAGS.list:
        print(*(cell.name for cell in chosen), sep="\n")
        return
    before, rows = scale_out.earlier(out, environment, settings)
    commands = " && ".join(dict.fromkeys([*filter(None, before.split(" && ")), command]))
    results = report.Report(out, commands, environment, settings, scale_out_report.draw, rows)
    stopped = False
    try:
        for row in scale_out.bench(settings, chosen, rows):
            results.rows = scale_out.joined(results.rows, row)
            results.add([])
            results.draw()
            console.print(scale_out_report.line(results.rows[-1]), highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        stopped = True
    console.print(scale_out_report.table(results.rows))
    for text in scale_out_report.sent(results.rows):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if stopped:
        print("interrupted; the same command continues" if out else "interrupted", file=sys.stderr)
        sys.exit(130)


def _mixers(command: str, out: pathlib.Path | None, console: Console) -> None:
    from hydrax.eval import bench, report

    values = {f.name: FLAGS[f.name].value for f in dataclasses.fields(bench.Settings) if f.name in FLAGS}
    values["mixers"] = bench.everything(FLAGS.d_model) if FLAGS.mixers == "all" else FLAGS.mixers.split(",")
    values["seq_lens"] = [Raw(length) for length in FLAGS.seq_lens.split(",")]
    settings = build(bench.Settings, {**values, "impl": FLAGS.impl or None, "backward": not FLAGS.forward_only})
    bench.check(settings)

    results = report.Report(out, command, bench.environment(settings), settings, report.draw_times)
    measured, total = bench.bench(settings), len(settings.mixers)
    for rows in track(measured, "", total, console=console, disable=not console.is_terminal):
        results.add(rows)
        for row in rows:
            console.print(report.line(row), highlight=False, markup=False)
    console.print(report.table(results.rows, settings))
    results.draw()


if __name__ == "__main__":
    main()
