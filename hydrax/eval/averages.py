"""Ways to compute running averages, side by side: in chunks, by associative scans, by Fourier transforms.

Two averages: those with fixed decays of `ops.ema`, N modes for each of D channels, and those under a softmax of
`ops.slots`, N slots for each head of 64 channels. Another way is a line of `SUBJECTS`; which of them the ops take by
default is what the measurements decide.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp

from hydrax.core.build import Check, ConfigError, NonNegative, Positive, PositiveFloat
from hydrax.core.numerics import einsum
from hydrax.core.typing import Array
from hydrax.eval import contest
from hydrax.eval.layer import Inputs
from hydrax.ops.ema import ema
from hydrax.ops.ema.forms import powers_of
from hydrax.ops.scan import linear_scan
from hydrax.ops.slots import slot_softmax

HEAD = 64
"""Channels of a head of slots."""

Arguments = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Decays:
    """The averages of `ops.ema`: e^g from 0.02 to 0.9998, and angles where the modes are complex."""

    complex: bool = False

    def inputs(self, keys: Array, tokens: int, width: int, modes: int) -> Arguments:
        shape, normal = (width, modes), jax.random.normal
        x = {
            "x": normal(keys[0], (1, tokens, width)),
            "log_decay": -jnp.exp(jax.random.uniform(keys[1], shape, minval=-8.5, maxval=1.4)),
            "write": normal(keys[2], shape),
            "read": normal(keys[3], shape) / modes**0.5,
        }
        if self.complex:
            x["angle"] = jax.random.uniform(keys[4], shape, maxval=2 * jnp.pi)
            x["read_imaginary"] = normal(keys[5], shape) / modes**0.5
        return x

    def definition(self, x: Arguments) -> Array:
        return by_op(x, impl="recurrent")


@dataclasses.dataclass(frozen=True)
class Slots:
    """The averages of `ops.slots.slot_softmax`."""

    def inputs(self, keys: Array, tokens: int, width: int, modes: int) -> Arguments:
        scores, heads = (1, tokens, max(1, width // HEAD), modes), max(1, width // HEAD)
        return {
            "q": jax.nn.softmax(jax.random.normal(keys[0], scores)),
            "scores": jax.random.normal(keys[1], scores),
            "v": jax.random.normal(keys[2], (1, tokens, heads, width // heads)),
        }

    def definition(self, x: Arguments) -> Array:
        return by_slots(x, impl="recurrent")


class Kind(Protocol):
    def inputs(self, keys: Array, tokens: int, width: int, modes: int) -> Arguments: ...

    def definition(self, x: Arguments) -> Array: ...


def by_op(x: Arguments, **how: Any) -> Array:
    """`ops.ema`."""
    _, read = _modes(x)
    return ema(x["x"], x["log_decay"], x["write"], read, x.get("angle"), **how)[0]


def by_scan(x: Arguments, scan: Callable[[Array, Array], Array]) -> Array:
    """All states [B,T,D,N] at once, by a scan (a, b) -> h."""
    log_q, read = _modes(x)
    new = (x["write"] * x["x"][..., None]).astype(log_q.dtype)
    h = scan(jnp.broadcast_to(jnp.exp(log_q), new.shape), new)
    return (read * h).sum(-1).real


def by_fourier(x: Arguments) -> Array:
    """A convolution with Re Σ γ p q^τ of the length of the row."""
    log_q, read = _modes(x)
    T = x["x"].shape[1]
    kernel = (read * x["write"] * powers_of(log_q, T)).sum(-1).real
    spectra = (jnp.fft.rfft(a, 2 * T, axis=-2) for a in (x["x"], kernel))
    return jnp.fft.irfft(jnp.multiply(*spectra), 2 * T, axis=-2)[:, :T]


def associative(a: Array, b: Array) -> Array:
    """h_t = a_t h_{t-1} + b_t over the whole row."""
    then = lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1])  # noqa: E731
    return jax.lax.associative_scan(then, (a, b), axis=1)[1]


def by_slots(x: Arguments, **how: Any) -> Array:
    """`ops.slots.slot_softmax`."""
    return slot_softmax(x["q"], x["scores"], x["v"], **how)[0]


def slots_at_once(x: Arguments) -> Array:
    """All averages [B,T,H,M,V] at once: each stays divided by its sum of weights, the logarithm of which goes along."""

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        total = jnp.logaddexp(first[0], second[0])
        terms = (jnp.exp(lse - total)[..., None] * average for lse, average in (first, second))
        return total, sum(terms, jnp.zeros(()))

    scores, v = x["scores"], x["v"][:, :, :, None]
    start = scores, jnp.broadcast_to(v, (*scores.shape, v.shape[-1]))
    return einsum("bthm,bthmv->bthv", x["q"], jax.lax.associative_scan(then, start, axis=1)[1])


def _modes(x: Arguments) -> tuple[Array, Array]:
    """log q and γ, real or complex."""
    if "angle" not in x:
        return x["log_decay"], x["read"]
    return jax.lax.complex(x["log_decay"], x["angle"]), jax.lax.complex(x["read"], x["read_imaginary"])


@dataclasses.dataclass(frozen=True)
class Subject:
    kind: Kind
    way: Callable[[Arguments], Array]


def _of_decays(kind: Decays) -> dict[str, Subject]:
    """All ways; of complex numbers those that may be the fastest."""
    sizes = (64, 128) if kind.complex else (16, 32, 64, 128, 256)
    ways: dict[str, Callable[[Arguments], Array]] = {
        f"chunks_{size}": functools.partial(by_op, impl="chunked", chunk_size=size) for size in sizes
    }
    ways["scan_in_chunks"] = functools.partial(by_scan, scan=lambda a, b: linear_scan(a, b, impl="chunked")[0])
    ways |= {"associative_scan": functools.partial(by_scan, scan=associative), "fourier": by_fourier}
    name = "complex" if kind.complex else "real"
    return {f"{name}_{way}": Subject(kind, f) for way, f in ways.items()}


SUBJECTS: dict[str, Subject] = {
    **_of_decays(Decays()),
    **_of_decays(Decays(complex=True)),
    **{
        f"slots_chunks_{n}": Subject(Slots(), functools.partial(by_slots, impl="chunked", chunk_size=n))
        for n in (32, 64, 128)
    },
    "slots_associative_scan": Subject(Slots(), slots_at_once),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    subjects: Annotated[tuple[str, ...], Check("at least one subject", bool)]
    seq_lens: Annotated[tuple[Positive, ...], Check("at least one length", bool)]  # tokens of a row
    widths: Annotated[tuple[Positive, ...], Check("at least one width", bool)]  # channels
    modes: Positive  # of a channel; slots of a head
    check: NonNegative  # tokens of the row on which results are compared; 0: they are not
    repeats: Positive  # samples of a program, at most
    seconds: PositiveFloat  # of measuring after which a program gets no further sample
    threads: Positive  # programs compiled at the same time

    def __post_init__(self) -> None:
        for name in self.subjects:
            if name not in SUBJECTS:
                raise ConfigError("subjects", name, f"expected all, or some of {', '.join(SUBJECTS)}")
        for width in self.widths:
            if width > HEAD and width % HEAD:
                raise ConfigError("widths", width, f"expected at most {HEAD}, or a multiple of it")


@dataclasses.dataclass(frozen=True)
class Op:
    """A way to compute averages as a layer without parameters; all of x has a gradient."""

    kind: Kind
    way: Callable[[Arguments], Array]
    width: int
    modes: int

    dtype = "float32"

    @property
    def definition(self) -> "Op":
        return dataclasses.replace(self, way=self.kind.definition)

    def inputs(self, batch: int, seq_len: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seq_len), 7)
        x = self.kind.inputs(keys, seq_len, self.width, self.modes)
        values = x["v"] if "v" in x else x["x"]
        return {"x": x, "dy": jax.random.normal(keys[6], values.shape), "facts": {}}

    def __call__(self, params: None, x: Arguments, facts: Arguments) -> Array:
        return self.way(x)


def bench(settings: Settings) -> Iterator[list[contest.Row]]:
    """The rows of one subject and width after another, by length."""
    pairs = ((SUBJECTS[name], name, width) for width in settings.widths for name in settings.subjects)
    ops = {(name, width): Op(s.kind, s.way, width, settings.modes) for s, name, width in pairs}
    return contest.bench(ops, settings)
