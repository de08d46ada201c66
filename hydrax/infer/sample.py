"""Sampling: p(x) ∝ softmax(logits / temperature), restricted to the smallest set of tokens with mass >= top_p."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, ArrayLike, Float, Int, PyTree
from hydrax.data.landmarks import Landmarks, landmarks_of
from hydrax.data.loader import Data
from hydrax.data.tokenizer import TextStream, Tokenizer
from hydrax.infer import policy as policies
from hydrax.infer.policy import Policy
from hydrax.infer.policy.serve import Served, served_layers
from hydrax.models.lm import LM
from hydrax.models.mix import landmarks as sections
from hydrax.models.spec import resolve
from hydrax.ops.softmax.forms import MASKED

if TYPE_CHECKING:
    from hydrax.train.config import RunConfig
    from hydrax.train.source import Source

Settings = tuple[ArrayLike | float, ArrayLike | float]
"""Temperature and top_p."""


@dataclasses.dataclass(frozen=True)
class _Structure:
    """A model without its parameters, as a key of the compilation cache (it holds dicts, so it has no hash itself)."""

    graph: nnx.GraphDef
    policy: Policy | None = None
    landmark: int | None = None  # id of landmarks, if there are any

    def __hash__(self) -> int:
        return hash((len(self.graph.nodes), self.policy, self.landmark))

    def merge(self, params: PyTree) -> LM | Served:
        """What makes a cache, reads a prompt and takes steps."""
        model = nnx.merge(self.graph, params)
        return model if self.policy is None else Served(model, self.policy)

    def sayable(self, logits: Float[Array, "B vocab"]) -> Float[Array, "B vocab"]:
        """Without the landmark, which is no target of training."""
        return logits if self.landmark is None else logits.at[:, self.landmark].set(MASKED)


def generate(
    model: LM,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    lengths: ArrayLike | None = None,
    policy: str | Policy | None = None,
    landmarks: Landmarks | None = None,
) -> Int[np.ndarray, "B N"]:
    """Continuations int32 [B,N] of the prompts `tokens` [B,T], N = max_new_tokens.

    Args:
      temperature: 0 takes the most likely token.
      top_p: nucleus; 1 keeps every token.
      stop: a row that has produced this token goes on with it.
      lengths: real tokens of each row [B] where prompts differ in length; the rest of a row is padding.
      policy: which keys softmax layers read, see `infer.policy`: another function than the one that was trained.
      landmarks: those that the model was trained with; None: those of its landmark layers, the last id. They are put
        between tokens as training puts them, and are neither given nor returned.

    Raises:
      ConfigError: a value out of its range, no prompt, or a policy or landmarks that do not suit the model.
    """
    made = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            lengths=lengths,
            policy=policy,
            landmarks=landmarks,
        )
    )
    ended = [made[-1]] * (max_new_tokens - len(made))  # every row has stopped
    return np.stack(made + ended, axis=1)


def stream(
    model: LM,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    lengths: ArrayLike | None = None,
    policy: str | Policy | None = None,
    landmarks: Landmarks | None = None,
) -> Iterator[Int[np.ndarray, "B"]]:
    """`generate` token by token: int32 [B] at a time, ending early when every row has stopped."""
    landmarks = known_landmarks(model, landmarks)
    prompt = jnp.asarray(tokens, jnp.int32)
    check_settings(temperature, top_p)
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "expected an integer >= 1")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ConfigError("tokens", prompt.shape, "expected prompts [B,T] of at least one token")
    B, T = prompt.shape
    valid = np.full(B, T) if lengths is None else np.asarray(lengths)
    if valid.shape != (B,) or valid.min() < 1 or valid.max() > T:
        raise ConfigError("lengths", valid.tolist(), f"expected a length from 1 to {T} for each of the {B} rows")
    policy = policies.of(policy) if isinstance(policy, str) else policy
    if policy is not None:
        policy.check(served_layers(model))
    settings = (float(temperature), float(top_p))
    return _stream(model, prompt, valid, max_new_tokens, settings, seed, stop, policy, landmarks)


def known_landmarks(model: LM, given: Landmarks | None = None) -> Landmarks | None:
    """`given`, or the landmarks that the model's layers expect, if any do.

    Raises:
      ConfigError: layers expect others, or a prefix, which `data.landmark_every` does not train either.
    """
    expected = {section for layer in resolve(model.cfg) for section in sections(layer.mix)}
    found = given or (Landmarks(min(expected), model.vocabulary - 1) if expected else None)
    if found is None:
        return None
    if expected - {found.every}:
        raise ConfigError("landmarks", found.every, f"expected {max(expected)}, the section of landmark layers")
    if not 0 <= found.token < model.vocabulary:
        raise ConfigError("landmarks", found.token, f"expected an id below {model.vocabulary}")
    if prefix := model.cfg.prefix.meta_tokens:
        raise ConfigError("model.prefix.meta_tokens", prefix, "expected 0 with landmarks")
    return found


def stream_text(
    model: LM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    policy: str | Policy | None = None,
    landmark_every: int = 0,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of whole characters, up to the end of the document.

    An empty prompt starts a new document. `landmark_every` is that of the data that the model was trained on.
    """
    start = tokenizer.encode(prompt) if prompt else np.array([tokenizer.bos])
    ids = stream(
        model,
        start[None],
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tokenizer.eos,
        policy=policy,
        landmarks=landmarks_of(landmark_every, tokenizer),
    )
    text = TextStream(tokenizer)
    for token in ids:
        if token[0] == tokenizer.eos:
            break
        if piece := text.push(int(token[0])):
            yield piece


def check_settings(temperature: float, top_p: float, path: str = "") -> None:
    """Raises `ConfigError`, its key below `path`, for settings out of range."""
    if not 0 <= temperature < float("inf"):
        error = ConfigError("temperature", temperature, "expected a number >= 0 (0 takes the most likely token)")
        raise error.under(path)
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "expected a number above 0 and at most 1").under(path)


def write_sample(model: LM, data: "Source", cfg: "RunConfig", workdir: str | pathlib.Path) -> None:
    """Continues `sample.prompt`, prints the text and writes it to `sample.txt` in the run folder.

    Nothing for tasks.
    """
    s = cfg.sample
    if not s.tokens or not isinstance(data, Data):
        return
    pieces = stream_text(
        model,
        data.tokenizer,
        s.prompt,
        tokens=s.tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=cfg.train.seed,
        landmark_every=data.landmark_every,
    )
    text = s.prompt + "".join(pieces)
    if jax.process_index() == 0:
        pathlib.Path(workdir, "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)


def _stream(
    model: LM,
    prompt: Array,
    lengths: np.ndarray,
    count: int,
    settings: Settings,
    seed: int,
    stop: int | None,
    policy: Policy | None,
    landmarks: Landmarks | None,
) -> Iterator[np.ndarray]:
    graph, params = nnx.split(model)
    structure = _Structure(graph, policy, None if landmarks is None else landmarks.token)
    key = jax.random.key(seed)
    end = jnp.int32(-1 if stop is None else stop)
    max_len = prompt.shape[1] + count
    if landmarks is not None:
        prompt, lengths = jnp.asarray(landmarks.lay(np.asarray(prompt))), landmarks.places(max_len)[lengths - 1] + 1
        max_len = int(landmarks.places(max_len)[-1]) + 1
    token, cache = _prefill(
        structure, params, prompt, jnp.asarray(lengths), max_len, settings, jax.random.fold_in(key, 0)
    )
    for i in range(1, count):
        if landmarks is not None:
            due = landmarks.due(lengths)  # where the token will stand behind a landmark
            cache = _mark(structure, params, cache, jnp.asarray(due)) if due.any() else cache
            lengths = lengths + due + 1
        following, cache = _step(structure, params, token, cache, end, settings, jax.random.fold_in(key, i))
        yield np.asarray(token)  # fetched after the next step is on its way
        if stop is not None and np.all(np.asarray(token) == stop):
            return
        token = following
    yield np.asarray(token)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    structure: _Structure, params: PyTree, prompt: Array, lengths: Array, max_len: int, settings: Settings, key: Array
) -> tuple[Array, PyTree]:
    model = structure.merge(params)
    cache: Any = model.init_cache(prompt.shape[0], max_len, params["embed"]["weight"][...].dtype)
    real = jnp.arange(prompt.shape[1]) < lengths[:, None]
    logits, cache = model.prefill(prompt, cache, segment_ids=real.astype(jnp.int32))
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _choose(structure.sayable(last), settings, key), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    structure: _Structure, params: PyTree, token: Array, cache: PyTree, stop: Array, settings: Settings, key: Array
) -> tuple[Array, PyTree]:
    logits, cache = structure.merge(params).step(token, cache)
    return jnp.where(token == stop, stop, _choose(structure.sayable(logits), settings, key)), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _mark(structure: _Structure, params: PyTree, cache: PyTree, due: Array) -> PyTree:
    """The cache after a landmark in the rows where one is due; to the others the step is padding."""
    assert structure.landmark is not None
    tokens = jnp.full((due.shape[0], 1), structure.landmark, jnp.int32)
    return structure.merge(params).prefill(tokens, cache, segment_ids=due[:, None].astype(jnp.int32))[1]


def _choose(logits: Float[Array, "B vocab"], settings: Settings, key: Array) -> Int[Array, "B"]:
    """One token per row; the settings are traced, so that changing them compiles nothing."""
    temperature, top_p = settings
    warm = logits / jnp.where(temperature > 0, temperature, 1.0)
    p = jax.nn.softmax(warm, axis=-1)
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # mass of the likelier tokens; 0 for the first, which always stays
    kept = jnp.where((before < top_p) | (top_p >= 1), jnp.log(ranked), -jnp.inf)
    drawn = jnp.take_along_axis(order, jax.random.categorical(key, kept)[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
