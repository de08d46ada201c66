"""Measures time and memory of ways to compute running averages against the length of a row, after a check of them.

    python -m launch.bench_averages --out=runs/averages.json
    python -m launch.bench_averages --subjects=real_chunks_64,real_fourier --seq_lens=4096,131072 --widths=256

Chunks, associative scans and Fourier transforms, for averages with fixed real or complex decays and for those under a
softmax. Results of a short row are compared with the definition first; a way that is not right is marked as such. The
file holds command, environment, settings and rows, and is written anew after every way; a picture lies beside it.
"""

import pathlib
import shlex

from absl import flags
from rich.console import Console
from rich.progress import track

from hydrax.core.build import Raw, build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("subjects", "all", "names, or all", flag_values=FLAGS)
flags.DEFINE_string("seq_lens", "4096,16384,65536,131072", "tokens of a row, several lengths", flag_values=FLAGS)
flags.DEFINE_string("widths", "512", "channels, several", flag_values=FLAGS)
flags.DEFINE_integer("modes", 16, "averages of a channel, slots of a head", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("check", 512, "tokens of the row that is checked; 0: none is", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 20, "samples of a time, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("seconds", 0.5, "of measuring, after which a time gets no further sample", flag_values=FLAGS)
flags.DEFINE_integer("threads", 8, "programs compiled at the same time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import attention_report, averages, report
    from hydrax.train import folder

    values = {
        "subjects": list(averages.SUBJECTS) if FLAGS.subjects == "all" else FLAGS.subjects.split(","),
        "seq_lens": [Raw(length) for length in FLAGS.seq_lens.split(",")],
        "widths": [Raw(width) for width in FLAGS.widths.split(",")],
        **{name: FLAGS[name].value for name in ("modes", "check", "repeats", "seconds", "threads")},
    }
    settings = build(averages.Settings, values)
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    command = shlex.join(["python", "-m", "launch.bench_averages", *given])
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    results = report.Report(out, command, folder.environment(), settings, attention_report.draw)
    console = Console(width=max(120, Console().width))
    total = len(settings.subjects) * len(settings.widths)
    for rows in track(averages.bench(settings), "", total, console=console, disable=not console.is_terminal):
        results.add(rows)
        for row in rows:
            console.print(attention_report.line(row), highlight=False, markup=False)
    console.print(attention_report.table(results.rows))
    results.draw()


if __name__ == "__main__":
    main()
