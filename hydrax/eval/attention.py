"""Time and memory of attention ops against the length of a row, beside full attention, after a check of their results.

Another op is a line of `SUBJECTS`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import Check, ConfigError, NonNegative, Positive, PositiveFloat
from hydrax.core.typing import Array
from hydrax.eval import contest
from hydrax.eval.layer import Inputs
from hydrax.ops.softmax import attention, forms
from hydrax.ops.sparse import block_topk_attention, compress, lifetimes, pooled, pooled_keys
from hydrax.ops.sparse.ranked import ranked_ends
from hydrax.ops.sparse.span_scores import Choice, choose_by_spans
from hydrax.ops.sparse.tokens import rows_and_keys

WINDOW = 512
"""Tokens that local patterns look back."""

Arguments = Callable[[int, int], dict[str, Any]]
"""Of an op besides q, k, v and impl, by the number of tokens and of heads of keys; the arrays among them are inputs."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An op `op(q, k, v, **arguments, impl=...)` -> o, which has a form "recurrent": its definition.

    Attributes:
      learned: the arguments with gradients.
      impl: the form that is measured; None: what the op chooses.
      kv_heads: heads of keys; None: as many as of queries.
    """

    op: Callable[..., Array] = attention
    arguments: Arguments = lambda tokens, heads: {}
    learned: tuple[str, ...] = ()
    impl: str | None = None
    kv_heads: int | None = None


def _documents(tokens: int, heads: int) -> dict[str, Any]:
    """Of a quarter of the row, at most 2048 tokens."""
    return {"segment_ids": np.arange(tokens, dtype=np.int32)[None] // max(1, min(2048, tokens // 4)) + 1}


def _pattern(make: Callable[[int], lifetimes.Pattern]) -> Arguments:
    """As the mixer `swa` calls it."""

    def arguments(tokens: int, heads: int) -> dict[str, Any]:
        alive = make(heads)
        options: dict[str, Any] = {"window": alive.reach, "sink_tokens": alive.first, "dilation": alive.dilation}
        ends = np.asarray(alive.ends(np.arange(tokens)[None]), np.int32)
        return {"ends": ends, "alive": alive.slots(tokens), **options}

    return arguments


def _spans(heads: int) -> lifetimes.Pattern:
    return lifetimes.Spans(64, (tuple(WINDOW // 64 * (1 + h % 4) for h in range(heads)),))


def _ranked(tokens: int, heads: int) -> dict[str, Any]:
    return {"score": np.random.default_rng(2).standard_normal((1, tokens, heads), np.float32), "keep": WINDOW}


def _ranked_attention(q: Array, k: Array, v: Array, *, score: Array, keep: int, impl: str | None) -> Array:
    """What the mixer `dma` does with the scores of keys."""
    B, T = q.shape[:2]
    positions, ids = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)
    ends = ranked_ends(score, positions, ids, keep, impl="recurrent" if impl == "recurrent" else None)
    return lifetimes.lifetime_attention(q, k, v, ends, key_bias=jnp.exp(score), alive=keep, impl=impl)


def _chosen(block_size: int, number: int, alike: int) -> Arguments:
    """Own block, the first one, and random ones of the past, the same for `alike` tokens in a row."""

    def arguments(tokens: int, heads: int) -> dict[str, Any]:
        own = np.arange(tokens)[:, None, None] // block_size
        share = np.random.default_rng(3).random((-(-tokens // alike), heads, number - 2), np.float32)
        idx = (share.repeat(alike, axis=0)[:tokens] * own).astype(np.int32)
        ends = [np.broadcast_to(x, (tokens, heads, 1)) for x in (own, 0 * own)]
        return {"idx": np.concatenate([*ends, idx], axis=-1, dtype=np.int32)[None], "block_size": block_size}

    return arguments


def _routed_blocks(q: Array, k: Array, v: Array, *, block_size: int, top: int, impl: str | None) -> Array:
    """What the mixer `moba` does."""
    queries, keys = rows_and_keys(q, k, v, None, None, None, None)
    means = pooled_keys(pooled.block_sums(k, block_size, keys.positions, None), block_size)
    idx = pooled.choose_blocks(queries, means, block_size, top, apart=True)
    return block_topk_attention(q, k, v, idx, block_size=block_size, impl=impl)


def _scored_blocks(q: Array, k: Array, v: Array, *, choice: Choice, impl: str | None) -> Array:
    """What the mixer `infllm2` does."""
    queries, keys = rows_and_keys(q, k, v, None, None, None, None)
    sums = pooled.block_sums(k, choice.stride, keys.positions, None)
    idx = choose_by_spans(queries, sums, choice, q.shape[-1] ** -0.5)
    return block_topk_attention(q, k, v, idx, block_size=choice.block, impl=impl)


def _spans_blocks_window(q: Array, k: Array, v: Array, *, choice: Choice, impl: str | None) -> Array:
    """What the mixer `nsa` does with means of spans, all gates 1."""
    queries, keys = rows_and_keys(q, k, v, None, None, None, None)
    sums = [pooled.block_sums(x, choice.stride, keys.positions, None) for x in (k, v)]
    means, values = (pooled_keys(x, choice.stride, choice.length) for x in sums)
    ends = means.numbers * choice.stride + choice.length - 1
    spans = forms.Keys(means.x, values.x, ends, means.segment_ids)
    rules = forms.Rules(q.shape[-1] ** -0.5, None, None, 0, aligned=False)
    ids = jnp.ones(q.shape[:2], jnp.int32)
    exact = queries._replace(q=queries.q.astype(jnp.float32), segment_ids=ids)
    o, idx = compress.span_attention(exact, spans, sums[0], choice, rules, dtype=q.dtype, impl=impl)
    chosen = block_topk_attention(q, k, v, idx, block_size=choice.block, impl=impl)
    near = attention(q, k, v, window=WINDOW, impl=impl)
    return o.reshape(chosen.shape).astype(chosen.dtype) + chosen + near


SUBJECTS = {
    "cudnn": Subject(impl="cudnn"),
    "plain": Subject(impl="pallas_gpu"),
    "documents": Subject(arguments=_documents),
    "window": Subject(arguments=lambda tokens, heads: {"window": WINDOW}, impl="pallas_gpu"),
    "window_128": Subject(arguments=lambda tokens, heads: {"window": 128}, impl="pallas_gpu"),
    "window_2048": Subject(arguments=lambda tokens, heads: {"window": 2048}, impl="pallas_gpu"),
    "window_cudnn": Subject(arguments=lambda tokens, heads: {"window": WINDOW}, impl="cudnn"),
    "sink_tokens": Subject(arguments=lambda tokens, heads: {"window": WINDOW, "sink_tokens": 4}),
    "gna": Subject(arguments=_pattern(lambda heads: lifetimes.Neighbourhood(WINDOW, 64))),
    "gna_dilated": Subject(arguments=_pattern(lambda heads: lifetimes.Neighbourhood(WINDOW, 64, dilation=2))),
    "s2": Subject(arguments=_pattern(lambda heads: lifetimes.Strided(64, WINDOW // 64, 8, heads))),
    "shifted_groups": Subject(
        arguments=_pattern(
            lambda heads: lifetimes.ShiftedGroups(WINDOW, tuple(h % 2 * WINDOW // 2 for h in range(heads)))
        )
    ),
    "spans": Subject(arguments=_pattern(_spans)),
    "log_bands": Subject(arguments=_pattern(lambda heads: lifetimes.LogBands(WINDOW // 4))),
    "dma": Subject(_ranked_attention, _ranked, ("score",)),
    "blocks": Subject(block_topk_attention, _chosen(64, 16, 64), impl="pallas_gpu", kv_heads=1),
    "blocks_apart": Subject(block_topk_attention, _chosen(64, 16, 1), impl="pallas_gpu", kv_heads=1),
    "blocks_gather": Subject(block_topk_attention, _chosen(64, 16, 1), impl="gather", kv_heads=1),
    "blocks_inverse": Subject(block_topk_attention, _chosen(64, 16, 1), impl="inverse", kv_heads=1),
    "blocks_512": Subject(block_topk_attention, _chosen(512, 4, 512), impl="pallas_gpu"),
    "nsa": Subject(
        _spans_blocks_window,
        lambda tokens, heads: {"choice": Choice(64, 32, 16, first=1, local=1, count=16, pool="sum")},
        kv_heads=1,
    ),
    "infllm2": Subject(
        _scored_blocks,
        lambda tokens, heads: {"choice": Choice(64, 32, 16, first=1, local=WINDOW // 64, count=16 + WINDOW // 64)},
        kv_heads=1,
    ),
    "moba": Subject(_routed_blocks, lambda tokens, heads: {"block_size": WINDOW // 2, "top": 4}),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    subjects: Annotated[tuple[str, ...], Check("at least one subject", bool)]
    seq_lens: Annotated[tuple[Positive, ...], Check("at least one length", bool)]  # tokens of a row
    widths: Annotated[tuple[Positive, ...], Check("at least one width", bool)]  # K = V of a head
    heads: Positive  # query heads
    check: NonNegative  # tokens of the row on which results are compared; 0: they are not
    repeats: Positive  # samples of a program, at most
    seconds: PositiveFloat  # of measuring after which a program gets no further sample
    threads: Positive  # programs compiled at the same time

    def __post_init__(self) -> None:
        for name in self.subjects:
            if name not in SUBJECTS:
                raise ConfigError("subjects", name, f"expected all, or some of {', '.join(SUBJECTS)}")


class Op:
    """A subject as a layer without parameters: x holds what has a gradient."""

    dtype = "bfloat16"

    def __init__(self, subject: Subject, heads: int, width: int, impl: str | None):
        self.subject, self.heads, self.width, self.impl = subject, heads, width, impl

    @property
    def definition(self) -> "Op":
        return Op(self.subject, self.heads, self.width, "recurrent")

    def inputs(self, batch: int, seq_len: int) -> Inputs:
        """Normal values, in bfloat16 but for arguments of the subject."""
        groups, keys = self.subject.kv_heads or self.heads, jax.random.split(jax.random.key(seq_len), 4)
        shapes = {"q": self.heads, "k": groups, "v": groups, "dy": self.heads}
        x: dict[str, Any] = {
            name: jax.random.normal(key, (batch, seq_len, n, self.width), jnp.bfloat16)
            for (name, n), key in zip(shapes.items(), keys, strict=True)
        }
        arguments = self.subject.arguments(seq_len, groups)
        x |= {name: jnp.asarray(arguments[name]) for name in self.subject.learned}
        facts = {n: jnp.asarray(a) for n, a in arguments.items() if isinstance(a, np.ndarray) and n not in x}
        return {"dy": x.pop("dy"), "x": x, "facts": facts}

    def __call__(self, params: None, x: dict[str, Array], facts: dict[str, Array]) -> Array:
        groups, seq_len = x["k"].shape[2], x["q"].shape[1]
        options = {n: a for n, a in self.subject.arguments(seq_len, groups).items() if not isinstance(a, np.ndarray)}
        return self.subject.op(**x, **facts, **options, impl=self.impl)


def bench(settings: Settings) -> Iterator[list[contest.Row]]:
    """The rows of one subject and width after another, by length."""
    pairs = ((name, width) for width in settings.widths for name in settings.subjects)
    ops = {(name, w): Op(SUBJECTS[name], settings.heads, w, SUBJECTS[name].impl) for name, w in pairs}
    return contest.bench(ops, settings)
