"""The ops that choose among forms, by the names under which `impl` and the log speak of them."""

from collections.abc import Callable, Mapping

from hydrax.ops import conv, delta, ema, linear, lstm, moments, rowwise, scan, slots, softmax
from hydrax.ops.conv import long
from hydrax.ops.dispatch import choices
from hydrax.ops.slots import working_memory
from hydrax.ops.softmax import relative
from hydrax.ops.sparse import blocks, clusters, groups, permuted, ranked

OPS: dict[str, Mapping[str, Callable]] = {
    "attention": softmax.FORMS,
    "block_topk_attention": blocks.FORMS,
    "chunk_attention": groups.FORMS,
    "clustered_window": clusters.FORMS,
    "delta_rule": delta.FORMS,
    "ema": ema.FORMS,
    "fft_conv": long.FORMS,
    "glu": rowwise.GLU,
    "landmark_attention": groups.FORMS,
    "linear_attention": linear.FORMS,
    "linear_scan": scan.LINEAR,
    "lstm": lstm.FORMS,
    "moments": moments.FORMS,
    "permuted_window": permuted.FORMS,
    "ranked_ends": ranked.FORMS,
    "relative_attention": relative.FORMS,
    "rms_norm": rowwise.NORM,
    "selective_scan": scan.SELECTIVE,
    "short_conv": conv.FORMS,
    "slot_attention": slots.FORMS,
    "slot_softmax": slots.SOFTMAX,
    "working_memory": working_memory.FORMS,
}


def complaint(impl: str) -> str | None:
    """What is allowed instead of an `impl` for the ops of a model, None if it is right."""
    if "=" not in impl:
        common = [name for name in softmax.FORMS if all(name in forms for forms in OPS.values())]
        return None if impl in common else f"expected one of {', '.join(common)}, or <op>=<form>, <op>=<form>"
    for op, form in choices(impl).items():
        if op not in OPS:
            return f"{op!r} is no op; expected <op>=<form> with one of {', '.join(OPS)}"
        if form not in OPS[op]:
            return f"{op} has no form {form!r}; expected one of {', '.join(OPS[op])}"
    return None
