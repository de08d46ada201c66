"""Turns a corpus into files of tokens that training reads from disk, with several processes.

    python -m launch.prepare --source=/data/web --out=/data/web_bytes
    python -m launch.prepare --source='/data/web/*.jsonl.zst' --out=/data/web_bpe --tokenizer=/data/tokenizer.json
    python -m launch.train --config=lm:100m --workdir=runs/lm --config.data.path=/data/web_bytes

Reads texts, JSON Lines (.jsonl) and Parquet, as they are or as .gz or .zst (Parquet and .zst need the extra `data`).
Killed, the same command continues, and ends with the same files. Records that cannot be used are left out, and listed
with their place and the reason in bad_records.jsonl.
"""

import sys

from absl import flags
from rich import progress

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("source", None, "file, folder or glob", required=True, flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder of the token files", required=True, flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "byte", '"byte" or a tokenizer.json (needs the extra `hf`)', flag_values=FLAGS)
flags.DEFINE_string("field", "text", "with the text, of JSON Lines and Parquet", flag_values=FLAGS)
flags.DEFINE_float("val_fraction", 0.05, "of a lone text file, held out", 0, 1, flag_values=FLAGS)
flags.DEFINE_integer("processes", 0, "0: one per core; files do not depend on it", lower_bound=0, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.data.prepare import prepare
    from hydrax.data.workers import cores

    columns = progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn()
    bar = progress.Progress("{task.description}", *columns, progress.TimeRemainingColumn())
    stages: dict[str, progress.TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            bar.start()  # not before: bad input ends in one line
            stages[stage] = bar.add_task(stage, total=total)
        bar.update(stages[stage], completed=done)

    settings = {"tokenizer": FLAGS.tokenizer, "field": FLAGS.field, "val_fraction": FLAGS.val_fraction}
    try:
        made = prepare(FLAGS.source, FLAGS.out, **settings, processes=FLAGS.processes or cores(), show=show)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    finally:
        if stages:
            bar.stop()
    print(f"{FLAGS.out}: {made['documents']:,} documents, {made['tokens']:,} tokens, {len(made['shards'])} shards")
    if made["bad"]:
        print(f"{made['bad']:,} bad records left out, listed in {FLAGS.out}/bad_records.jsonl")


if __name__ == "__main__":
    main()
