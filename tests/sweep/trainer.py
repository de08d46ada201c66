"""Stands in for launch.train where a test is about the sweep: the same files in the run folder, no JAX, milliseconds.

The prompt of the sample says how it behaves.
"""

import json
import os
import pathlib
import signal
import sys
import time


def main() -> None:
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
    workdir, steps = pathlib.Path(flags["workdir"]), int(flags["config.train.steps"])
    behaviour = flags["config.sample.prompt"]
    workdir.mkdir(parents=True, exist_ok=True)
    first = not (workdir / "begun").exists()
    (workdir / "begun").touch()
    if behaviour == "refuse":
        print("error: data.path = None: expected something else", file=sys.stderr)
        sys.exit(2)
    if behaviour == "fail" or (behaviour == "fail once" and first):
        raise FloatingPointError("it never works")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    saved = workdir / "saved"
    done = int(saved.read_text()) if saved.exists() else 0
    print(f"continuing after {done}", flush=True)
    with (workdir / "metrics.jsonl").open("a") as metrics:
        for step in range(done + 1, steps + 1):
            record = {"step": step, "loss": 1 / step, "timing": {"tokens_per_second": 1000.0}}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            saved.write_text(str(step))
            if step == 2 and first and behaviour == "die once":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour == "slow":
                time.sleep(0.05)
            if stopping:
                print(f"saved at {step}", flush=True)
                sys.exit(0)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    figures = {"val_loss": 1 / steps, "val_bits_per_byte": 2 / steps, "tokens_per_second": 1000.0, "parameters": 7}
    summary = {**figures, "steps": steps, "cores": cores, "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
    (workdir / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
