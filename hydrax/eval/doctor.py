"""Are the kernels right on this device? Each against the definition of its op in fp32: o, state and all gradients.

Kernels are the forms of `ops.table` whose names begin with "pallas". To examine those of another op, give it a row in
`SUBJECTS`.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array
from hydrax.eval.timing import side_by_side
from hydrax.eval.tolerances import op_tolerance, relative_rms
from hydrax.ops import table as ops
from hydrax.ops.conv import cases as conv_cases, short_conv
from hydrax.ops.delta import cases as delta_cases, delta_rule
from hydrax.ops.linear import cases as linear_cases, linear_attention
from hydrax.ops.rowwise import cases as rowwise_cases, glu, rms_norm
from hydrax.ops.scan import cases as scan_cases, linear_scan
from hydrax.ops.softmax import attention, cases as attention_cases
from hydrax.ops.sparse import block_topk_attention, cases as sparse_cases

Inputs = dict[str, np.ndarray]
Tensors = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Subject:
    """An op with kernels: (o, final state) or (o,) of its `inputs` by name.

    Of these, `values` come in one of the `dtypes`; `options` are its other arguments in a case.
    """

    op: Callable[..., tuple[Array, ...]]
    cases: Mapping[str, Any]
    inputs: Callable[[Any], Inputs]
    values: tuple[str, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)
    options: Callable[[Any], dict[str, Any]] = lambda case: {}
    documents: bool = True  # whether it knows of them


def _stateless(op: Callable[..., Array]) -> Callable[..., tuple[Array]]:
    return lambda *, segment_ids, **x: (op(**x),)


def _attention(**x: Any) -> tuple[Array]:
    return (attention(**x),)


def _chosen(**x: Any) -> tuple[Array]:
    return (block_topk_attention(**x),)


SUBJECTS: dict[str, Subject] = {
    "attention": Subject(
        _attention,
        attention_cases.KERNELS,
        attention_cases.inputs,
        ("q", "k", "v"),
        options=lambda case: {"window": case.window},
    ),
    "block_topk_attention": Subject(
        _chosen,
        sparse_cases.KERNELS,
        sparse_cases.inputs,
        ("q", "k", "v"),
        options=lambda case: {"block_size": case.block},
    ),
    "linear_attention": Subject(
        linear_attention, linear_cases.KERNELS, functools.partial(linear_cases.inputs, beta=False), ("q", "k", "v")
    ),
    "delta_rule": Subject(
        delta_rule, delta_cases.KERNELS, functools.partial(linear_cases.inputs, beta=True), ("q", "k", "v")
    ),
    "linear_scan": Subject(linear_scan, scan_cases.KERNELS, scan_cases.inputs, ("a", "b"), ("float32", "bfloat16")),
    "short_conv": Subject(
        functools.partial(short_conv, activation="silu"),
        conv_cases.KERNELS,
        conv_cases.inputs,
        ("x", "initial_state"),
        ("float32", "bfloat16"),
    ),
    "glu": Subject(
        _stateless(glu),
        rowwise_cases.PRODUCTS,
        rowwise_cases.inputs,
        ("x", "gate"),
        ("float32", "bfloat16"),
        options=lambda case: {"activation": case.activation},
        documents=False,
    ),
    "rms_norm": Subject(
        _stateless(rms_norm),
        rowwise_cases.NORMS,
        rowwise_cases.inputs,
        ("x", "gate"),
        options=lambda case: {"activation": case.activation, "mean": case.mean},
        documents=False,
    ),
}
"""By the names of `ops.table`."""


@dataclasses.dataclass(frozen=True)
class Examination:
    """One kernel, case and dtype; with documents and padding if `packed`."""

    op: str
    kernel: str
    case: str
    dtype: str
    packed: bool


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of it. Errors are relative RMS by tensor, nan where one is not finite."""

    what: Examination
    refusal: str | None = None  # why the kernel does not serve
    failure: str | None = None  # what was raised
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # of a forward and backward pass

    @property
    def strain(self) -> dict[str, float]:
        """Errors in units of their tolerance."""
        return {name: error / op_tolerance(name, self.what.dtype) for name, error in self.errors.items()}

    @property
    def verdict(self) -> str:
        if self.refusal or self.failure:
            return "refused" if self.refusal else "failed"
        return "right" if all(x <= 1 for x in self.strain.values()) else "wrong"


def examinations(names: Sequence[str]) -> list[Examination]:
    """All that is to be examined of these ops; of all, if none is named.

    Raises:
      ConfigError: a name that is no op with kernels.
    """
    for name in names:
        if name not in SUBJECTS:
            raise ConfigError("ops", name, f"expected some of {', '.join(SUBJECTS)}")
    return [
        Examination(op, kernel, case, dtype, packed)
        for op, subject in SUBJECTS.items()
        if op in (names or SUBJECTS)
        for kernel in ops.OPS[op]
        if kernel.startswith("pallas")
        for case in subject.cases
        for dtype in subject.dtypes
        for packed in (False, True)[: 1 + subject.documents]
    ]


def examine(planned: Sequence[Examination], threads: int) -> Iterator[Finding]:
    """A finding for each, as they come; all programs are compiled at the same time, then run one after the other."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        patients = [(what, pool.submit(_Patient, what)) for what in planned]
    for what, patient in patients:
        try:
            yield patient.result().examined()
        except _RefusalError as refusal:
            yield Finding(what, refusal=str(refusal))
        except Exception as error:  # whatever a compiler or a device raises
            yield Finding(what, failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])


class _RefusalError(Exception):
    """The kernel says that it cannot serve."""


class _Patient:
    """An examination with its programs compiled: the kernel's, and the definition's in fp32 of the same values."""

    def __init__(self, what: Examination):
        self.what = what
        subject = SUBJECTS[what.op]
        case = subject.cases[what.case]
        inputs = subject.inputs(case)
        seg = jnp.asarray(linear_cases.documents(case.B, case.T)) if what.packed else None
        dtypes = {n: what.dtype if n in subject.values else _low(x.dtype) for n, x in inputs.items()}
        self._low = {n: jnp.asarray(x, dtypes[n]) for n, x in inputs.items()}
        self._exact = {n: jnp.asarray(x, _low(x.dtype)) for n, x in self._low.items()}
        op = functools.partial(subject.op, segment_ids=seg, **subject.options(case))
        kernel, definition = (functools.partial(op, impl=impl) for impl in (what.kernel, "recurrent"))
        try:
            outputs = jax.eval_shape(lambda x: kernel(**x), self._low)
        except ValueError as refusal:
            raise _RefusalError(str(refusal).partition("cannot serve: ")[2] or str(refusal)) from None
        rng = np.random.default_rng(1)
        # Representable in bfloat16, so that every dtype is given the same problem.
        self._cotangents = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16) for x in outputs)
        self._kernel = _compiled(kernel, self._low, self._cotangents)
        self._definition = _compiled(definition, self._exact, self._cotangents)

    def examined(self) -> Finding:
        """Compares and times them."""
        expected = self._definition(self._exact, self._cotangents)
        call = functools.partial(self._kernel, self._low, self._cotangents)
        errors = {name: relative_rms(x, expected[name]) for name, x in call().items()}
        times = side_by_side({"kernel": call}, repeats=5, seconds=0.2)
        return Finding(self.what, errors=errors, seconds=times["kernel"].median)


def _low(dtype: Any) -> str:
    """What tensors are handed over as that do not come in the dtype of an examination."""
    return "int32" if jnp.issubdtype(dtype, jnp.integer) else "float32"


def _compiled(op: Callable, x: Tensors, cotangents: tuple[Array, ...]) -> Callable[..., Tensors]:
    """(inputs, cotangents) -> o, state and d<input>, the latter for more than one token and not of constant decays."""

    @jax.jit
    def run(x: Tensors, cotangents: tuple[Array, ...]) -> Tensors:
        if cotangents[0].shape[1] == 1:  # a step of decoding: where it is differentiated, the definition runs
            return dict(zip(("o", "state"), op(**x), strict=False))
        fixed = {
            name: a
            for name, a in x.items()
            if (name == "log_decay" and a.ndim == 1) or jnp.issubdtype(a.dtype, jnp.integer)
        }
        outputs, pullback = jax.vjp(lambda own: op(**own, **fixed), {n: a for n, a in x.items() if n not in fixed})
        (gradients,) = pullback(tuple(d.astype(o.dtype) for d, o in zip(cotangents, outputs, strict=True)))
        return dict(zip(("o", "state"), outputs, strict=False)) | {f"d{name}": d for name, d in gradients.items()}

    return run.lower(x, cotangents).compile()


def table(findings: Iterable[Finding]) -> Table:
    """A line per finding, with the tensor that is nearest to its tolerance, or farthest beyond."""
    result = Table("op", "kernel", "case", "dtype", "documents", "worst", "error", "allowed", "verdict", "ms")
    for column in result.columns:
        column.no_wrap = True
    for found in findings:
        what, cells = found.what, ["", "", ""]
        if found.errors:
            worst = max(found.strain, key=lambda name: np.nan_to_num(found.strain[name], nan=np.inf))
            cells = [worst, f"{found.errors[worst]:.1e}", f"{op_tolerance(worst, what.dtype):.0e}"]
        milliseconds = f"{1e3 * found.seconds:.2f}" if found.errors else ""
        row = (what.op, what.kernel, what.case, what.dtype, "yes" if what.packed else "no", *cells)
        result.add_row(*row, found.verdict, milliseconds)
    return result


def summary(findings: Sequence[Finding]) -> list[str]:
    """What kernels refuse, what went wrong in full, and what to do about it."""
    lines = []
    refused: dict[tuple[str, str, str], list[str]] = {}
    for found in findings:
        what = found.what
        name = f"{what.op} {what.kernel} {what.case} {what.dtype}{' with documents' if what.packed else ''}"
        if found.verdict == "refused":
            refused.setdefault((what.op, what.kernel, str(found.refusal)), []).append(what.case)
        elif found.verdict == "failed":
            lines.append(f"{name}: {found.failure}")
        elif found.verdict == "wrong":
            lines.append(f"{name}: " + ", ".join(f"{n} {e:.1e}" for n, e in found.errors.items()))
    for (op, kernel, reason), cases in refused.items():
        some = "" if set(cases) == SUBJECTS[op].cases.keys() else f" {', '.join(dict.fromkeys(cases))}"
        lines.append(f"{op} {kernel} does not serve{some}: {reason}")
    if all(found.verdict == "refused" for found in findings):
        lines.append(f"No kernel serves {jax.devices()[0].device_kind!r}: plain XLA is used.")
    elif sick := wrong(findings):
        impl = ", ".join(f"{op}=chunked" for op in sick)
        lines.append(
            f'Not to be trusted here: {", ".join(sick)}. Leave their kernels out by --config.model.impl="{impl}".'
        )
    else:
        lines.append("All kernels that serve this device are right.")
    return lines


def wrong(findings: Iterable[Finding]) -> list[str]:
    """The ops with a kernel that is wrong or fails."""
    return list(dict.fromkeys(found.what.op for found in findings if found.verdict in ("wrong", "failed")))
