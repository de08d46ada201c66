"""Chunks with vector decays on Hopper: what they need of keys and gates alone, and their gradients.

In a chunk of C = 64 tokens, G_i is the log-decay from its beginning to token i, a vector over K like q and k, and
products of such vectors are taken by element. Rows and matrices of the chunk are

    q̂_i = scale e^{G_i} q_i                                    A_ij = scale Σ_d q_id k_jd e^{G_id - G_jd}    for j <= i
    k̂_i = e^{G_C - G_i} k_i        λ = e^{G_C}                  L_ij = β_i Σ_d k_id k_jd e^{G_id - G_jd}      for j < i
    k̄_i = e^{G_i} k_i                                           T = (I + L)^-1

the last line for the delta rule only, linear attention being T = I and U = V in

    U = T β (V - K̄ S)         O = Q̂ S + A U         S ← λ S + K̂ᵀ U

Across documents A and L are zero, and so are rows of Q̂ and K̄ that do not read S, rows of K̂ that S does not keep, and λ
where a document ends. With dY = Tᵀ (Aᵀ dO + K̂ dS), W = strict_tril(dO Uᵀ) and D = -strict_tril(dY Uᵀ), gradients are

    dq_i = scale e^{G_i} (Σ_j W_ij e^{-G_j} k_j + S dO_i)                              + scale (dO_i·U_i) k_i
    dk_i = β_i e^{G_i} (Σ_j D_ij e^{-G_j} k_j - S dY_i)                                + scale (dO_i·U_i) q_i
         + e^{-G_i} Σ_j (W_ji scale e^{G_j} q_j + D_ji β_j e^{G_j} k_j)                                    (II)
         + e^{G_C - G_i} dS U_i                                                                            (III)
    dβ_i = dY_i·V_i + Σ_d (e^{G_i} k_i (Σ_j D_ij e^{-G_j} k_j - S dY_i))_d
    dg_t = Σ_{i>=t} (q_i dq_i + k_i dk_i - 2 k_i dk_i^II) + Σ_{j<t} k_j dk_j^III + λ <S, dS>_v

where the sums of dg leave out the diagonal (dO_i·U_i) and, in the first one, III.

Weights e^{G_i - G_j} are products e^{G_i - R} e^{R - G_j} of rows and columns, R being G in the middle of both. In one
pass R is that of the chunk: if |G - R| <= `DIRECT`. Otherwise pairs of tokens meet in blocks of 64, 32, 16 tokens,
those of the upper half looking at those of the lower one, so that no exponent is positive; and, in a last pass, in
blocks of 8, where exponents are at most 4 log-decays. For these to be safe, log-decays below `LEAST` count as that.
Exponents of pairs are sums of the log-decays in between, by products with matrices of 0, 1 and -1: nothing cancels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import chunks, compat, ring, tiles
from hydrax.ops.pallas.chunks import KEEP, READER, READS, WRITER, WRITES
from hydrax.ops.pallas.tiles import BLOCK, per_column, per_row

LEAST = -20.0
"""Log-decays below count as this: e^-20 is far below the resolution of bf16."""
DIRECT = 64.0
"""The largest exponent, of either sign, with which a chunk is done in one pass."""
MOST = 80.0
"""The largest exponent taken: those beyond belong to pairs that are masked."""
PASSES = 4


@dataclasses.dataclass(frozen=True)
class Pass:
    """Pairs (i, j) [C,C] of tokens, and factors [C,C'] of rows i and rows j whose product is the weight of the pair."""

    pairs: Array
    looks: Array
    looked: Array


@dataclasses.dataclass(frozen=True)
class Gates:
    """The log-decays of 64 channels of a chunk, as a sum of two bf16 matrices: to 2^-17 of each."""

    facts: PyTree | None
    terms: Sequence[PyTree]
    mask_s: PyTree
    line_s: PyTree

    def put(self, g: Array) -> None:
        """Takes them; padding leaves the state alone."""
        g = jnp.maximum(g, LEAST)
        if self.facts is not None:
            g = jnp.where(per_row(self.facts.at[READER]) >= 0, g, 0.0)
        _split(g, self.terms)

    @property
    def learned(self) -> Array:
        """Where they are what they were, before `LEAST` and padding."""
        high, low = self.terms
        found = tiles.load(high) + tiles.load(low) > LEAST
        return found if self.facts is None else found & (per_row(self.facts.at[READER]) >= 0)

    def sums(self, which: Array, terms: Sequence[PyTree] | None = None) -> Array:
        """Σ_t which_it x_t for every row i of these terms, or others; `which` is 0, 1 or -1."""
        self._mask(which)
        return tiles.mm(*((self.mask_s, term) for term in terms or self.terms))

    def halves(self) -> tuple[Array, Array]:
        """G_m and G_C - G_m [64], m being the last token of the first half, as the rows of a state have channels."""
        first = _column() < BLOCK // 2
        self._mask(_where((_row() < BLOCK // 2) == first))
        found = tiles.mm(*((compat.transpose(term), self.mask_s) for term in self.terms))
        return jnp.where(first, found, -jnp.inf).max(1), jnp.where(first, -jnp.inf, found).max(1)

    def from_middle(self) -> Array:
        """G - G_m."""
        return self._exponents(jnp.int32(BLOCK // 2))

    def across(self, x: Array) -> Array:
        """A vector [64] as [64,64], one value per column."""
        plgpu.commit_smem()
        self.line_s[...] = x
        plgpu.commit_smem()
        return per_column(self.line_s)

    def passes(self, E: Array, f: Callable[[Pass, PyTree], PyTree], carry: PyTree, *, diagonal: bool) -> PyTree:
        """`carry = f(pass, carry)` until all pairs with j < i have met, or with j = i too; E is `from_middle`."""
        row, column = _row(), _column()
        apart = jax.lax.bitwise_xor(row, column)

        def meet(E: Array, half: Array, least: Array, carry: PyTree) -> PyTree:
            pairs = (row >= column if diagonal else row > column) & (apart < 2 * half) & (apart >= least)
            if self.facts is not None:
                pairs &= per_row(self.facts.at[READER]) == per_column(self.facts.at[WRITER])
            return f(Pass(pairs, jnp.exp(jnp.minimum(E, MOST)), jnp.exp(jnp.minimum(-E, MOST))), carry)

        half = jnp.int32(BLOCK // 2)
        plgpu.commit_smem()
        self.line_s[...] = jnp.abs(E).max(1)
        plgpu.commit_smem()
        far = jnp.maximum(self.line_s[0], self.line_s[BLOCK - 1]) > DIRECT
        carry = meet(E, half, jnp.where(far, half, 0), carry)

        def finer(n: Array, carry: PyTree) -> PyTree:
            half = jax.lax.shift_right_logical(jnp.int32(BLOCK // 2), n)
            return meet(self._exponents(half), half, jnp.where(n == PASSES - 1, 0, half), carry)

        return jax.lax.fori_loop(1, jnp.where(far, PASSES, 1), finer, carry)

    def _exponents(self, half: Array) -> Array:
        """G - R, with R of the middle of every block of two halves."""
        row, column = _row(), _column()
        middle = (row & -(2 * half)) | (half - 1)
        return self.sums(_where((column > middle) & (column <= row)) - _where((column > row) & (column <= middle)))

    def _mask(self, which: Array) -> None:
        plgpu.commit_smem()  # all have read what is stored next
        self.mask_s[...] = which.astype(self.mask_s.dtype)
        plgpu.commit_smem()

    def masked(self, x: Array, which: int) -> Array:
        """Rows of x, without those that a fact of documents excludes."""
        return x if self.facts is None else x * per_row(self.facts.at[which])

    @property
    def keep(self) -> Array | float:
        return 1.0 if self.facts is None else self.facts[KEEP, 0]


def _split(x: Array, terms: Sequence[PyTree]) -> None:
    """x as the sum of two bf16 matrices, to 2^-17 of its entries."""
    high, low = terms
    rounded = x.astype(high.dtype)
    plgpu.commit_smem()  # all have read what is stored next
    high[...] = rounded
    low[...] = (x - rounded.astype(x.dtype)).astype(low.dtype)


def _row() -> Array:
    return tiles.index(0)


def _column() -> Array:
    return tiles.index(1)


def _where(mask: Array) -> Array:
    return jnp.where(mask, 1.0, 0.0)


def facts_of(seg: Array | None) -> Array | None:
    """What documents mean in each chunk, for all heads [B,N,1,6,C], see `chunks.SUM`."""
    return None if seg is None else chunks.chunk_facts(jnp.zeros((*seg.shape, 1)), seg, 1.0)


def prepare(
    scale: float, q: Array, k: Array, g: Array, documents: Array | None, beta: Array | None = None
) -> tuple[dict[str, Array], Array, Array]:
    """The rows of all chunks, their vectors and matrices, see the docstring of the module.

    Args:
      q, k, g: [B,T,H,K]; log-decays in fp32.
      documents: as `facts_of` gives them.
      beta: [B,N,Hv,C] for the delta rule.

    Returns:
      Q̂ as "q", K̂ as "k", K̄ as "r" [B,T,H,K]; λ [B,N,H,K/C,C]; A, and for the delta rule T below it [B,N,H,C (· 2),C].
      The delta rule has Hv for H.
    """
    (B, T, H, K), N, width = q.shape, q.shape[1] // BLOCK, q.shape[3] // BLOCK
    heads, matrices, names = (H, 1, "qk") if beta is None else (beta.shape[2], 2, "qkr")
    rows, vectors = {"q": q, "k": k, "g": g}, _vectors(documents, beta)
    return compat.launch(
        functools.partial(_prepare_body, scale, heads),
        (rows, vectors),
        (
            {name: jax.ShapeDtypeStruct((B, T, heads, K), q.dtype) for name in names},
            jax.ShapeDtypeStruct((B, N, heads, width, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((B, N, heads, matrices * BLOCK, BLOCK), q.dtype),
        ),
        scratch={
            "row_s": {name: tiles.scratch(q.dtype, width, *tiles.SQUARE) for name in "qk"},
            "vector_s": _in_shared(vectors),
            "terms_s": tiles.scratch(q.dtype, 2, *tiles.SQUARE),
            "work_s": tiles.scratch(q.dtype, *tiles.SQUARE),
            "line_s": plgpu.SMEM((BLOCK,), jnp.float32),
            **({} if beta is None else {"factor_s": tiles.scratch(jnp.dtype(jnp.float16), 2, *tiles.SQUARE)}),
            "full": plgpu.Barrier(num_arrivals=2 * width + len(vectors), num_barriers=(1,)),
        },
        grid={"b": B, "n": N, "h": heads},
        warpgroups=1,
    )


def _vectors(documents: Array | None, beta: Array | None) -> dict[str, Array]:
    """By chunk, what there is of them."""
    found = {"documents": documents, "beta": None if beta is None else beta[..., None, :]}
    return {name: x for name, x in found.items() if x is not None}


def _in_shared(vectors: Mapping[str, Array]) -> dict[str, PyTree]:
    return {name: plgpu.SMEM(x.shape[3:], jnp.float32) for name, x in vectors.items()}


def _fetch_vectors(
    vectors: Mapping[str, PyTree], vector_s: Mapping[str, PyTree], at: tuple, heads: int, full: PyTree
) -> None:
    b, n, h = at
    for name, x in vectors.items():
        plgpu.copy_gmem_to_smem(x.at[b, n, ring.head(h, heads, x)], vector_s[name], full)


def _prepare_body(
    scale: float,
    heads: int,
    inputs: tuple,
    outputs: tuple,
    *,
    row_s: dict[str, PyTree],
    vector_s: dict[str, PyTree],
    terms_s: PyTree,
    work_s: PyTree,
    line_s: PyTree,
    full: PyTree,
    factor_s: PyTree = None,
) -> None:
    """One thread block: a chunk of a head. Several share a multiprocessor, so shared memory is used over and over."""
    rows, vectors = inputs
    row_out, decay_out, system_out = outputs
    b, n, h = at = tuple(jax.lax.axis_index(name) for name in ("b", "n", "h"))
    width, low = row_s["q"].shape[0], work_s.dtype

    def place(name: str, j: int) -> PyTree:
        return rows[name].at[b, tiles.block(n), ring.head(h, heads, rows[name]), tiles.block(j)]

    for name, x in row_s.items():
        for j in range(width):
            plgpu.copy_gmem_to_smem(place(name, j), x.at[j], full.at[0])
    _fetch_vectors(vectors, vector_s, at, heads, full.at[0])

    beta = vector_s.get("beta")
    gates = Gates(vector_s.get("documents"), [terms_s.at[i] for i in range(2)], work_s, line_s)
    scores = [tiles.zeros() for _ in range(1 if beta is None else 2)]
    for j in range(width):
        q, k = row_s["q"].at[j], row_s["k"].at[j]
        g = tiles.load(place("g", j))
        if j == 0:
            plgpu.barrier_wait(full.at[0])

        def meet(p: Pass, scores: list, q: PyTree = q, k: PyTree = k) -> list:
            plgpu.commit_smem()  # all have read what is stored next
            work_s[...] = (tiles.load(k) * p.looked).astype(low)
            plgpu.commit_smem()
            found = []
            for x, looks in zip(scores, (q, k), strict=False):
                weighed = (tiles.load(looks) * p.looks).astype(low)
                found.append(jnp.where(p.pairs, x + tiles.mm((weighed, compat.transpose(work_s))), x))
            return found

        gates.put(g)
        first, second = gates.halves()
        E = gates.from_middle()
        scores = gates.passes(E, meet, scores, diagonal=True)
        reads = gates.masked(jnp.exp(E + gates.across(first)), READS)
        writes = gates.masked(jnp.exp(gates.across(second) - E), WRITES)
        out = {"q": scale * reads * tiles.load(q), "k": writes * tiles.load(k)}
        if beta is not None:
            out["r"] = reads * tiles.load(k)
        places = {"q": q, "k": k, "r": work_s}
        plgpu.commit_smem()  # all have read what is stored next
        line_s[...] = gates.keep * jnp.exp(first + second)
        for name, x in out.items():
            places[name][...] = x.astype(low)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(line_s, decay_out.at[b, n, h, j])
        for name in out:
            plgpu.copy_smem_to_gmem(places[name], row_out[name].at[b, tiles.block(n), h, tiles.block(j)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiles.store(scale * scores[0], work_s, system_out.at[b, n, h, tiles.block(0)])
    if beta is not None:
        L = jnp.where(_row() > _column(), per_row(beta.at[0]) * scores[1], 0.0)
        tiles.store(tiles.inverse(L, factor_s).astype(low), terms_s.at[0], system_out.at[b, n, h, tiles.block(1)])
    plgpu.wait_smem_to_gmem(0)


def gradients(
    scale: float,
    rows: Mapping[str, Array],
    documents: Array | None,
    beta: Array | None,
    S: Array,
    dS: Array,
) -> dict[str, Array]:
    """dq, dk and dg as "q", "k", "g" [B,T,Hv,K]; and as "beta" [B,N,Hv,C] what of dβ is no product of dY and V.

    Args:
      rows: q, k, g as in `prepare`, "u" and "do" [B,T,Hv,V], and for the delta rule "dy".
      S, dS: before and after every chunk [Bn,N,Hv,K,V], rows being cut in Bn / B segments.
    """
    (B, T, Hv, V), K = rows["u"].shape, rows["q"].shape[3]
    (Bn, N), width = S.shape[:2], K // BLOCK
    rows = {name: x.reshape(Bn, N * BLOCK, *x.shape[2:]) for name, x in rows.items()}
    vectors = {name: x.reshape(Bn, N, *x.shape[2:]) for name, x in _vectors(documents, beta).items()}
    keyed = {name: x for name, x in rows.items() if name in "qkg"}
    valued = {name: x for name, x in rows.items() if name not in "qkg"}
    dtype = rows["q"].dtype
    spare = max(0, 2 + len(valued) - 2 * V // BLOCK)  # what does not fit where the states were
    sums = None if beta is None else jax.ShapeDtypeStruct((Bn, N, Hv, width, BLOCK), jnp.float32)
    found, sums = compat.launch(
        functools.partial(_gradients_body, scale),
        (keyed, valued, vectors, {"S": S, "dS": dS}),
        ({x: jax.ShapeDtypeStruct((Bn, N * BLOCK, Hv, K), y.dtype) for x, y in keyed.items()}, sums),
        scratch={
            "key_s": {x: tiles.scratch(dtype, *tiles.SQUARE) for x in "qk"},
            "value_s": {x: tiles.scratch(dtype, BLOCK, V) for x in valued},
            "state_s": {x: tiles.scratch(dtype, BLOCK, V) for x in ("S", "dS")},
            "vector_s": _in_shared(vectors),
            "terms_s": tiles.scratch(dtype, 2, *tiles.SQUARE),
            "score_s": tiles.scratch(dtype, len(valued) - 1, *tiles.SQUARE),
            **({"spare_s": tiles.scratch(dtype, spare, *tiles.SQUARE)} if spare else {}),
            "line_s": plgpu.SMEM((BLOCK,), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=len(rows) + 1 + len(vectors), num_barriers=(1,)),
        },
        grid={"b": Bn, "n": N, "h": Hv, "j": width},
        warpgroups=1,
    )
    found = {name: x.reshape(B, T, Hv, K) for name, x in found.items()}
    return found if sums is None else found | {"beta": sums.sum(3).reshape(B, -1, Hv, BLOCK)}


def _gradients_body(
    scale: float,
    inputs: tuple,
    outputs: tuple,
    *,
    key_s: dict[str, PyTree],
    value_s: dict[str, PyTree],
    state_s: dict[str, PyTree],
    vector_s: dict[str, PyTree],
    terms_s: PyTree,
    score_s: PyTree,
    line_s: PyTree,
    full: PyTree,
    spare_s: PyTree = None,
) -> None:
    """One thread block: 64 channels of the keys of a chunk and a head of values."""
    keyed, valued, vectors, states = inputs
    found, sums = outputs
    b, n, h, j = (jax.lax.axis_index(name) for name in ("b", "n", "h", "j"))
    heads, low = states["S"].shape[2], score_s.dtype

    def place(x: PyTree, *columns: PyTree) -> PyTree:
        return x.at[(b, tiles.block(n), ring.head(h, heads, x), *columns)]

    for name, target in key_s.items():
        plgpu.copy_gmem_to_smem(place(keyed[name], tiles.block(j)), target, full.at[0])
    for name, target in value_s.items():
        plgpu.copy_gmem_to_smem(place(valued[name]), target, full.at[0])
    for name, target in state_s.items():
        plgpu.copy_gmem_to_smem(states[name].at[b, n, h, tiles.block(j)], target, full.at[0])
    _fetch_vectors(vectors, vector_s, (b, n, h), heads, full.at[0])
    g = tiles.load(place(keyed["g"], tiles.block(j)))
    plgpu.barrier_wait(full.at[0])

    gates = Gates(vector_s.get("documents"), [terms_s.at[i] for i in range(2)], score_s.at[0], line_s)
    q, k = key_s["q"], key_s["k"]
    u, do, dy = (tiles.blocks(value_s[name]) if name in value_s else [] for name in ("u", "do", "dy"))
    S, dS = (tiles.blocks(state_s[name]) for name in ("S", "dS"))
    beta = per_row(vector_s["beta"].at[0]) if dy else 0.0

    # Through the states, before and after the chunk; their memory is then free.
    gates.put(g)
    first, second = gates.halves()
    E = gates.from_middle()
    reads = gates.masked(jnp.exp(E + gates.across(first)), READS)
    dq = scale * reads * _against(do, S)
    moments = tiles.load(q) * dq
    dk, strength = tiles.zeros(), tiles.zeros().sum(1)
    if dy:
        dk = -reads * _against(dy, S)
        strength = (tiles.load(k) * dk).sum(1)
        dk *= beta
        moments += tiles.load(k) * dk
    written = gates.masked(jnp.exp(gates.across(second) - E), WRITES) * _against(u, dS)
    dk += written
    kept = gates.keep * jnp.exp(first + second) * _inner(S, dS)
    free = [*S, *dS, *(spare_s.at[i] for i in range(spare_s.shape[0] if spare_s else 0))]
    later, row = free[:2], free[2:]
    _split(written * tiles.load(k), later)

    def meet(p: Pass, carry: tuple) -> tuple:
        dq, dk, moments, strength = carry
        plgpu.commit_smem()  # all have read what is stored next
        row[0][...] = (scale * p.looks * tiles.load(q)).astype(low)
        row[1][...] = (p.looked * tiles.load(k)).astype(low)
        score_s.at[0][...] = jnp.where(p.pairs, _against(do, u), 0.0).astype(low)
        if dy:
            row[2][...] = (beta * p.looks * tiles.load(k)).astype(low)
            score_s.at[1][...] = jnp.where(p.pairs, -_against(dy, u), 0.0).astype(low)
        plgpu.commit_smem()
        looked = tiles.mm(*((compat.transpose(score_s.at[i]), row[2 * i]) for i in range(score_s.shape[0])))
        dk += p.looked * looked
        moments -= tiles.load(row[1]) * looked
        looks = tiles.mm((score_s.at[0], row[1]))
        dq += scale * p.looks * looks
        moments += tiles.load(row[0]) * looks
        if dy:
            looks = tiles.mm((score_s.at[1], row[1]))
            moments += tiles.load(row[2]) * looks
            looks *= p.looks
            strength += (tiles.load(k) * looks).sum(1)
            dk += beta * looks
        return dq, dk, moments, strength

    dq, dk, moments, strength = gates.passes(E, meet, (dq, dk, moments, strength), diagonal=False)
    own = tiles.spread(scale * _inner(do, u))
    if gates.facts is not None:
        own *= jnp.where(per_row(gates.facts.at[READER]) >= 0, 1.0, 0.0)
    dq, dk = dq + own * tiles.load(k), dk + own * tiles.load(q)
    _split(moments, row[:2])
    dg = gates.across(kept) + gates.sums(_where(_row() <= _column()), row[:2])
    dg += gates.sums(_where(_row() > _column()), later)
    for name, x in (("q", dq), ("k", dk)):
        tiles.store(x, key_s[name], found[name].at[b, tiles.block(n), h, tiles.block(j)])
    found["g"].at[b, tiles.block(n), h, tiles.block(j)][...] = jnp.where(gates.learned, dg, 0.0)
    if dy:
        plgpu.commit_smem()
        line_s[...] = strength
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(line_s, sums.at[b, n, h, j])
    plgpu.wait_smem_to_gmem(0)


def _against(left: list[PyTree], right: list[PyTree]) -> Array:
    """Σ left rightᵀ over blocks of columns."""
    return tiles.mm(*((x, compat.transpose(y)) for x, y in zip(left, right, strict=True)))


def _inner(left: list[PyTree], right: list[PyTree]) -> Array:
    """Inner products of equal rows [C]."""
    products = [tiles.load(x) * tiles.load(y) for x, y in zip(left, right, strict=True)]
    return sum(products[1:], products[0]).sum(1)
