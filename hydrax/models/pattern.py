"""The grammar of hybrids: from one line of text to a name per layer.

    pattern := term {"," term}         term := [int "*"] (name | "(" pattern ")" | helper | layer | loop)
    every(r, lin, full, phase=r)       full at i % (r+1) == phase (the last layer if there is none), lin elsewhere
    bookend(n, full, lin)              full in the first and last n layers
    select([i, ...], full, lin)        full at these indices
    fill(pattern, L)                   pattern repeated and cut to L layers
    heads(2*attn, 6*gdn)               one layer whose heads are of several kinds; attn[0,5] says which heads
    parallel(attn, mamba)              one layer whose parts read the same input
    modes(gdn)                         one layer that reads every token by its recurrence or by attention
    route(attn, swa)                   one layer that is one or the other for a whole document
    loop(n, pattern)                   these layers n times, with one set of parameters; not inside of anything else
Helpers without a count take the depth from `num_layers`. A name is a registered mixer or a block of `blocks`.
"""

import ast
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from hydrax.core.build import ConfigError

MAX_LAYERS = 10_000
"""No pattern expands beyond this: a mistyped count should not fill the memory."""

COMPOSITIONS = ("heads", "parallel", "modes", "route")
"""Ways to make one layer of several mixers."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Layers that follow one another, run `loops` times; None: as often as the model says."""

    names: tuple[str, ...]
    loops: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """One argument of a composition: a name or another composition, its number of heads or which heads they are."""

    expression: str
    count: int | None = None
    indices: tuple[int, ...] | None = None


def expand(pattern: str, num_layers: int | None = None, key: str = "pattern") -> list[str]:
    """The names of a pattern, one per layer, whatever is looped."""
    return [name for stretch in stretches(pattern, num_layers, key) for name in stretch.names]


def stretches(pattern: str, num_layers: int | None = None, key: str = "pattern") -> list[Stretch]:
    """The layers of a pattern, cut where loops begin and end.

    Raises:
      ConfigError: text that does not parse, or breaks a rule; it names `key`.
    """
    try:
        body = ast.parse(pattern.strip(), mode="eval").body
        terms = body.elts if isinstance(body, ast.Tuple) else [body]
        found = [_stretch(term, num_layers) for term in terms]
    except SyntaxError as error:
        raise ConfigError(key, pattern, _misread(error, "'2*(3*gdn,attn)'")) from None
    except (_PatternError, RecursionError) as error:
        raise ConfigError(key, pattern, str(error)) from None
    joined = []
    for loops, run in itertools.groupby(found, lambda s: s.loops):
        if loops is None:
            joined.append(Stretch(tuple(itertools.chain.from_iterable(s.names for s in run))))
        else:
            joined += run
    if not any(s.names for s in joined):
        raise ConfigError(key, pattern, "expected at least one layer, e.g. '2*(3*gdn,attn)'")
    if sum(len(s.names) for s in joined) > MAX_LAYERS:
        raise ConfigError(key, pattern, f"expected at most {MAX_LAYERS} layers")
    return [s for s in joined if s.names]


def composition(expression: str) -> tuple[str, list[Part]] | None:
    """The kind and the parts of a composition, None for a plain name.

    Raises:
      ConfigError: text that is neither; it names `mixer`.
    """
    try:
        node = ast.parse(expression.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMPOSITIONS:
            return node.func.id, _parts(node)
        raise _PatternError(f"expected a name or one of {', '.join(f'{c}(...)' for c in COMPOSITIONS)}")
    except SyntaxError as error:
        raise ConfigError("mixer", expression, _misread(error, "'heads(2*gdn, attn)'")) from None
    except (_PatternError, RecursionError) as error:
        raise ConfigError("mixer", expression, str(error)) from None


def _misread(error: SyntaxError, example: str) -> str:
    return f"{error.msg} at character {error.offset}; expected names and helpers, e.g. {example}"


class _PatternError(ValueError):
    """A pattern that parses but means nothing; `stretches` adds the pattern itself."""


def _stretch(node: ast.expr, depth: int | None) -> Stretch:
    match node:
        case ast.Call(func=ast.Name(id="loop"), args=[ast.Constant(value=int(n)), *terms], keywords=[]) if n >= 1:
            return Stretch(tuple(_bounded(_walk(term, depth) for term in terms)), n)
        case ast.Call(func=ast.Name(id="loop")):
            raise _PatternError(f"cannot read {ast.unparse(node)!r}; expected {_usage('loop')}")
    return Stretch(tuple(_walk(node, depth)))


def _walk(node: ast.expr, depth: int | None) -> list[str]:
    """The grammar happens to be a subset of Python's expressions, so Python parses it."""
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Tuple(elts=terms):
            return _bounded(_walk(term, depth) for term in terms)
        case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int(n)), right=term) if n >= 1:
            return _bounded(itertools.repeat(_walk(term, depth), n))
        case ast.Call(func=ast.Name(id=kind)) if kind in COMPOSITIONS:
            _parts(node)
            return [ast.unparse(node).replace(" ", "")]
        case ast.Call(func=ast.Name(id="loop")):
            raise _PatternError("loop(...) stands beside other terms, not inside of them")
        case ast.Call(func=ast.Name(id=helper), args=args, keywords=keywords) if helper in _HELPERS:
            values = [_argument(a, depth) for a in args]
            named = {k.arg or "**": _argument(k.value, depth) for k in keywords}
            try:
                found = _HELPERS[helper](depth, *values, **named)
                if not all(isinstance(name, str) for name in found):
                    raise TypeError("numbers in place of names")
            except TypeError:
                raise _PatternError(f"cannot read {ast.unparse(node)!r}; expected {_usage(helper)}") from None
            return found
    known = ", ".join([*_HELPERS, *COMPOSITIONS, "loop"])
    raise _PatternError(f"cannot read {ast.unparse(node)!r}; expected names, n*(...), or {known}")


def _parts(node: ast.Call) -> list[Part]:
    if node.keywords or not node.args:
        raise _PatternError(f"cannot read {ast.unparse(node)!r}; expected {_usage(ast.unparse(node.func))}")
    return [_part(argument) for argument in node.args]


def _part(node: ast.expr) -> Part:
    match node:
        case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int(n)), right=ast.Name(id=name)) if n >= 1:
            return Part(name, count=n)
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            items = index.elts if isinstance(index, ast.Tuple) else [index]
            if len(numbers := _integers(items)) == len(items):
                return Part(name, indices=tuple(numbers))
        case ast.Name(id=name):
            return Part(name)
        case ast.Call(func=ast.Name(id=kind)) if kind in COMPOSITIONS:
            _parts(node)
            return Part(ast.unparse(node).replace(" ", ""))
    raise _PatternError(f"cannot read the part {ast.unparse(node)!r}; expected name, n*name, name[i,...] or a layer")


def _integers(nodes: list[ast.expr]) -> list[int]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and type(node.value) is int]


def _usage(helper: str) -> str:
    return next(line.strip() for line in __doc__.splitlines() if line.strip().startswith(f"{helper}("))


def _bounded(pieces: Any) -> list[str]:
    result = list(itertools.islice(itertools.chain.from_iterable(pieces), MAX_LAYERS + 1))
    if len(result) > MAX_LAYERS:
        raise _PatternError(f"expected at most {MAX_LAYERS} layers")
    return result


def _argument(node: ast.expr, depth: int | None) -> Any:
    match node:
        case ast.Constant(value=int(n)):
            return n
        case ast.List(elts=items) if len(numbers := _integers(items)) == len(items):
            return numbers
    return _walk(node, depth)


def _depth(depth: int | None) -> int:
    if depth is None:
        raise _PatternError("a helper without a count needs num_layers")
    return depth


def _every(depth: int | None, r: int, lin: list[str], full: list[str], phase: int | None = None) -> list[str]:
    at = r if phase is None else phase
    chosen = [i for i in range(_depth(depth)) if i % (r + 1) == at] or [_depth(depth) - 1]
    return _select(depth, chosen, full, lin)


def _bookend(depth: int | None, n: int, full: list[str], lin: list[str]) -> list[str]:
    L = _depth(depth)
    return _select(depth, [i for i in range(L) if i < n or i >= L - n], full, lin)


def _select(depth: int | None, indices: list[int], full: list[str], lin: list[str]) -> list[str]:
    L = _depth(depth)
    outside = [i for i in indices if not 0 <= i < L]
    if outside:
        raise _PatternError(f"layer {outside[0]} does not exist among {L} layers")
    return [name for i in range(L) for name in (full if i in indices else lin)]


def _fill(depth: int | None, names: list[str], count: int | None = None) -> list[str]:
    return list(itertools.islice(itertools.cycle(names), min(count or _depth(depth), MAX_LAYERS)))


_HELPERS: dict[str, Callable[..., list[str]]] = {
    "every": _every,
    "bookend": _bookend,
    "select": _select,
    "fill": _fill,
}
