"""lora_matmul on Hopper with the NF4 weight dequantised in the matmul's main loop (Pallas Mosaic GPU).

Idea. wgmma takes its left operand from registers, so a kernel that computes the transposed output tile,
y^T [128 n, 256 m] = W [n, k] x^T [k, m], never has to write the bf16 weight anywhere. Two warpgroups hold 64 rows of W
each and dequantise the weights of one step while the tensor cores multiply the two before; a third warpgroup keeps a
ring of x tiles and packed weights filled by TMA. The grid is persistent; the adapter is one more wgmma of 16 columns.

Look-up. `prmt` selects 4 of 8 bytes by 4-bit selectors whose top bit replaces the byte by 8 copies of its sign: packed
nibbles ARE selectors. With nibbles s, prmt(T0, s) ^ prmt(T1, s ^ 8) is a table of 16 bytes if the entries i and i + 8
agree in their top bit (T1 is corrected by what the sign copies of T0 leave). Two byte planes give bf16; the top bits of
the planes are sign and lowest exponent bit, and the 16 codes are renumbered so that they agree pairwise. That makes 2.4
byte operations a weight; a tree of selects needs 15.

Rounding. The 16 codes are stored as bf16(CODE * 1.374555): of all factors that allow the pairing it is the one with the
least rounding error, 0.25 of the variance that rounding the weight to bf16 has. The scale absmax / 1.374555 is kept as
the sum of two bf16, hi + lo, and the weight is fma(code, hi, code * lo): rounded once. The total error of y against the
float32-dequantised weight is 1.06 times that of the standard bf16 computation.

Layout. `tile_weight` reorders a weight once: for each block of 64 x 64 the nibbles in the order in which threads hold
wgmma's left operand, then 64 pairs (hi, lo). That is 4.5 bits a weight, as NF4 without double quantisation. The
transposed product (dx) reads the same bytes: `movmatrix` turns the fragments after dequantisation.

Up to 64 rows: mosaic_few.py.

Bytes and operations for M 4096, 4096 -> 14336: 33 MB of weight, 33 MB of x, 117 MB of y: 0.06 ms; 481 GFLOP: 0.58 ms at
the rate of cuBLAS. For each step of 64 columns a scheduler issues about 400 instructions in the 1024 cycles of wgmma.
Measured on an H100 with an adapter (kernel time): 645 us, 746 TFLOP/s, beside 595 us of cuBLAS with a bf16 weight, and
47 us for `tile_weight` on every call; dx 692 us. 14 waves of tiles for work of 13.6 cost 3 %.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from lora_jax.kernels.dispatch import sm_count
from lora_jax.kernels.nf4 import mosaic_few
from lora_jax.kernels.nf4.format import BLOCK, CODE, NF4Layer, NF4Weight, cut, dequantize_absmax

__all__ = [
    "TiledWeight",
    "base_matmul",
    "base_matmul_transposed",
    "forward",
    "input_gradient",
    "matmul",
    "matmul_transposed",
    "tile_weight",
    "why_not",
]

_FACTOR = 1.374555  # see "Rounding" above
_TINY_NEGATIVE = 0x8080  # bf16 -1.2e-38: the code 0.0 in the class that lacks a fourth member
_WORDS = 512  # int32 words of packed weights in a block of 64 x 64; 64 words of scales follow
_FRAGMENT = plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel; the defaults are the fastest of those tried."""

    rows: int | None = None  # rows of x in a tile, 64 to 256; None for the number that needs the least time
    stages: int = 4  # tiles of x and W in flight
    width: int = 8  # tiles of the minor grid dimension that are walked together, for the L2 cache
    minor: int = 0  # grid dimension walked first: 0 for rows of x, 1 for output features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledWeight:
    """An NF4 weight [N, K] in the order in which the kernel's threads read it."""

    blocks: jax.Array  # int32 [N/64, K/64, 9, 64]: 512 words of nibbles, 64 words of scales (hi | lo << 16)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape [N, K]."""
        return 64 * self.blocks.shape[-4], 64 * self.blocks.shape[-3]


def why_not(
    x: jax.Array,
    w: jax.Array | NF4Weight | NF4Layer | TiledWeight,
    a: jax.Array | None = None,
    *,
    transposed: bool = False,
) -> str | None:
    """Why `matmul`, or `matmul_transposed`, cannot do a call; None if it can.

    Says nothing about the device, which must have compute capability 9.0.
    """
    if not isinstance(w, NF4Weight | NF4Layer | TiledWeight):
        return "the weight is not NF4"
    if not transposed and _few(x, w):
        return mosaic_few.why_not(x, w, a)
    if len(w.shape) != 2:
        return f"it takes one weight [N, K], got shape {w.shape}"
    n, k = w.shape
    n_multiple, k_multiple = (64, 128) if transposed else (128, 64)
    if n % n_multiple or k % k_multiple:
        return f"it wants N to be a multiple of {n_multiple} and K of {k_multiple}, got [N, K] = [{n}, {k}]"
    if x.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {x.dtype}"
    return None


def base_matmul(x: jax.Array, w: NF4Weight | NF4Layer | TiledWeight) -> jax.Array:
    """x [M, K] times W^T: [M, N] in the dtype of x."""
    return mosaic_few.base_matmul(x, w) if _few(x, w) else matmul(x, w)


def base_matmul_transposed(dy: jax.Array, w: NF4Weight | NF4Layer | TiledWeight) -> jax.Array:
    """dy [M, N] times W: [M, K] in the dtype of dy."""
    return matmul_transposed(dy, w)


def forward(x: jax.Array, w: NF4Weight | NF4Layer | TiledWeight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
    """(x W^T + x a b [M, N], None) for a [K, R], b [R, N]: x a is computed again in backward."""
    return mosaic_few.forward(x, w, a, b) if _few(x, w) else (matmul(x, w, a, b), None)


def input_gradient(
    dy: jax.Array, w: NF4Weight | NF4Layer | TiledWeight, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, None]:
    """(dy W + (dy b^T) a^T [M, K], None) for dy [M, N]."""
    return matmul_transposed(dy, w, a, b), None


def _few(x, w) -> bool:
    """Whether the kernel for few rows takes it."""
    return not isinstance(w, TiledWeight) and x.shape[0] <= mosaic_few.MAX_ROWS


def matmul(x, w, a=None, b=None, scale: float = 1.0, config: Config = Config()) -> jax.Array:
    """y [M, N] = x W^T + scale (x a) b for x bfloat16 [M, K], any M, W NF4 [N, K], a [K, R], b [R, N].

    An NF4 weight is tiled first, on every call; a TiledWeight is not.
    """
    tiled = w if isinstance(w, TiledWeight) else tile_weight(w)
    if a is None or b is None:
        return _call(x, tiled.blocks, None, None, False, config)
    return _call(x, tiled.blocks, _thin(x, a), _fragments(scale * b), False, config)


def matmul_transposed(dy, w, a=None, b=None, scale: float = 1.0, config: Config = Config()) -> jax.Array:
    """dx [M, K] = dy W + scale (dy b^T) a^T for dy bfloat16 [M, N]: the gradient of `matmul`. K a multiple of 128."""
    tiled = w if isinstance(w, TiledWeight) else tile_weight(w)
    if a is None or b is None:
        return _call(dy, tiled.blocks, None, None, True, config)
    return _call(dy, tiled.blocks, _thin(dy, (scale * b).T), _fragments(a.T), True, config)


def tile_weight(w: NF4Weight | NF4Layer) -> TiledWeight:
    """Reorders a weight [N, K], both multiples of 64, for the kernel; lossless but for the scales, kept to 2^-16."""
    w = cut(w)
    n, k = w.shape
    # Groups of 16 bytes hold 32 weights of a row. wgmma's fragment gives a thread (quad) the bytes quad, quad + 4,
    # quad + 8 and quad + 12: its word is a column of the 4 x 4 bytes.
    words = lax.bitcast_convert_type(w.packed.reshape(n, k // 8, 4), jnp.uint32)
    words = _renumber(words >> 4 & np.uint32(0x0F0F0F0F) | (words & np.uint32(0x0F0F0F0F)) << 4)
    words = words.reshape(n // 64, 4, 2, 8, k // 64, 2, 4)  # (block, warp, half, row), (block, pair of j, byte / 4)
    quad = 8 * jnp.arange(4, dtype=jnp.uint32)
    columns = [(words[..., i : i + 1] >> quad & 255) << 8 * i for i in range(4)]
    words = functools.reduce(jnp.bitwise_or, columns).transpose(0, 4, 1, 2, 5, 3, 6).reshape(n // 64, k // 64, _WORDS)
    scale = dequantize_absmax(w) / np.float32(_FACTOR)
    # The upper half of a float32 is a bf16. Written with integers: XLA drops a conversion to bf16 and back, lo with it.
    hi = lax.bitcast_convert_type(scale, jnp.uint32) & np.uint32(0xFFFF0000)
    lo = (scale - lax.bitcast_convert_type(hi, jnp.float32)).astype(jnp.bfloat16)
    pair = hi >> 16 | lax.bitcast_convert_type(lo, jnp.uint16).astype(jnp.uint32) << 16
    pair = pair.reshape(n // 64, 4, 2, 8, k // BLOCK).transpose(0, 4, 1, 3, 2).reshape(n // 64, k // 64, 64)
    blocks = lax.bitcast_convert_type(jnp.concatenate([words, pair], axis=-1), jnp.int32)
    return TiledWeight(blocks.reshape(n // 64, k // 64, 9, 64))


def _renumber(words):
    """The eight codes of each uint32, replaced by their new numbers, all eight at once.

    Every bit of a number is the exclusive or of some products of the code's bits (its algebraic normal form).
    """
    ones = np.uint32(0x11111111)
    planes = [words >> i & ones for i in range(4)]
    products = {0: ones}
    for subset in range(1, 16):
        low = subset & -subset
        plane = planes[low.bit_length() - 1]
        products[subset] = plane if subset == low else plane & products[subset ^ low]
    result = jnp.zeros_like(words)
    for bit in range(4):
        # The coefficient of a product is the parity of the table over the subsets of its bits.
        table = _tables()[0] >> bit & 1
        used = [p for s, p in products.items() if sum(table[t] for t in range(16) if t & ~s == 0) % 2]
        result |= functools.reduce(jnp.bitwise_xor, used) << bit
    return result


def _width(rank: int) -> int:
    """Columns that an adapter of this rank takes: 16 in a buffer of their own, or steps of 64 like x."""
    return 16 if rank <= 16 else -(-rank // 64) * 64


def _thin(x, factor):
    """x times a LoRA factor [K, R], zero columns added."""
    thin = jnp.dot(x, factor.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.pad(thin, ((0, 0), (0, _width(factor.shape[1]) - factor.shape[1])))


def _fragments(factor):
    """The other factor [R, N] as wgmma's left operand: int32 [N/64, steps, 512 for each 16 columns]."""
    r, n = factor.shape
    width = _width(r)
    rows = jnp.pad(factor.astype(jnp.bfloat16), ((0, width - r), (0, 0))).T
    # n = (block, warp, half, row); R = (j, chunk, quad, element); a thread's four words are its [chunk][half] of one j
    f = rows.reshape(n // 64, 4, 2, 8, width // 16, 2, 4, 2).transpose(0, 4, 1, 3, 6, 5, 2, 7)
    return lax.bitcast_convert_type(f, jnp.int32).reshape(n // 64, -1, 512 * min(4, width // 16))


@functools.cache
def _tables() -> tuple[np.ndarray, list[int]]:
    """(new number of every code, the eight words of T0 and T1 for the low and then the high byte plane)."""
    bits = (CODE.astype(np.float64) * _FACTOR).astype(ml_dtypes.bfloat16).view(np.uint16).astype(int)
    bits[CODE == 0] = _TINY_NEGATIVE
    classes: dict[tuple[int, int], list[int]] = {}
    for code, value in enumerate(bits):
        classes.setdefault((value >> 15, value >> 7 & 1), []).append(code)
    pairs = [(members[i], members[i + 1]) for members in classes.values() for i in (0, 2)]
    number = np.zeros(16, np.uint8)
    for i, (low, high) in enumerate(pairs):
        number[low], number[high] = i, i + 8
    words = []
    for shift in (0, 8):
        t0 = [bits[low] >> shift & 255 for low, _ in pairs]
        t1 = [(bits[high] >> shift & 255) ^ (255 if t & 128 else 0) for (_, high), t in zip(pairs, t0, strict=True)]
        words += [sum(t[h + i] << 8 * i for i in range(4)) for t in (t0, t1) for h in (0, 4)]
    return number, words


def _call(x, blocks, thin, fragments, transposed: bool, config: Config):
    """The kernel: out [M, F] = x [M, C] times the weight, C contracted and F free, plus thin times fragments."""
    if spare := -x.shape[0] % 8:  # TMA moves whole groups of 8 rows
        x, thin = (v if v is None else jnp.pad(v, ((0, spare), (0, 0))) for v in (x, thin))
        return _call(x, blocks, thin, fragments, transposed, config)[:-spare]
    m, contracted = x.shape
    free = 64 * blocks.shape[1 if transposed else 0]
    width = 0 if thin is None else thin.shape[1]
    stages = config.stages
    rows = config.rows or _rows(m, free)
    tiled = _tiled(64)
    body = functools.partial(
        _body,
        grid=(pl.cdiv(m, rows), free // 128),
        steps=contracted // 64,
        width=width,
        transposed=transposed,
        config=dataclasses.replace(config, rows=rows),
    )
    kernel = plgpu.kernel(
        body if width else lambda x_ref, w_ref, *refs: body(x_ref, w_ref, None, None, *refs),
        out_type=jax.ShapeDtypeStruct((m, free), x.dtype),
        grid=(sm_count(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((stages, rows, 64), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((stages, 2, 9, 64), jnp.int32),
            plgpu.SMEM((2, rows, 64), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((rows, 16), jnp.bfloat16, transforms=_tiled(16)),
            (plgpu.Barrier(num_arrivals=2, num_barriers=stages), plgpu.Barrier(num_arrivals=2, num_barriers=stages)),
            (plgpu.Barrier(), plgpu.Barrier(num_arrivals=2)),
        ],
        kernel_name="nf4_matmul_transposed" if transposed else "nf4_matmul",
    )
    return kernel(x, blocks, *((thin, fragments) if width else ()))


def _tiled(columns: int) -> tuple:
    """How a bf16 matrix of that many columns lies in shared memory, swizzled for wgmma."""
    tiling, swizzle = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # pyright: ignore
    return tiling, swizzle


def _body(x_ref, w_ref, thin_ref, fragment_ref, out_ref, *scratch, grid, steps, width, transposed, config):
    """Two warpgroups compute 64 output features each, the third one keeps the ring of tiles filled."""
    x_smem, w_smem, out_smem, thin_smem, (full, empty), (thin_full, thin_empty) = scratch
    rows, wg = config.rows, lax.axis_index("wg")
    narrow, extra = width == 16, width // 64  # an adapter of rank up to 16, or as many steps of 64 in the ring

    def slot(info, i):
        return lax.rem(info.local_index * (steps + extra) + i, jnp.int32(config.stages))

    def loop(body):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
        def _tiles(info):
            mi, fi = plgpu.planar_snake(info.index[0], grid, config.minor, config.width)
            body(info, pl.ds(mi * rows, rows), fi)

    def accumulate(acc, info, fi):
        def load(i):
            plgpu.barrier_wait(full.at[slot(info, i)])
            block = w_smem.at[slot(info, i), wg]
            return _dequantise(block, transposed)

        def start(i, weight):
            plgpu.wgmma(acc, weight, x_smem.at[slot(info, i)].transpose((1, 0)))

        def free(i, running):
            """Waits until no more than `running` wgmmas run, then gives the tile of step i back."""
            plgpu.wgmma_wait(running)
            plgpu.barrier_arrive(empty.at[slot(info, i)])

        # Step i runs, step i + 1 is about to start, step i + 2 is dequantised meanwhile. Two steps make one turn of the
        # loop, so that a running wgmma's registers are never those that the next weight is written to: with one, ptxas
        # moves registers, finds the hazard and runs every wgmma alone.
        def step(i, weight):
            start(i + 1, weight)
            free(i, 1)
            return load(i + 2)

        start(0, load(0))
        if steps > 1:
            turns = (steps - 2) // 2
            weight = lax.fori_loop(0, turns, lambda i, w: step(2 * i + 1, step(2 * i, w)), load(1))
            for i in range(2 * turns, steps - 2):
                weight = step(i, weight)
            start(steps - 1, weight)
            free(steps - 2, 1)
        for i in range(extra):
            factor = _load_fragments(fragment_ref.at[2 * fi + wg, i], 64)
            plgpu.barrier_wait(full.at[slot(info, steps + i)])
            start(steps + i, factor)
            free(steps + i - 1, 1)
        if narrow:
            factor = _load_fragments(fragment_ref.at[2 * fi + wg, 0], 16)
            plgpu.barrier_wait(thin_full)
            plgpu.wgmma(acc, factor, thin_smem.transpose((1, 0)))
        free(steps + extra - 1, 0)
        if narrow:
            plgpu.barrier_arrive(thin_empty)
        return acc[...]

    def compute(info, row_slice, fi):
        acc = plgpu.WGMMAAccumulatorRef((64, rows), jnp.float32)
        out = pl.run_scoped(functools.partial(accumulate, info=info, fi=fi), acc).astype(out_ref.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem.at[wg].transpose((1, 0))[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[row_slice, pl.ds(fi * 128 + wg * 64, 64)])

    def fetch(info, row_slice, fi):
        def one(source, column, i, wi):
            s = slot(info, i)
            plgpu.barrier_wait(empty.at[s])
            plgpu.copy_gmem_to_smem(source.at[row_slice, pl.ds(column * 64, 64)], x_smem.at[s], full.at[s])
            pair = w_ref.at[wi, pl.ds(2 * fi, 2)] if transposed else w_ref.at[pl.ds(2 * fi, 2), wi]
            plgpu.copy_gmem_to_smem(pair, w_smem.at[s], full.at[s])

        lax.fori_loop(0, steps, lambda i, _: one(x_ref, i, i, i), None)
        for i in range(extra):  # the weight is not used: it keeps the count of arrivals
            one(thin_ref, i, steps + i, 0)
        if narrow:
            plgpu.barrier_wait(thin_empty)
            plgpu.copy_gmem_to_smem(thin_ref.at[row_slice], thin_smem, thin_full)

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        for s in range(config.stages):
            plgpu.barrier_arrive(empty.at[s])
        plgpu.barrier_arrive(thin_empty)
        loop(compute)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        loop(fetch)


def _rows(m: int, free: int) -> int:
    """Rows of a tile that finish first: waves of tiles times the time of one, which the look-ups bound from below."""

    def cost(rows):
        return pl.cdiv(pl.cdiv(m, rows) * (free // 128), sm_count()) * max(rows, 144)

    return min((256, 192, 128, 64), key=cost)


# What follows writes single instructions. Registers of a fragment [64, 64] are numbered [j][chunk][half]: 16 columns j,
# 8 columns `chunk` of them, 8 of the warp's 16 rows `half`; a thread has two neighbouring columns in each.


def _dequantise(ref, transposed: bool):
    """A block in shared memory [9, 64] as a fragment: W [n, k], or W^T [k, n] if transposed."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_FRAGMENT)
    def emit(ctx, ref):
        thread = arith.remui(utils.thread_idx(), _i32(128))
        lane, warp = arith.remui(thread, _i32(32)), arith.shrui(thread, _i32(5))
        row = arith.addi(arith.muli(arith.shrui(lane, _i32(2)), _i32(2)), _i32(_WORDS))

        def scales(group):
            """(hi, hi) and (lo, lo) of this thread's two rows out of 16."""
            pairs = _load(ref, arith.addi(row, arith.muli(group, _i32(16))), 2)
            return [
                [_asm(1, [p], f"prmt.b32 $0, $1, $1, {s};", "=r,r")[0] for s in ("0x1010", "0x3232")] for p in pairs
            ]

        def packed(group, half, pair):
            offset = arith.addi(arith.muli(group, _i32(128)), arith.muli(pair, _i32(32)))
            return _load(ref, arith.addi(arith.addi(offset, _i32(64 * half)), lane), 1)[0]

        if not transposed:  # a warp's 16 rows and all columns
            scale = scales(warp)
            halves = [
                [
                    _asm(1, [value, *scale[half]], _SCALE, "=r,r,r,r")[0]
                    for pair in range(2)
                    for value in _asm(4, [packed(warp, half, _i32(pair))], _LOOK_UP_8, "=&r,=&r,=&r,=&r,r")
                ]
                for half in range(2)
            ]
            return _fragment([value for both in zip(*halves, strict=True) for value in both])
        # A warp's 16 columns and all rows: lanes hold rows until each 8 x 8 matrix is turned.
        pair, shift = arith.shrui(warp, _i32(1)), arith.muli(arith.andi(warp, _i32(1)), _i32(16))
        registers = []
        for group in range(4):
            scale = scales(_i32(group))
            for half in range(2):
                four = arith.shrui(packed(_i32(group), half, pair), shift)
                for value in _asm(2, [four], _LOOK_UP_4, "=&r,=&r,r"):
                    registers += _asm(1, [value, *scale[half]], _SCALE_AND_TURN, "=r,r,r,r")
        return _fragment(registers)

    return emit(ref)  # pyright: ignore[reportCallIssue]


def _load_fragments(ref, columns: int):
    """A fragment [64, columns] from device memory."""
    kind = plgpu.ShapeDtypeStruct((64, columns), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=kind)
    def emit(ctx, ref):
        word = arith.muli(arith.remui(utils.thread_idx(), _i32(128)), _i32(4))
        return _fragment([v for j in range(columns // 16) for v in _load(ref, arith.addi(word, _i32(512 * j)), 4)])

    return emit(ref)  # pyright: ignore[reportCallIssue]


def _look_up_text(selector: str, flipped: str, out0: str, out1: str) -> str:
    l0, l1, l2, l3, h0, h1, h2, h3 = (f"0x{word:x}" for word in _tables()[1])
    return f"""prmt.b32 la, {l0}, {l1}, {selector}; prmt.b32 lb, {l2}, {l3}, {flipped};
        prmt.b32 ha, {h0}, {h1}, {selector}; prmt.b32 hb, {h2}, {h3}, {flipped};
        xor.b32 la, la, lb; xor.b32 ha, ha, hb;
        prmt.b32 {out0}, la, ha, 0x5140; prmt.b32 {out1}, la, ha, 0x7362;"""


_LOOK_UP_8 = f"""{{ .reg .b32 s, x, y, la, lb, ha, hb;
    xor.b32 x, $4, 0x88888888; shr.u32 s, $4, 16; shr.u32 y, x, 16;
    {_look_up_text("$4", "x", "$0", "$1")} {_look_up_text("s", "y", "$2", "$3")} }}"""
_LOOK_UP_4 = f"""{{ .reg .b32 x, la, lb, ha, hb; xor.b32 x, $2, 0x88888888; {_look_up_text("$2", "x", "$0", "$1")} }}"""
_SCALE = "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }"
_SCALE_AND_TURN = """{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 t, $1, $2, t;
    movmatrix.sync.aligned.m8n8.trans.b16 $0, t; }"""


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _asm(outputs: int, inputs: list, text: str, constraints: str) -> list:
    """Inline assembly on 32-bit registers."""
    i32 = ir.IntegerType.get_signless(32)
    kind = i32 if outputs == 1 else llvm.StructType.get_literal([i32] * outputs)
    out = llvm.inline_asm(kind, inputs, text, constraints, asm_dialect=0, has_side_effects="sync" in text)
    return [out] if outputs == 1 else [llvm.extractvalue(i32, out, [i]) for i in range(outputs)]


def _load(ref, offset, count: int) -> list:
    """`count` int32, aligned, from a flat offset."""
    i32 = ir.IntegerType.get_signless(32)
    base = utils.memref_ptr(ref)
    pointer = llvm.getelementptr(base.type, base, [offset], [-2147483648], i32, llvm.GEPNoWrapFlags.none)
    loaded = llvm.load(ir.VectorType.get((count,), i32), pointer, alignment=4 * count)
    return [vector.extract(loaded, [], [i]) for i in range(count)]


def _fragment(registers: list) -> fa.FragmentedArray:
    """Registers of bf16 pairs, numbered [j][chunk][half], as an array [64, 16 j]."""
    one, two = ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), ir.VectorType.get((2,), ir.BF16Type.get())
    pairs = np.empty(len(registers), dtype=object)
    for i, value in enumerate(registers):
        pairs[i] = vector.bitcast(two, vector.broadcast(one, value))
    shape = fa.WGMMA_LAYOUT.registers_shape((64, 4 * len(registers)))
    return fa.FragmentedArray(_registers=pairs.reshape(shape), _layout=fa.WGMMA_LAYOUT, _is_signed=None)
