"""`linear_attention` with vector decays on Hopper GPUs: forward and backward as Pallas kernels.

In a chunk of C = 64 tokens, G_i is the log-decay from its beginning to token i, a vector over K like q and k, and
products of such vectors are taken by element. With references r, also vectors over K, and

    q̃_i = scale e^{G_i} q_i,    k̂_j = e^{r - G_j} k_j,    A_ij = scale Σ_d q_id k_jd e^{G_id - G_jd}  for j <= i, else 0

the chunk reads and writes the state S, and its gradient dS on the way back, by

    o_i  = Σ_j A_ij v_j + Sᵀ q̃_i                                        S  ← e^{G_C - r} (e^r S + Σ_j k̂_j v_jᵀ)
    dv_j = Σ_i A_ij do_i + (e^{G_C - r} dS)ᵀ k̂_j                        dS ← e^{G_C} dS + Σ_i q̃_i do_iᵀ
    dq_i = scale e^{G_i} (Σ_j W_ij e^{-G_j} k_j + S do_i)               W_ij = do_i·v_j  for j <= i, else 0
    dk_j = e^{-G_j} (Σ_i W_ij q̃_i + e^{G_C} dS v_j)
    dg_t = <S, dS>_v - Σ_{i<t} (q_i dq_i - k_i dk_i)                    dS after its update; i in the chunk

Documents leave out what crosses their borders, and token t has <S, dS> only if it reads S.

Where G_C >= `LEAST` in all channels of a warpgroup, A and both sums over W are single products of q̃ and k̂ for r = 0.
Elsewhere e^{-G} may overflow: then r = G_C, and pairs of tokens meet by levels l = 0..5, in which those of the upper
half of every block of 2^{l+1} tokens, q_i, look at those of its lower half, k_j. Both are weighed with the decay from
or to the end of the lower half, itself a sum of the log-decays in between: no exponent is positive, nothing cancels.
The rounded factors that form q_i dq_i are those of k_j dk_j, so that what cancels in dg cancels exactly.

The state S before every chunk is kept for the backward pass, in bf16.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from hydrax.core.numerics import clamp_decay
from hydrax.core.typing import Array, PyTree
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.pallas import chunks, compat, ring, tiles
from hydrax.ops.pallas.chunks import KEEP, READER, READS, WRITER, WRITES
from hydrax.ops.pallas.tiles import BLOCK, per_column, per_row
from hydrax.ops.pallas.tuning import Tuning

LEAST = -64.0
"""The log-decay of a chunk above which e^{-G} and sums of products with it are far from overflow."""
LEVELS = 6
ROWS = ("o", "dq", "dk", "dv", "dg")


def padded(
    scale: float, tuning: Tuning, q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array | None
) -> tuple[Array, Array]:
    """o [B,T,Hv,V] and the final state [B,Hv,K,V] of q, k, g [B,T,H,K], v [B,T,Hv,V], S [B,Hv,K,V]."""
    (B, T), (Hv, V) = q.shape[:2], v.shape[2:]
    parts = chunks.parts_of(V)
    g = g if g.dtype == jnp.bfloat16 else g.astype(jnp.float32)
    x = (chunks.pad_tokens(x) for x in (q, k, v.reshape(B, T, Hv * parts, -1), g, seg))
    o, S = _fused(scale, tuning, *x, chunks.apart(S, parts))
    return o[:, :T].reshape(B, T, Hv, V), chunks.together(S, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(scale: float, tuning: Tuning, *inputs: Any) -> tuple[Array, Array]:
    return _run_forward(scale, tuning, False, *inputs)[:2]


def _run_forward(
    scale: float, tuning: Tuning, keep: bool, q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array | None
) -> tuple[Array, Array, Array | None]:
    """o, the final state, and if asked for the states before the chunks."""
    n, facts = chunks.segments(v, tuning), _facts(seg)
    starts, end = _segment_states("k", "v", {"k": k, "v": v, "g": g}, facts, S, n, tuning, scale)
    wanted = ("o", *(("Z",) if n == 1 else ()), *(("kept",) if keep else ()))
    found = sweep(_forward_chunk, {"q": q, "k": k, "v": v, "g": g}, facts, starts, wanted, n, tuning, scale)
    return found["o"], found["Z"] if end is None else end, found.get("kept")


def _forward(scale: float, tuning: Tuning, *inputs: Any) -> tuple[tuple, tuple]:
    inputs = custom_vjp_primal_tree_values(inputs)
    o, final, kept = checkpoint_name(_run_forward(scale, tuning, True, *inputs), KERNEL)
    return (o, final), (*inputs, kept)


def _backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, g, seg, S, kept = saved
    do, dS = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    n, facts = chunks.segments(v, tuning), _facts(seg)
    ends, dS0 = _segment_states("q", "do", {"q": q, "do": do, "g": g}, facts, dS, n, tuning, scale, reverse=True)
    rows = {"q": q, "k": k, "v": v, "g": g, "do": do, "kept": kept}
    wanted = ("dq", "dk", "dv", "dg", *(("Z",) if n == 1 and S is not None else ()))
    found = sweep(_backward_chunk, rows, facts, ends, wanted, n, tuning, scale, reverse=True)
    dq, dk, dg = (chunks.ungroup(found[name], x) for name, x in (("dq", q), ("dk", k), ("dg", g)))
    return dq, dk, found["dv"], dg, None, None if S is None else found.get("Z", dS0)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _facts(seg: Array | None) -> Array | None:
    """What documents mean in each chunk, for all heads, as `chunks.chunk_facts` [B,N,1,6,C]."""
    return None if seg is None else chunks.chunk_facts(jnp.zeros((*seg.shape, 1)), seg, 1.0)


def _segment_states(
    u: str,
    c: str,
    rows: dict[str, Array],
    facts: Array | None,
    Z: Array | None,
    n: int,
    tuning: Tuning,
    scale: float,
    *,
    reverse: bool = False,
) -> tuple[Array | None, Array | None]:
    """The states before the n segments of every row [B·n,Hv,K,V], and the final one; for one segment, `Z` and None."""
    if n == 1:
        return Z, None
    step = functools.partial(_state_chunk, u, c)
    found = sweep(step, rows, facts, None, ("Z", "decays"), n, tuning, scale, reverse=reverse)
    updates, keep = (x.reshape(-1, n, *x.shape[1:]) for x in (found["Z"], found["decays"].prod(1)))
    return chunks.carry_segments(updates, keep, Z, reverse=reverse)


def sweep(
    step: Callable,
    rows: dict[str, Array],
    facts: Array | None,
    Z: Array | None,
    wanted: Sequence[str],
    n: int,
    tuning: Tuning,
    scale: float,
    *,
    reverse: bool = False,
) -> dict[str, Array]:
    """`step` over all chunks of every row, cut in n segments, the states before which are `Z` [B·n,Hv,K,V].

    Returns what is wanted: "o", "dv" [B,T,Hv,V], "dq", "dk", "dg" [B,T,Hv,K], the states "Z" after each segment, those
    before each chunk, "kept" [B·n,N,Hv,K,V], and what each chunk leaves of them, "decays" [B·n,N,Hv,K].
    """
    B, T, _, K = rows["g"].shape
    values = rows["v"] if "v" in rows else rows["do"]
    Hv, V = values.shape[2:]
    inputs = rows if facts is None else rows | {"facts": facts}
    inputs = {name: x if name == "kept" else x.reshape(B * n, -1, *x.shape[2:]) for name, x in inputs.items()}
    N, workers, low = T // n // BLOCK, K // BLOCK, values.dtype

    def wanted_as(name: str) -> jax.ShapeDtypeStruct:
        shape, dtype = {
            "Z": ((Hv, K, V), jnp.float32),
            "kept": ((N, Hv, K, V), low),
            "decays": ((N, Hv, K), jnp.float32),
            "dg": ((T // n, Hv, K), rows["g"].dtype),
        }.get(name) or ((T // n, Hv, K if name in ("dq", "dk") else V), low)
        return jax.ShapeDtypeStruct((B * n, *shape), dtype)

    # In shared memory a chunk is blocks of 64 columns of rows, blocks of the kept state, facts.
    blocks = {"kept": (workers, V // BLOCK)} | {name: (x.shape[3] // BLOCK,) for name, x in rows.items() if x.ndim == 4}
    sizes = {name: (*blocks[name], *tiles.SQUARE) for name in rows}
    states = V // BLOCK if "kept" in rows else 0
    moving = sum(math.prod(sizes[name]) * x.dtype.itemsize for name, x in rows.items())
    vectors = 8 + (0 if facts is None else WRITER + 1)  # some for reductions and barriers
    stages = tuning.stages_of(moving // (2 * BLOCK**2), workers * (3 + states) + 1, vectors)
    copies = sum(math.prod(blocks[name]) for name in rows) + (facts is not None)
    found = compat.launch(
        functools.partial(_body, step, scale, reverse),
        (inputs, Z),
        {name: wanted_as(name) for name in wanted},
        scratch={
            "slots": {name: tiles.scratch(rows[name].dtype, stages, *size) for name, size in sizes.items()}
            | ({} if facts is None else {"facts": plgpu.SMEM((stages, *facts.shape[3:]), jnp.float32)}),
            "pair": tiles.scratch(low, workers, 2, *tiles.SQUARE),
            "tile": tiles.scratch(low, workers, *tiles.SQUARE),
            "vector": plgpu.SMEM((workers, BLOCK), jnp.float32),
            **({"states": tiles.scratch(low, workers, states, *tiles.SQUARE)} if states else {}),
            "ones": tiles.scratch(low, *tiles.SQUARE),
            "met": plgpu.Barrier(num_arrivals=workers, num_barriers=2),
            **ring.barriers(stages, copies, workers),
        },
        grid={"h": Hv, "b": B * n},
        warpgroups=workers + 1,
    )
    return {name: x.reshape(B, T, *x.shape[2:]) if name in ROWS else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Here:
    """What a warpgroup finds in a chunk: it owns a block of 64 keys, and shares the columns of values with others."""

    w: Array
    workers: int
    scale: float
    place: tuple  # row, chunk and value head
    x: Mapping[str, PyTree]
    outputs: Mapping[str, PyTree]
    pairs: PyTree
    pair: PyTree
    tile: PyTree
    vector: PyTree
    ones: PyTree
    met: PyTree
    states: PyTree = None

    @property
    def tokens(self) -> PyTree:
        return pl.ds(self.place[1] * BLOCK, BLOCK)

    @property
    def columns(self) -> list[Array]:
        """The own blocks of values; if there are fewer blocks than warpgroups, some have the same."""
        blocks = self.x["v"].shape[0]
        return [jax.lax.rem(self.w + i, jnp.int32(blocks)) for i in range(0, blocks, self.workers)]

    @property
    def others(self) -> list[Array]:
        return [jax.lax.rem(self.w + i, jnp.int32(self.workers)) for i in range(1, self.workers)]

    def keys(self, name: str, w: Array | int | None = None) -> PyTree:
        """[64,64]: the own channels of q, k or g, or those of another."""
        return self.x[name].at[self.w if w is None else w]

    def values(self, name: str) -> list[PyTree]:
        """[64,64] for every block of columns of v or do."""
        return [self.x[name].at[c] for c in range(self.x[name].shape[0])]

    def kept(self) -> list[PyTree]:
        """The own rows of the state before the chunk."""
        return [self.x["kept"].at[self.w, c] for c in range(self.x["kept"].shape[1])]

    def fact(self, which: int) -> PyTree:
        return self.x["facts"].at[which]

    def masked(self, x: Array, which: int) -> Array:
        """Rows of x, without those that a fact of documents excludes."""
        return x * per_row(self.fact(which)) if "facts" in self.x else x

    def mask(self, ref: PyTree, which: int) -> None:
        """The same in place."""
        if "facts" in self.x:
            plgpu.commit_smem()
            ref[...] = self.masked(tiles.load(ref), which).astype(ref.dtype)

    @property
    def keep(self) -> Array | float:
        return self.x["facts"][KEEP, 0] if "facts" in self.x else 1.0

    def allowed(self, *, future: bool = False) -> Array:
        """Entries (i, j), j <= i in one document; `future`: their transpose."""
        row, column = tiles.index(0), tiles.index(1)
        found = row <= column if future else row >= column
        if "facts" in self.x:
            own, other = (WRITER, READER) if future else (READER, WRITER)
            found &= per_row(self.fact(own)) == per_column(self.fact(other))
        return found

    def meet(self, phase: int) -> None:
        """Waits for the others; what was stored before can be read, and what was read before can be overwritten."""
        plgpu.commit_smem()
        if self.workers > 1:
            plgpu.barrier_arrive(self.met.at[phase])
            plgpu.barrier_wait(self.met.at[phase])

    def together(self) -> Array | bool:
        """Entries (i, j) of one document."""
        if "facts" not in self.x:
            return True
        return per_row(self.fact(READER)) == per_column(self.fact(READER))

    def exchanged(self, scores: Array, *, future: bool) -> Array:
        """All scores, of the own channels and of those of others, as left factors; the gates leave their place."""
        if self.workers > 1:
            own = self.keys("g")
            own[...] = scores.astype(own.dtype)
        self.meet(0)
        for w in self.others:
            scores += tiles.load(self.keys("g", w))
        return _select(self.allowed(future=future), scores, self.tile.dtype)


def _body(
    step: Callable,
    scale: float,
    reverse: bool,
    refs: tuple,
    outputs: dict[str, PyTree],
    *,
    slots: dict[str, PyTree],
    pair: PyTree,
    tile: PyTree,
    vector: PyTree,
    full: PyTree,
    free: PyTree,
    **shared: PyTree,
) -> None:
    """One thread block: a (segment of a) row and a value head; the last warpgroup loads chunks, the others work."""
    inputs, states = refs
    b, h, wg = (jax.lax.axis_index(name) for name in ("b", "h", "wg"))
    values = "v" if "v" in inputs else "do"
    stages, workers = slots["g"].shape[:2]
    N, Hv, V = inputs["g"].shape[1] // BLOCK, inputs[values].shape[2], slots[values].shape[1]

    def index(n: Array) -> Array:
        return N - 1 - n if reverse else n

    def fetch(n: Array, slot: Array, full: PyTree) -> None:
        for name, x in inputs.items():
            head = jax.lax.div(h, jnp.int32(Hv // x.shape[2]))
            chunk = pl.ds(index(n) * BLOCK, BLOCK) if len(x.shape) == 4 else index(n)
            source, target = x.at[b, chunk, head], slots[name].at[slot]
            if name == "facts":
                plgpu.copy_gmem_to_smem(source, target, full)
            for block in itertools.product(*map(range, target.shape[:-2])) if name != "facts" else ():
                columns = tiles.block(block[-1])
                rows = (tiles.block(block[0]) if name == "kept" else slice(None), columns)
                plgpu.copy_gmem_to_smem(source.at[rows], target.at[block], full)

    @pl.when(wg < workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(232, action="increase")
        shared["ones"][...] = (tiles.zeros() + 1.0).astype(tile.dtype)  # everyone stores the same

        def chunk(n: Array, slot: Array, Z: list) -> list:
            x = {name: ref.at[slot] for name, ref in slots.items()}
            own = pair.at[wg], tile.at[wg], vector.at[wg]
            return step(Here(wg, workers, scale, (b, index(n), h), x, outputs, pair, *own, **shared), Z)

        places = [(b, h, tiles.block(wg), tiles.block(c)) for c in range(V)]
        Z = [tiles.zeros() if states is None else tiles.load(states.at[at]) for at in places]
        Z = ring.work(chunk, Z, N, stages, full, free)
        if "Z" in outputs:
            for at, z in zip(places, Z, strict=True):
                outputs["Z"][at] = z
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        ring.load(fetch, N, stages, full, free)


def _gates(here: Here) -> list[PyTree]:
    """The log-decays of the own channels as a sum of bf16 matrices in shared memory, of which sums are products."""
    g = clamp_decay(tiles.load(here.keys("g")))
    if "facts" in here.x:
        g = jnp.where(per_row(here.fact(READER)) >= 0, g, 0.0)  # padding leaves the state alone
    terms = _split(g, here.pair)
    return terms[:1] if here.x["g"].dtype == terms[0].dtype else terms


def _split(x: Array, pair: PyTree) -> list[PyTree]:
    """x as the sum of two bf16 matrices, to 2^-17 of its entries."""
    high = x.astype(pair.dtype)
    pair.at[0][...] = high
    pair.at[1][...] = (x - high.astype(x.dtype)).astype(pair.dtype)
    plgpu.commit_smem()
    return [pair.at[0], pair.at[1]]


def _sums(which: Array, terms: Sequence[PyTree]) -> Array:
    """Σ_t which_it x_t for every row i."""
    which = jnp.where(which, 1.0, 0.0).astype(terms[0].dtype)
    return tiles.mm(*((which, term) for term in terms))


def _until(terms: Sequence[PyTree]) -> Array:
    """G: the log-decay from the beginning of the chunk to each token."""
    return _sums(tiles.index(0) >= tiles.index(1), terms)


def _after(terms: Sequence[PyTree]) -> Array:
    """G_C - G: the log-decay from each token to the end of the chunk."""
    return _sums(tiles.index(0) < tiles.index(1), terms)


def _total(here: Here, terms: Sequence[PyTree]) -> Array:
    """G_C [64], one value per channel as the rows of a state have them."""
    ones = compat.transpose(here.ones.at[pl.ds(0, 8)])
    return tiles.mm(*((compat.transpose(term), ones) for term in terms), columns=8).max(1)


def _weigh(ref: PyTree, factor: Array) -> None:
    ref[...] = (tiles.load(ref) * factor).astype(ref.dtype)


def _is_direct(here: Here, G: Array) -> Array:
    """Whether e^{-G} is safe."""
    here.vector[...] = G.min(1)
    plgpu.commit_smem()
    return here.vector[BLOCK - 1] >= LEAST


def _level(here: Here, terms: Sequence[PyTree], n: Array) -> tuple[Array, Array, Array]:
    """Puts the weighed rows of a level into the tile, q where they look and k where they are looked at.

    Returns the mask of the rows that look, that of all pairs of the level (i, j) and (j, i), and the weights.
    """
    row, column = tiles.index(0), tiles.index(1)
    half = jnp.left_shift(jnp.int32(1), n)
    looks, apart = (row & half) != 0, row ^ column
    between = (apart < half) & jnp.where(looks, column <= row, column > row)
    weight = jnp.exp(_sums(between, terms))
    rows = jnp.where(looks, tiles.load(here.keys("q")) * here.scale, tiles.load(here.keys("k"))) * weight
    plgpu.commit_smem()
    here.tile[...] = rows.astype(here.tile.dtype)
    plgpu.commit_smem()
    return looks, (apart >= half) & (apart < 2 * half), weight


def _state_chunk(u: str, c: str, here: Here, Z: list) -> list:
    """Only Z: S by k and v, or dS by q and do."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    terms, rows = _gates(here), here.keys(u)
    decay = here.keep * jnp.exp(_total(here, terms))
    here.vector[...] = decay
    _weigh(rows, jnp.exp(_after(terms)) if u == "k" else here.scale * jnp.exp(_until(terms)))
    here.mask(rows, WRITES if u == "k" else READS)
    plgpu.commit_smem()
    b, n, h = here.place
    plgpu.copy_smem_to_gmem(here.vector, here.outputs["decays"].at[b, n, h, tiles.block(here.w)])
    Z = [tiles.spread(decay) * z for z in Z]
    return list(tiles.acc_mm(Z, [(compat.transpose(rows), x) for x in here.values(c)]))


def _forward_chunk(here: Here, S: list) -> list:
    """o of the own columns, and the own rows of S after the chunk."""
    b, n, h = here.place
    if "kept" in here.outputs:
        plgpu.wait_smem_to_gmem(len(here.columns), wait_read_only=True)  # all but o
    terms = _gates(here)
    G, total = _until(terms), _total(here, terms)
    direct = _is_direct(here, G)
    q, k, v = here.keys("q"), here.keys("k"), here.values("v")

    def at_once() -> Array:
        _weigh(q, here.scale * jnp.exp(G))
        _weigh(k, jnp.exp(-G))
        plgpu.commit_smem()
        return tiles.mm((q, compat.transpose(k)))

    def by_levels() -> Array:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def level(n: Array, scores: Array) -> Array:
            _, pairs, _ = _level(here, terms, n)
            return scores + jnp.where(pairs & _past(), tiles.mm((here.tile, compat.transpose(here.tile))), 0.0)

        diagonal = jnp.where(_same(), tiles.mm((q, compat.transpose(k))) * here.scale, 0.0)
        scores = jax.lax.fori_loop(0, LEVELS, level, diagonal)
        plgpu.commit_smem()
        _weigh(q, here.scale * jnp.exp(G))
        _weigh(k, jnp.exp(_after(terms)))
        return scores

    scores = jax.lax.cond(~direct, by_levels, at_once)
    here.mask(k, WRITES)
    plgpu.commit_smem()
    for c, block in enumerate(S):
        here.pair.at[c][...] = block.astype(here.pair.dtype)
    scores = here.exchanged(scores, future=False)
    if "kept" in here.outputs:
        for c in range(len(S)):
            target = here.outputs["kept"].at[b, n, h, tiles.block(here.w), tiles.block(c)]
            plgpu.copy_smem_to_gmem(here.pair.at[c], target)

    reads = [tiles.mm(*((here.keys("q", w), here.pairs.at[w, c]) for w in range(here.workers))) for c in here.columns]
    before, after = _around(direct, total)
    products = [*((scores, here.x["v"].at[c]) for c in here.columns), *((compat.transpose(k), x) for x in v)]
    states = [here.keep * tiles.spread(before) * block for block in S]
    found = tiles.acc_mm([*(here.masked(x, READS) for x in reads), *states], products)
    for c, o in zip(here.columns, found, strict=False):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        here.tile[...] = o.astype(here.tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(here.tile, here.outputs["o"].at[b, here.tokens, h, tiles.block(c)])
    here.meet(1)
    return [tiles.spread(after) * block for block in found[len(here.columns) :]]


def _backward_chunk(here: Here, dS: list) -> list:
    """dq, dk and dg of the own channels, dv of the own columns, and the own rows of dS before the chunk."""
    b, _, h = here.place
    terms = _gates(here)
    G, total = _until(terms), _total(here, terms)
    direct = _is_direct(here, G)
    q, k, g, v, do, S = here.keys("q"), here.keys("k"), here.keys("g"), here.values("v"), here.values("do"), here.kept()
    low = here.tile.dtype
    _, after = _around(direct, total)
    for c, block in enumerate(dS):
        here.states.at[here.w, c][...] = (tiles.spread(after) * block).astype(low)
    plgpu.commit_smem()
    W = _select(here.allowed(), _against(do, v), low)
    Wt = _select(here.allowed(future=True), _against(v, do), low)

    def of_state() -> Array:
        return here.masked(_against(do, S), READS)

    def of_its_gradient() -> Array:
        return here.masked(_against(v, [here.states.at[here.w, c] for c in range(len(v))]), WRITES)

    def at_once() -> tuple[Array, ...]:
        _weigh(q, here.scale * jnp.exp(G))
        _weigh(k, jnp.exp(-G))
        plgpu.commit_smem()
        scores = tiles.mm((k, compat.transpose(q)))
        (dq,) = tiles.acc_mm([of_state()], [(W, k)])
        moments = tiles.load(q) * dq
        (dk,) = tiles.acc_mm([of_its_gradient()], [(Wt, q)])
        moments -= tiles.load(k) * dk
        return (here.scale * jnp.exp(G) * dq).astype(low), (jnp.exp(-G) * dk).astype(low), moments, scores

    def by_levels() -> tuple[Array, ...]:
        both = jnp.where(_past(), W, Wt)

        def level(n: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk, moments, scores = found
            looks, pairs, weight = _level(here, terms, n)
            seen = tiles.mm((_select(pairs, both, low), here.tile))
            scores += jnp.where(pairs & ~_past(), tiles.mm((here.tile, compat.transpose(here.tile))), 0.0)
            moments += jnp.where(looks, seen, -seen) * tiles.load(here.tile)
            seen *= weight
            return dq + jnp.where(looks, seen, 0.0), dk + jnp.where(looks, 0.0, seen), moments, scores

        own = _select(_same(), both, low)
        scores = jnp.where(_same(), tiles.mm((k, compat.transpose(q))) * here.scale, 0.0)
        dq, dk, moments = tiles.mm((own, k)), tiles.mm((own, q)) * here.scale, tiles.zeros()
        dq, dk, moments, scores = jax.lax.fori_loop(0, LEVELS, level, (dq, dk, moments, scores))
        plgpu.commit_smem()
        weight = jnp.exp(G)
        _weigh(q, here.scale * weight)
        found = of_state()
        moments += tiles.load(q) * found
        dq += weight * found
        weight = jnp.exp(_after(terms))
        _weigh(k, weight)
        found = of_its_gradient()
        dk += weight * found
        return (here.scale * dq).astype(low), dk.astype(low), moments - tiles.load(k) * found, scores

    dq, dk, moments, scores = jax.lax.cond(~direct, by_levels, at_once)
    here.mask(q, READS)
    plgpu.commit_smem()
    scores = here.exchanged(scores, future=True)
    dv = []
    for c in here.columns:
        read = tiles.mm(*((here.keys("k", w), here.states.at[w, c]) for w in range(here.workers)))
        (x,) = tiles.acc_mm([here.masked(read, WRITES)], [(scores, here.x["do"].at[c])])
        dv.append(x.astype(low))
    decay = tiles.spread(here.keep * jnp.exp(total))
    dS = list(tiles.acc_mm([decay * block for block in dS], [(compat.transpose(q), x) for x in do]))
    here.vector[...] = sum((tiles.load(s) * block).sum(1) for s, block in zip(S, dS, strict=True))
    split = _split(moments, here.pair)
    anchor = per_column(here.vector)
    dg = here.masked(anchor, READS) - _sums(_past() & here.together(), split)
    here.meet(1)

    own = [here.x["v"].at[c] for c in here.columns]
    places = (q, k, g, *own)
    for ref, gradient in zip(places, (dq, dk, dg.astype(g.dtype), *dv), strict=True):
        ref[...] = gradient
    plgpu.commit_smem()
    for name, x in (("dq", q), ("dk", k), ("dg", g)):
        plgpu.copy_smem_to_gmem(x, here.outputs[name].at[b, here.tokens, h, tiles.block(here.w)])
    for c, x in zip(here.columns, own, strict=True):
        plgpu.copy_smem_to_gmem(x, here.outputs["dv"].at[b, here.tokens, h, tiles.block(c)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return dS


def _against(left: Sequence[PyTree], right: Sequence[PyTree]) -> Array:
    """Σ left rightᵀ over blocks of columns."""
    return tiles.mm(*((x, compat.transpose(y)) for x, y in zip(left, right, strict=True)))


def _past() -> Array:
    return tiles.index(0) > tiles.index(1)


def _same() -> Array:
    return tiles.index(0) == tiles.index(1)


def _select(mask: Array, x: Array, dtype: jnp.dtype) -> Array:
    """x where `mask`, else 0: the left factor of a product."""
    return jnp.where(mask, x.astype(jnp.float32), 0.0).astype(dtype)


def _around(direct: Array, total: Array) -> tuple[Array, Array]:
    """e^r and e^{G_C - r}: r = 0 where products are direct, else G_C."""
    part = direct.astype(jnp.float32)
    return jnp.exp((1 - part) * total), jnp.exp(part * total)
