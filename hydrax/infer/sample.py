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
from hydrax.data.loader import Data
from hydrax.data.tokenizer import TextStream, Tokenizer
from hydrax.infer import policy as policies
from hydrax.infer.policy import Policy
from hydrax.infer.policy.serve import Served, served_layers
from hydrax.models.lm import LM
from hydrax.models.mix import landmarks
from hydrax.models.spec import resolve

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

    def __hash__(self) -> int:
        return hash((len(self.graph.nodes), self.policy))

    def merge(self, params: PyTree) -> LM | Served:
        """What makes a cache, reads a prompt and takes steps."""
        model = nnx.merge(self.graph, params)
        return model if self.policy is None else Served(model, self.policy)


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
) -> Int[np.ndarray, "B N"]:
    """Continuations int32 [B,N] of the prompts `tokens` [B,T], N = max_new_tokens.

    Args:
      temperature: 0 takes the most likely token.
      top_p: nucleus; 1 keeps every token.
      stop: a row that has produced this token goes on with it.
      lengths: real tokens of each row [B] where prompts differ in length; the rest of a row is padding.
      policy: which keys softmax layers read, see `infer.policy`: another function than the one that was trained.

    Raises:
      ConfigError: a value out of its range, no prompt, or a policy that does not suit the model.
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
) -> Iterator[Int[np.ndarray, "B"]]:
    """`generate` token by token: int32 [B] at a time, ending early when every row has stopped."""
    if any(landmarks(layer.mix) for layer in resolve(model.cfg)):
        raise ConfigError("model.pattern", model.cfg.pattern, "landmark layers: generation does not put landmarks yet")
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
    return _stream(model, prompt, valid, max_new_tokens, (float(temperature), float(top_p)), seed, stop, policy)


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
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of whole characters, up to the end of the document.

    An empty prompt starts a new document.
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

    Nothing for tasks, and for data with landmarks, which `stream` does not serve.
    """
    s = cfg.sample
    if not s.tokens or not isinstance(data, Data) or data.landmark_every:
        return
    pieces = stream_text(
        model,
        data.tokenizer,
        s.prompt,
        tokens=s.tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=cfg.train.seed,
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
) -> Iterator[np.ndarray]:
    graph, params = nnx.split(model)
    structure = _Structure(graph, policy)
    key = jax.random.key(seed)
    end = jnp.int32(-1 if stop is None else stop)
    token, cache = _prefill(
        structure, params, prompt, jnp.asarray(lengths), prompt.shape[1] + count, settings, jax.random.fold_in(key, 0)
    )
    for i in range(1, count):
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
    return _choose(last, settings, key), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    structure: _Structure, params: PyTree, token: Array, cache: PyTree, stop: Array, settings: Settings, key: Array
) -> tuple[Array, PyTree]:
    logits, cache = structure.merge(params).step(token, cache)
    return jnp.where(token == stop, stop, _choose(logits, settings, key)), cache


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
