"""What a validation says: from the sums of `step.make_eval_step` to records, a line and the summary."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SLICE = "val_accuracy/"
"""Before the name of a slice."""

PROBE = "probe_accuracy/"
"""Before the name of a probe, and of its slices."""


def measures(sums: Mapping[str, np.ndarray], slices: Sequence[str]) -> dict[str, float]:
    """Of text: val_loss, nats per target, and val_bits_per_byte. Of tasks: val_loss and, as shares of 1,

    val_accuracy            right answers, mean over those of a row, then over rows
    val_sequence_accuracy   rows with all answers right
    val_micro_accuracy      right answers, mean over answers
    val_macro_accuracy      the same for each token that is ever the answer, then the mean over these tokens
    val_accuracy/<slice>    val_accuracy of the rows of a slice, nan without such rows
    """
    loss = {"val_loss": float(sums["nll"] / sums["tokens"])}
    if "bytes" in sums:
        return {**loss, "val_bits_per_byte": float(sums["nll"] / math.log(2) / sums["bytes"])}
    seen = sums["class_tokens"] > 0
    result = {
        **loss,
        "val_accuracy": sums["right"] / sums["rows"],
        "val_sequence_accuracy": sums["sequences"] / sums["rows"],
        "val_micro_accuracy": sums["class_right"].sum() / sums["class_tokens"].sum(),
        "val_macro_accuracy": np.mean(sums["class_right"][seen] / sums["class_tokens"][seen]),
    }
    for name, rows, right in zip(slices, sums["slice_rows"], sums["slice_right"], strict=False):
        result[SLICE + name] = right / rows if rows else math.nan
    return {name: float(x) for name, x in result.items()}


def probed(name: str, measured: Mapping[str, float]) -> dict[str, float]:
    """The accuracies of a probe: of all its rows, and of those of every slice there is."""
    slices = {f"{PROBE}{name}/{key.removeprefix(SLICE)}": x for key, x in measured.items() if key.startswith(SLICE)}
    return {PROBE + name: measured["val_accuracy"], **{key: x for key, x in slices.items() if not math.isnan(x)}}


def line(measured: Mapping[str, float]) -> str:
    """The most important of it, in words."""
    if "val_bits_per_byte" in measured:
        probes = {key.removeprefix(PROBE): x for key, x in measured.items() if key.startswith(PROBE)}
        shown = [f"{name} {x:.4f}" for name, x in probes.items() if "/" not in name]
        return "  ".join([f"{measured['val_bits_per_byte']:.4f} bits/byte", *shown])
    accuracy, sequences = measured["val_accuracy"], measured["val_sequence_accuracy"]
    return f"loss {measured['val_loss']:.4f}  accuracy {accuracy:.4f}  whole rows {sequences:.4f}"


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of summary.json that a record gives; slices are one entry, val_slices, and probes another."""
    known = {name: x for name, x in record.items() if name.startswith("val_") and not name.startswith(SLICE)}
    slices = {name.removeprefix(SLICE): x for name, x in record.items() if name.startswith(SLICE)}
    probes = {name.removeprefix(PROBE): x for name, x in record.items() if name.startswith(PROBE)}
    parts = {"val_slices": slices} if "val_accuracy" in known else {"probes": probes} if probes else {}
    return {**known, **parts}
