"""Random hybrids: what holds for every mixer must hold for whatever the grammar makes of them.

`make test` checks documents, causality and decoding of the first five, `make test-all` everything of fifty, and
`make fuzz N=200 START=1000` as many as one likes.
"""

import dataclasses
import functools
import itertools
import math
import os
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.typing import Array
from hydrax.models import cost, lm
from hydrax.models.layers import FFN, Place
from hydrax.models.spec import ModelConfig, resolve
from hydrax.nn.norm import NORMS
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.step import make_train_step
from tests.contract.cases import CHUNK, D, inside, segments
from tests.contract.specs import ANY, AXES, VOCABULARY, features, random_spec
from tests.models.small import unstacked
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

FIXED = range(50)
START, COUNT = int(os.environ.get("FUZZ_START", 0)), int(os.environ.get("FUZZ_COUNT", len(FIXED)))
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 5 else []) for seed in range(START, START + COUNT)]

LENGTHS = (1, CHUNK - 1, 1, CHUNK, 3)
SPLITS = (0, 1, CHUNK - 1, CHUNK + 1, sum(LENGTHS) - 1)
CUTS = (1, 8, CHUNK, sum(LENGTHS) - 1)
OTHER = 3  # the document that has other tokens in one row
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch, and where in it the tokens of its documents are."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    modes: np.ndarray
    places: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Hybrid:
    """A model of which no parameter is zero, and the one text it is tested on."""

    seed: int

    @functools.cached_property
    def cfg(self) -> ModelConfig:
        return random_spec(self.seed)

    @functools.cached_property
    def plan(self) -> lm.Blueprint:
        return lm.blueprint(self.cfg)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """In fp64; whoever needs fp32 rounds them."""
        rng = np.random.default_rng(self.seed)
        return {name: np.float64(np.float32(value(rng, name, self.plan))) for name in self.plan.shapes}

    @property
    def prefix(self) -> int:
        return self.cfg.prefix.meta_tokens

    def text(self, number: int = 0, n: int = sum(LENGTHS)) -> np.ndarray:
        """Tokens and modes [2,n]."""
        rng = np.random.default_rng([self.seed, number])
        return np.stack([rng.integers(0, VOCABULARY, n), rng.integers(0, 2, n)]).astype(np.int32)

    def row(self, lengths: tuple[int, ...], text: np.ndarray, filler: int = 1) -> Row:
        """Documents of a text side by side, each behind the positions of its prefix; the rest is nobody's text."""
        width = sum(LENGTHS) + self.prefix * len(LENGTHS) + 1
        seg = segments([n + self.prefix for n in lengths], width)
        places = np.flatnonzero((seg != 0) & (inside(seg[None])[0][0] >= self.prefix))
        whole = self.text(filler, width)
        whole[:, places] = text[:, : len(places)]
        return Row(whole[0], seg, whole[1], places)


def value(rng: np.random.Generator, name: str, plan: lm.Blueprint) -> np.ndarray:
    """A parameter of about the size it has at initialisation, with decays over a dozen tokens."""
    shape, meta = plan.shapes[name].shape, plan.meta[name]
    x = rng.standard_normal(shape)
    if meta.matrix is not None:
        return x * math.prod(shape[i] for i in meta.matrix[0]) ** -0.5
    if name in ("embed/weight", "head/weight", "meta"):
        return x * D**-0.5
    if name.endswith(("dt_bias", "rate")):
        return x - 3
    return 0.3 * x + name.endswith(("norm/weight", "norm_weight"))


@pytest.fixture(scope="module", params=SEEDS)
def hybrid(request) -> Hybrid:
    h = Hybrid(request.param)
    print(f"{h.cfg.pattern}, blocks {h.cfg.blocks}, {', '.join(sorted(features(h.cfg)))}")
    return h


def batch(rows: list[Row]) -> dict[str, np.ndarray]:
    return {name: np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "segment_ids", "modes")}


# ------------------------------------------------------------------------------------------- what a logit may depend on


@dataclasses.dataclass(frozen=True)
class Logits:
    """Those of the rows of one batch, and of the first two among other rows.

    packed: the text's documents side by side; whole: the text as one document; alone: a document per row; changed: the
    whole text with other tokens from each cut on; other: the packed row with another document in its midst.
    """

    packed: np.ndarray
    whole: np.ndarray
    alone: np.ndarray
    changed: np.ndarray
    other: np.ndarray
    packed_again: np.ndarray
    whole_again: np.ndarray


exact = functools.partial(jax.enable_x64, True)
"""Where forms are compared: random models amplify the rounding of fp32 by any factor."""


@functools.lru_cache(maxsize=1)
def forward(h: Hybrid):
    """(params, batch) -> logits, compiled once for a hybrid and a dtype."""
    return jax.jit(lambda p, b: h.plan.merge(p)(b["tokens"], b["segment_ids"], modes=b["modes"]))


def documents(h: Hybrid, filler: int = 1) -> list[Row]:
    """The documents of the text in a row each."""
    pieces = np.split(h.text(), np.cumsum(LENGTHS)[:-1], axis=1)
    return [h.row((n,), piece, filler) for n, piece in zip(LENGTHS, pieces, strict=True)]


@functools.lru_cache(maxsize=1)
def logits(h: Hybrid) -> Logits:
    n, text, another = sum(LENGTHS), h.text(), h.text(2)
    another[0] = (text[0] + 1 + another[0] % (VOCABULARY - 1)) % VOCABULARY  # no token is the same
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    rows = [h.row(LENGTHS, text), h.row((n,), text), *documents(h)]
    company = [h.row((3, n - 3), another, filler=3) for _ in rows[2:]]

    def run(rows: list[Row]) -> np.ndarray:
        with exact():
            return np.asarray(forward(h)(h.params, batch(rows)))

    def instead(at: int, row: Row) -> np.ndarray:
        """In the same place of the batch: XLA may round the rows of a matrix product by where they stand."""
        return run([*rows[:at], row, *rows[at + 1 :]])[at]

    first, again = run(rows), run([h.row(LENGTHS, text, 3), h.row((n,), text, 3), *company])
    changed = [instead(1, h.row((n,), np.where(np.arange(n) < cut, text, another))) for cut in CUTS]
    other = instead(0, h.row(LENGTHS, np.where(document == OTHER, another, text)))
    return Logits(first[0], first[1], first[2:], np.stack(changed), other, again[0], again[1])


def assert_same(h: Hybrid, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit. Experts take the tokens of all rows in groups, and round by where in its group a token stands."""
    if any(layer.moe for layer in resolve(h.cfg)):
        assert_close(name, actual, expected, TOLERANCE["fp64"])
    else:
        assert_equal(name, actual, expected)


def test_packed_documents_equal_separate_ones(hybrid: Hybrid):
    y, places = logits(hybrid), hybrid.row(LENGTHS, hybrid.text()).places
    for i, (own, row) in enumerate(zip(np.split(places, np.cumsum(LENGTHS)[:-1]), documents(hybrid), strict=True)):
        assert_close(f"document {i}", y.packed[own], y.alone[i][row.places], TOLERANCE["fp64"])


def test_the_past_ignores_the_future(hybrid: Hybrid):
    y = logits(hybrid)
    for cut, changed in zip(CUTS, y.changed, strict=True):
        at = hybrid.prefix + cut
        assert_same(hybrid, f"logits before {cut}", changed[:at], y.whole[:at])
        assert np.any(changed[at] != y.whole[at]), f"logits at {cut} do not depend on their own token"


def test_documents_padding_and_neighbours_do_not_matter(hybrid: Hybrid):
    """In one call another document of the row changes; in the other what is no text, and all other rows."""
    y, row = logits(hybrid), hybrid.row(LENGTHS, hybrid.text())
    beside = (row.segment_ids != OTHER + 1) & (row.segment_ids != 0)
    assert_same(hybrid, "beside another document", y.other[beside], y.packed[beside])
    assert np.all(np.any(y.other != y.packed, axis=-1)[row.segment_ids == OTHER + 1][hybrid.prefix :])
    real = row.segment_ids != 0
    assert_same(hybrid, "packed among others", y.packed_again[real], y.packed[real])
    real = hybrid.prefix + sum(LENGTHS)
    assert_same(hybrid, "whole among others", y.whole_again[:real], y.whole[:real])


# --------------------------------------------------------------------------------------------------------- other forms


def test_prefill_then_steps_equal_the_whole_pass(hybrid: Hybrid):
    """Every row prefills a part of its text, right-padded, then decodes the rest; finished rows step on padding."""
    h, y = hybrid, logits(hybrid)
    texts = [h.row(LENGTHS, h.text()), h.row((sum(LENGTHS),), h.text())]
    given = {name: array[:, h.prefix :] for name, array in batch(texts).items()}  # the cache has the first prefix
    given = {name: np.repeat(array, len(SPLITS), axis=0) for name, array in given.items()}
    width, splits = given["tokens"].shape[1], np.tile(SPLITS, 2)[:, None]
    rest = splits + np.arange(width)
    early = {**given, "segment_ids": np.where(np.arange(width) < splits, given["segment_ids"], 0)}
    late = {name: np.take_along_axis(array, np.minimum(rest, width - 1), axis=1) for name, array in given.items()}
    late["segment_ids"] = np.where(rest < width, late["segment_ids"], 0)

    @jax.jit
    def decode(params, early, late):
        model = h.plan.merge(params)
        cache = model.init_cache(len(splits), sum(LENGTHS), jnp.float64)
        first, cache = model.prefill(early["tokens"], cache, early["segment_ids"], modes=early["modes"])

        def step(cache, token):
            y, cache = model.step(token["tokens"], cache, token["segment_ids"], modes=token["modes"])
            return cache, y

        _, steps = jax.lax.scan(step, cache, {name: array.T for name, array in late.items()})
        return first, jnp.moveaxis(steps, 0, 1)

    with exact():
        first, steps = map(np.asarray, decode(h.params, early, late))
    for i, ((want, name), split) in enumerate(itertools.product(((y.packed, "packed"), (y.whole, "whole")), SPLITS)):
        want, real = want[h.prefix :], given["segment_ids"][i] != 0
        assert_close(f"{name}: prefill of {split}", first[i, :split], want[:split], TOLERANCE["fp64"])
        rest = steps[i, : real.sum() - split]
        assert_close(f"{name}: steps after {split}", rest, want[real][split:], TOLERANCE["fp64"])


@pytest.mark.slow
def test_scanned_layers_equal_unrolled_ones(hybrid: Hybrid):
    """The same parameters by layer, and a row without documents: the model puts the prefix there itself."""
    h, unrolled = hybrid, lm.blueprint(hybrid.cfg, scan=False)
    if unrolled.shapes == h.plan.shapes:
        pytest.skip("no layers repeat")
    tokens, modes = h.text()[:, None]
    with exact():
        y = jax.jit(lambda p: unrolled.merge(p)(tokens, modes=modes))(unstacked(h.plan, h.params))
    places = h.row((sum(LENGTHS),), h.text()).places
    assert_close("logits", y[0], logits(h).whole[places], TOLERANCE["fp64"])


def test_cache_bytes_are_what_cost_says(hybrid: Hybrid):
    """In bf16, where calls must return the structure that they take."""
    cast = jax.eval_shape(lambda p: hybrid.plan.cast(p, jnp.bfloat16), hybrid.plan.shapes)
    for max_len in (3, 100):
        cache = jax.eval_shape(lambda p, n=max_len: hybrid.plan.merge(p).init_cache(5, n, jnp.bfloat16), cast)
        priced = cost.cost(hybrid.cfg, seq_len=max_len, batch=5)
        assert tree.nbytes((cache.layers, cache.final)) == priced.state_bytes + priced.kv_bytes
    tokens = jax.ShapeDtypeStruct((5, 7), jnp.int32)
    y, new = jax.eval_shape(lambda p, c, t: hybrid.plan.merge(p).prefill(t, c), cast, cache, tokens)
    assert new == cache
    assert y.dtype == jnp.float32


# ------------------------------------------------------------------------------------------------------------ training


def examples(rows: list[Row]) -> dict[str, np.ndarray]:
    """A training batch: every token but the last of its document predicts the next one."""
    given = batch(rows)
    seg = given["segment_ids"]
    real = np.stack([np.isin(np.arange(seg.shape[1]), row.places) for row in rows])
    follows = real & (seg == np.roll(seg, -1, axis=1))
    return {
        **given,
        "positions": inside(seg)[0],
        "targets": np.roll(given["tokens"], -1, axis=1),
        "weights": follows.astype(np.float32),
        "bytes": np.ones(len(rows), np.int32),
    }


@pytest.mark.slow
def test_it_trains(hybrid: Hybrid):
    """In fp32: 20 steps on one row make its loss smaller, and nothing becomes infinite."""
    cfg = OptimConfig(lr=3e-3, schedule="constant", warmup=0)
    tx = make_optimizer(cfg, STEPS, hybrid.plan.meta)
    step = make_train_step(hybrid.plan, tx, make_schedule(cfg, STEPS))
    given = examples([hybrid.row(LENGTHS, hybrid.text())])

    @jax.jit
    def run(params):
        zero = jnp.zeros((), jnp.int32)
        state = {
            "params": params,
            "opt_state": tx.init(params),
            "step": zero,
            "skipped": zero,
            "norm_mean": jnp.zeros(()),
        }
        return jax.lax.scan(lambda state, _: step(state, given), state, None, length=STEPS)[1]

    metrics = run(rounded(hybrid.params))
    for name, values in metrics.items():
        assert np.all(np.isfinite(values)), f"{name} is {values}"
    assert metrics["skipped"][-1] == 0
    assert metrics["loss"][-1] < metrics["loss"][0], f"the loss goes from {metrics['loss'][0]} to {metrics['loss'][-1]}"


def rounded(params: dict[str, np.ndarray]) -> dict[str, Array]:
    return {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}


@functools.lru_cache(maxsize=1)
def packed_gradient(h: Hybrid) -> tuple[Any, Any]:
    """Logits and gradients of the packed row in fp64; with them, what gives those of other rows."""

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def gradient(impl, params, given):
        model = h.plan.merge(params)
        x, losses = model.forward(given["tokens"], given["segment_ids"], modes=given["modes"], impl=impl)
        y = model.logits(x)[..., :VOCABULARY]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(y), given["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(nll * given["weights"]) + sum(losses.values()), y

    def run(rows: list[Row], impl: str | None = None) -> tuple[Any, Any]:
        with exact():
            return jax.device_get(gradient(impl, h.params, examples(rows)))

    nothing = h.row((), h.text()[:, :0])
    return run([h.row(LENGTHS, h.text()), *[nothing] * (len(LENGTHS) - 1)]), run


@pytest.mark.slow
def test_gradients_of_packed_documents_equal_separate_ones(hybrid: Hybrid):
    (packed, _), run = packed_gradient(hybrid)
    apart, _ = run(documents(hybrid))
    assert_trees_close("gradient", packed, apart, TOLERANCE["fp64"])


@pytest.mark.slow
def test_forms_agree(hybrid: Hybrid):
    """Logits and gradients are those of the recurrences, which are the definition."""
    (packed, y), run = packed_gradient(hybrid)
    row = hybrid.row(LENGTHS, hybrid.text())
    want, by_definition = run([row], "recurrent")
    real = row.segment_ids != 0
    assert_close("logits", y[0][real], by_definition[0][real], TOLERANCE["fp64"])
    assert_trees_close("gradient", packed, want, TOLERANCE["fp64"])


# ------------------------------------------------------------------------------------------------------------ coverage


def test_the_fixed_ones_cover_the_grammar():
    found = [features(random_spec(seed)) for seed in FIXED]
    first, everywhere = set().union(*found[:10]), set().union(*found)
    assert set(mixers.names()) <= everywhere, "try another specs.ORDER"
    assert set(AXES) <= first
    assert [pair for pair in itertools.combinations(AXES, 2) if not any(set(pair) <= f for f in found)] == []
    wanted = {f"{kind} {name}" for kind in ("heads", "parallel") for name in ANY}
    wanted |= {f"ffn {name}" for name in get_args(FFN)} | {f"norm {name}" for name in NORMS}
    wanted |= {f"place {name}" for name in get_args(Place)} | {f"gate {name}" for name in ("none", "scalar", "channel")}
    wanted |= {f"{name} {value}" for name in ("tie", "softcap", "bias", "eta", "renorm") for value in (True, False)}
    wanted |= {"router softmax", "router sigmoid", "router_at ffn", "router_at pre_attn", "groups 2", "shared 1"}
    wanted |= {"granularity token", "granularity chunk", "shared_gate True", "loop norm none", "loop norm final"}
    wanted |= {"lora", "workspace", "pkm", "scanned", "passes differ", "inside parallel", "inside route"}
    wanted |= {"heads with the keys of others in a loop"}
    assert wanted - everywhere == set()
    whole = {"heads", "loop", "kv", "prefix"}
    assert sum(whole <= f for f in found) >= 5
