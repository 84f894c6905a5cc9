"""NF4 + LoRA for few rows (decoding) on Hopper: y = x W^T + scale (x A) B for at most 64 rows (Pallas Mosaic GPU).

Idea. The limit is the packed bytes: 29 MB or 10 us for 4096 -> 14336 on an H100. Byte permutes and lane shuffles need
twice as long to look the codes up. Here a byte's two codes are looked up at once in shared memory: 256 entries, each
the bf16 pair of a byte, once for each of the 32 banks, so that every lane reads its own bank. That is a shift, one
logical operation and a load for two weights, and the loaded word is what mma.sync wants as a register: no weight is
ever converted, multiplied or moved.

Order of columns. mma.sync m16n8k16 computes W [16 n, 16 k] x^T [16 k, 8 m]. Four lanes (a quad) share a row of W; a
lane reads 16 contiguous columns of a block of 64: 8 bytes of W, 32 of x. Columns may take any order as long as W and x
agree, so step s of the block's four takes a lane's columns 4 s to 4 s + 3. Its accumulator starts at zero and is added,
times the float32 scale of row and block, to the result.

Numbers. As in triton_matmul.py: the table holds bf16(CODE * 1.4367), scales are divided by 1.4367, and nothing else is
rounded before the sum in float32. More exact than the standard computation.

Work. A block of threads owns a run of 16-row units of W, walks them a few at a time, and splits K among its warps; each
warp has the packed words of its next blocks of 64 in flight, across the end of a tile too. The warps' sums go through
shared memory and are added in a fixed order: no atomics, no second kernel, two runs are bitwise equal. x A is computed
before by a small kernel, in 16 parts of K; each block adds the parts, and a warp starts its sums with (x A) B.

Two forms. Up to 16 rows, where a warp's blocks of 64 in flight are all that it has of a row of W (`_Plan.x_stays`), it
loads its x once and keeps it in registers. Elsewhere x is read for each block again, from shared memory if it fits.

Bytes and operations, for 4096 -> 14336: 29.4 MB of packed words, 0.9 MB of quantised scales; 29.4 M look-ups, which
are 7000 loads of a warp on each of 132 multiprocessors; 2 M N K = 117 M x M operations of mma, in steps of 8 rows.

Measured on an H100 for the same, rank 16, this kernel alone (the small one for x A takes 1.6 us more): 16.8 us for 1
row and 21.8 us for 16 rows with x in registers, 42.4 us for 64 rows. A plain reader of the same bytes takes 11.2 us,
the computation without the loads 10.1, 14.6 and 34.5 us: loads and computation do not overlap fully. A ring in shared
memory, filled by bulk copies that do not wait for the warps that compute, did not help: 18.6, 21.4 and 53.5 us.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import gpu

from lora_jax.kernels.dispatch import sm_count
from lora_jax.kernels.nf4 import mosaic_instructions as ptx
from lora_jax.kernels.nf4.format import BLOCK, CODE, NESTED_BLOCK, NF4Layer, NF4Weight, with_one_index

__all__ = ["MAX_ROWS", "Tiles", "base_matmul", "choose", "forward", "matmul", "why_not"]

MAX_ROWS = 64
_MAX_RANK = 256
_STRETCH = np.float32(1.4367)  # see "Numbers" in triton_matmul.py
_INVERSE = np.float32(1) / _STRETCH
_PARTS = 16  # of K, in the sum of x A
_SHARED = 227 * 1024  # bytes of shared memory that a block can have
_COLUMN = 20  # floats that a column of partial sums takes: 16 rows, and 4 so that a warp writes to 32 banks


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the kernel."""

    warps: int = 16  # of a block: 4, 8 or 16
    splits: int = 16  # warps that share the columns of a row of W; divides warps
    units: int = 1  # of 16 rows of W, that a warp multiplies by the same x
    blocks: int = 4  # of 64 columns that a warp has in flight: 1, 2 or 4
    per_sm: int = 1  # thread blocks on a multiprocessor

    @property
    def groups(self) -> int:
        """Groups of warps with rows of their own."""
        return self.warps // self.splits


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel's code depends on."""

    m: int
    n: int
    k: int
    rank: int
    double: bool  # whether scales are quantised
    tiles: Tiles
    grid: int

    @property
    def columns(self) -> int:
        """mma tiles of 8 rows of x."""
        return -(-self.m // 8)

    @property
    def chunk(self) -> int:
        """Blocks of 64 columns that a warp takes at a time: they divide a row."""
        return math.gcd(self.tiles.blocks, self.k // BLOCK)

    @property
    def chunks(self) -> int:
        return self.k // BLOCK // self.chunk

    @property
    def rows(self) -> int:
        """Rows of W that a thread block owns at most."""
        return 16 * -(-_units(self.n) // self.grid)

    @property
    def rank16(self) -> int:
        return -(-self.rank // 16) * 16

    @property
    def x_stays(self) -> bool:
        """Whether a lane has all x that it ever needs in registers: 8 for 8 rows of x and a block."""
        return self.columns <= 2 and self.chunks == self.tiles.splits

    @property
    def x_shared(self) -> bool:
        """Whether x is copied to shared memory: if it fits. Else it is read from device memory, by every step."""
        return not self.x_stays and self.scratch_bytes(True) * self.tiles.per_sm <= _SHARED

    @property
    def x_stride(self) -> int:
        """Bytes of a row of x; in shared memory, 16 more spread the rows of an mma over the banks."""
        return 2 * self.k + 16 * self.x_shared

    @property
    def sum_floats(self) -> int:
        """Partial sums of all warps for one unit each, twice."""
        return 2 * self.tiles.warps * self.columns * 8 * _COLUMN

    def scratch_bytes(self, with_x: bool) -> int:
        """Shared memory; each array may be aligned to 1024 bytes."""
        adapter = [self.rank16 * self.rows * 2, self.columns * 8 * (self.rank16 + 8) * 2] if self.rank else []
        x = [self.m * (2 * self.k + 16)] if with_x else []
        return sum(-(-size // 1024) * 1024 for size in (32 * 1024, 1024, 4 * self.sum_floats, *adapter, *x, 1024))


def why_not(x, w, a=None) -> str | None:
    """Reason why `matmul` cannot multiply x [M, K] by w [N, K] with factors a [K, R] and b; None if it can.

    Says nothing about the device, which must have compute capability 9.0.
    """
    if not isinstance(w, NF4Weight | NF4Layer):
        return "the weight is not NF4"
    if len(w.shape) != 2:
        return f"it takes one weight [N, K], got shape {w.shape}"
    (m, k), n = x.shape, w.shape[0]
    if m > MAX_ROWS:
        return f"it takes at most {MAX_ROWS} rows, got {m}"
    if k % BLOCK or _whole(w).absmax.ndim != _whole(w).packed.ndim:
        return f"K must be a multiple of {BLOCK}, got K = {k}"
    if x.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {x.dtype}"
    if n * k // 2 >= 2**31:
        return f"the packed weight must be smaller than 2 GiB, got {n} x {k}"
    if a is None:
        return None
    if a.shape[1] > _MAX_RANK:
        return f"the rank must be at most {_MAX_RANK}, got {a.shape[1]}"
    if (size := _plan(x, w, a, choose(m, n, k)).scratch_bytes(False)) > _SHARED:
        return f"rank {a.shape[1]} with N = {n} takes {size} bytes of shared memory, {_SHARED} are there"
    return None


def choose(m: int, n: int, k: int) -> Tiles:
    """The tiles for x [m, k] and w [n, k]."""
    # 16 warps have all columns of a row in flight, so x stays in registers. Measured for K = 4096 only.
    if m <= 16 and k in (1024, 2048, 4096):
        return Tiles(blocks=k // 1024)
    if m <= 8:
        return Tiles()
    if m <= 16:
        return Tiles(blocks=2, per_sm=2)  # with x read again: 27.4 us, two units of 16 warps 30.9 (K = 4096, M = 16)
    # x is read once, or twice, by each multiprocessor: as many groups as there are pairs of units, up to 4.
    owned = -(-_units(n) // sm_count())  # units of a multiprocessor
    groups = min(4, 1 << (-(-owned // 2) - 1).bit_length())
    return Tiles(warps=8, splits=8 // groups, units=2, blocks=2 if m <= 32 else 1)


def base_matmul(x: jax.Array, w: NF4Weight | NF4Layer) -> jax.Array:
    """x [M, K] times W^T: [M, N] in bfloat16."""
    return matmul(x, w)


def forward(x: jax.Array, w: NF4Weight | NF4Layer, a: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
    """(x W^T + x a b [M, N], None) for a [K, R], b [R, N]: x a is computed again in backward."""
    return matmul(x, w, a, b), None


def matmul(x, w: NF4Weight | NF4Layer, a=None, b=None, scale: float = 1.0, *, tiles: Tiles | None = None) -> jax.Array:
    """y [M, N] = x W^T + scale (x a) b for x bfloat16 [M, K], M <= 64, w NF4 [N, K], a [K, R], b [R, N].

    A layer of a stack is read where it lies, in a stack of any size. Raises NotImplementedError if `why_not` objects.
    """
    if (reason := why_not(x, w, a)) is not None:
        raise NotImplementedError(f"nf4 matmul (mosaic, few rows): {reason}")
    plan = _plan(x, w, a, tiles or choose(x.shape[0], *w.shape))
    w = with_one_index(w)
    index = {"index": w.index.reshape(1)} if isinstance(w, NF4Layer) else {}
    w = _whole(w)
    arrays = dict(x=x, packed=w.packed, absmax=w.absmax, table=jnp.asarray(_table()), **index)
    if w.nested_absmax is not None and w.nested_offset is not None and w.nested_code is not None:
        arrays |= dict(nested=w.nested_absmax, offset=w.nested_offset.reshape(-1), code=w.nested_code)
    if a is not None and b is not None:
        arrays |= dict(thin=_thin(x, a.astype(x.dtype)), b=(b if scale == 1 else scale * b).astype(x.dtype))
    scratch = dict(
        table_smem=plgpu.SMEM((256, 32), jnp.int32),
        code_smem=plgpu.SMEM((256,), jnp.float32),
        sums=plgpu.SMEM((plan.sum_floats,), jnp.float32),
    )
    if plan.x_shared:
        scratch["x_smem"] = plgpu.SMEM((plan.m, plan.x_stride // 4), jnp.int32)
    if plan.rank:
        scratch["b_smem"] = plgpu.SMEM((plan.rank16, plan.rows), jnp.bfloat16)
        scratch["thin_smem"] = plgpu.SMEM((plan.columns * 8, plan.rank16 + 8), jnp.bfloat16)
    out = jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype)
    return _call(_matmul_body, plan, "nf4_few_rows", arrays, out, scratch, plan.grid, plan.tiles.warps)


def _plan(x, w, a, tiles: Tiles) -> _Plan:
    (m, k), n = x.shape, w.shape[0]
    grid = min(_units(n), sm_count() * tiles.per_sm)
    return _Plan(m, n, k, 0 if a is None else a.shape[1], _whole(w).double_quantized, tiles, grid)


def _whole(w: NF4Weight | NF4Layer) -> NF4Weight:
    """The weight, or the stack that it is a layer of."""
    return w.stack if isinstance(w, NF4Layer) else w


def _units(n: int) -> int:
    return -(-n // 16)


def _thin(x, a):
    """Sums of x a over parts of K, float32 [parts, M, R]."""
    (m, k), r = x.shape, a.shape[1]
    plan = _Plan(m, r, k, r, False, Tiles(warps=16), _PARTS)
    scratch = dict(sums=plgpu.SMEM((16 * plan.columns * 8 * _COLUMN,), jnp.float32))
    out = jax.ShapeDtypeStruct((_PARTS, m, r), jnp.float32)
    return _call(_thin_body, plan, "nf4_few_rows_thin", dict(x=x, a=a), out, scratch, _PARTS * _units(r), 16)


def _call(body: Callable, plan: _Plan, name: str, arrays: dict, out, scratch: dict, grid: int, warps: int):
    """Runs a body that is written in single instructions, with the addresses of all arrays by name."""
    names = [*arrays, "out", *scratch]

    def kernel(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(ctx, *refs):
            body(plan, {key: ptx.address_of(ref) for key, ref in zip(names, refs, strict=True)})

        emit(*refs)

    call = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(grid,),
        grid_names=("block",),
        num_threads=warps // 4,
        thread_name="wg",
        scratch_types=list(scratch.values()),
        kernel_name=name,
    )
    return call(*arrays.values())


@functools.cache
def _table() -> np.ndarray:
    """int32 [256]: the bf16 pair of a byte's two codes; the high nibble is the even column, so it is the lower half."""
    bits = (CODE * _STRETCH).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return (bits[byte >> 4] | bits[byte & 15] << 16).view(np.int32)


# Places in memory, in bytes unless a name says otherwise. They work on registers of the kernel and on numpy arrays.


def _packed_place(row, block, quad, k):
    """8 bytes: columns 16 quad to 16 quad + 15 of a block."""
    return row * (k // 2) + block * 32 + quad * 8


def _x_place(row, block, quad, stride):
    """32 bytes: the same columns of x."""
    return row * stride + block * 128 + quad * 32


def _absmax_index(row, block, k):
    return row * (k // BLOCK) + block


def _table_place(byte, lane):
    return byte * 128 + lane * 4


def _sum_index(plan, turn, warp, column, row):
    """A float of the partial sums: `column` counts rows of x, `row` the 16 rows of a unit of W."""
    return ((turn * plan.tiles.warps + warp) * (plan.columns * 8) + column) * _COLUMN + row


_LOOK_UP = (
    "{ .reg .b32 i;"
    + "".join(
        f"{shift}; lop3.b32 i, i, 0x7f80, $5, 0xEA; add.u32 i, i, $6; ld.shared.b32 ${byte}, [i];"
        for byte, shift in enumerate(["shl.b32 i, $4, 7", *(f"shr.u32 i, $4, {8 * b - 7}" for b in (1, 2, 3))])
    )
    + "}"
)


# The kernels, in single instructions. Registers are ptx.Int (int32 and addresses) or MLIR values (float32).


def _of_layer(plan: _Plan, at: dict) -> dict:
    """The addresses; those of a stack's arrays, if the weight is a layer, moved on to where the layer begins."""
    if "index" not in at:
        return at
    index, blocks = ptx.uniform(ptx.load(at["index"], "b32")[0]), plan.n * plan.k // BLOCK
    sizes = {"packed": plan.n * plan.k // 2, "absmax": blocks * (1 if plan.double else 4)}
    if plan.double:
        sizes |= {"nested": 4 * -(-blocks // NESTED_BLOCK), "offset": 4, "code": 4 * 256}
    return at | {name: at[name].entry(index, size) for name, size in sizes.items()}


def _matmul_body(plan: _Plan, at: dict) -> None:
    at = _of_layer(plan, at)
    tiles, columns, chunk, chunks = plan.tiles, plan.columns, plan.chunk, plan.chunks
    units, splits, groups, threads = tiles.units, tiles.splits, tiles.groups, 32 * tiles.warps
    thread, warp = ptx.thread_and_warp()
    lane = thread % 32
    row, quad = lane // 4, lane % 4
    split, group = warp % splits, warp // splits
    block = ptx.block_number()
    base, extra = divmod(_units(plan.n), plan.grid)
    first = block * base + ptx.least(block, extra)
    count = base + ptx.select(block < extra, 1, 0)
    steps = (count + (groups * units - 1)) // (groups * units)
    start = ptx.least(split, chunks - 1)  # a warp without columns reads, but does not add

    def unit_of(step, group, unit):
        """Number of a unit among those of this thread block."""
        return (step * groups + group) * units + unit

    def rows_of(step, unit):
        """This lane's two rows of W; there is one to read even where there is none to compute."""
        top = (first + ptx.least(unit_of(step, group, unit), count - 1)) * 16 + row
        return [ptx.least(top + 8 * half, plan.n - 1) for half in range(2)]

    # What a lane has in flight: words of W [unit][block][half], then what scales are made of [unit][half].

    def word_pointers(step, c):
        return [
            [at["packed"].plus(_packed_place(r, c * chunk, quad, plan.k)) for r in rows_of(step, unit)]
            for unit in range(units)
        ]

    def load_words(pointers, j, step):
        """Of block j of a chunk."""
        if plan.x_stays:  # no loads after the last step
            real = step < steps
            return [[ptx.load_if(real, p, "L1::no_allocate.v2.b32", 32 * j) for p in pair] for pair in pointers]
        return [[ptx.load(p, "L1::no_allocate.L2::128B.v2.b32", 32 * j) for p in pair] for pair in pointers]

    def load_scales(step, c):
        """Lane `quad` of a row reads for block `quad` of the chunk; shuffles hand the scales round."""
        out = []
        for unit in range(units):
            for r in rows_of(step, unit):
                index = _absmax_index(r, c * chunk + ptx.least(quad, chunk - 1), plan.k)
                if plan.double:
                    code = ptx.load(at["absmax"].plus(index), "u8")[0]
                    nested = ptx.load_float(at["nested"].plus(index // NESTED_BLOCK * 4), "global")
                    out.append((code, nested))
                else:
                    out.append((ptx.load_float(at["absmax"].plus(index * 4), "global"),))
        return out

    def decode(raw):
        if not plan.double:
            return ptx.arithmetic("mul.rn.f32", raw[0], inverse)
        code = ptx.load_float(at["code_smem"] + raw[0] * 4, "shared")
        return ptx.arithmetic(
            "mul.rn.f32", ptx.arithmetic("add.rn.f32", ptx.arithmetic("mul.rn.f32", code, raw[1]), offset), inverse
        )

    # Prologue: everything that is read once, all of it in flight together, W first. No read-only path: its loads, and
    # then what waits for them, would rise above those of W.
    pointers = word_pointers(ptx.Int(0), start)
    words = [load_words(pointers, j, ptx.Int(0)) for j in range(chunk)]
    raw = load_scales(ptx.Int(0), start)

    x_full = _x_place(row, 0, quad, plan.x_stride)
    x_last = _x_place(ptx.least(row, plan.m - 1 - 8 * (columns - 1)), 0, quad, plan.x_stride)

    def load_x(c, j, column):
        """Eight words: this lane's 16 columns of row `row` of eight rows of x; rows that x lacks are its last one."""
        offset = 8 * column * plan.x_stride + 128 * j
        place = c * (128 * chunk) + (x_last if column == columns - 1 else x_full)
        if plan.x_shared:
            halves = [ptx.load_shared(at["x_smem"] + place, "v4.b32", offset + 16 * i) for i in range(2)]
        else:
            halves = [ptx.load(at["x"].plus(place), "v4.b32", offset + 16 * i) for i in range(2)]
        return [*halves[0], *halves[1]]

    x_kept = [[load_x(split, j, column) for column in range(columns)] for j in range(chunk)] if plan.x_stays else []
    ptx.keep_loads_above()
    inverse = ptx.constant(float(_INVERSE))
    offset = ptx.load_float(at["offset"], "global") if plan.double else None
    _fill_table(at, warp, lane, tiles.warps)
    if plan.double:
        for i in range(-(-256 // threads)):
            place = ptx.least(thread + i * threads, 255) * 4
            ptx.store(at["code_smem"] + place, ptx.load(at["code"].plus(place), "b32")[0], "shared.b32")
    if plan.x_shared:
        pieces = plan.k // 8  # of 16 bytes, in a row
        for i in range(-(-plan.m * pieces // threads)):
            piece = ptx.least(thread + i * threads, plan.m * pieces - 1)
            target = at["x_smem"] + piece // pieces * plan.x_stride + piece % pieces * 16
            ptx.copy_async(target, at["x"].plus(piece * 16))
    if plan.rank:
        _stage_adapter(plan, at, thread, threads, first)
    if plan.x_shared:
        ptx.wait_for_copies()
    gpu.barrier()

    lane_place = lane * 4

    def look_up(word):
        """The registers of the four bytes of a word."""
        return ptx.asm([ptx.I32] * 4, [word, lane_place, at["table_smem"]], _LOOK_UP, "=r,=r,=r,=r,r,r,r", True)

    def multiply(acc, words, raw, c, next_step, next_c):
        """Adds a chunk to the sums; its registers are filled with the next chunk as they become free."""
        scales = [decode(one) for one in raw]
        raw = load_scales(next_step, next_c)
        pointers = word_pointers(next_step, next_c)
        ahead_words = [load_words(pointers, j, next_step) for j in range(chunk)]
        ptx.keep_loads_above()
        acc = list(acc)
        for j in range(chunk):
            ahead = list(x_kept[j]) if plan.x_stays else [load_x(c, j, column) for column in range(min(columns, 2))]
            values = [[[v for word in half for v in look_up(word)] for half in words[j][unit]] for unit in range(units)]
            scale = [ptx.shuffle(s, j) for s in scales]
            for column in range(columns):
                x = ahead.pop(0)
                if column + 2 < columns:
                    ahead.append(load_x(c, j, column + 2))
                    ptx.keep_loads_above()  # nor do they rise above the last one and take too many registers
                for unit in range(units):
                    part = [ptx.constant(0.0)] * 4
                    top, bottom = values[unit]
                    for s in range(4):
                        left = [top[2 * s], bottom[2 * s], top[2 * s + 1], bottom[2 * s + 1]]
                        part = ptx.mma(left, x[2 * s : 2 * s + 2], part)
                    for i in range(4):
                        place = (unit * columns + column) * 4 + i
                        acc[place] = ptx.fma(scale[2 * unit + i // 2], part[i], acc[place])
        return acc, ahead_words, raw

    def tile(step, carry):
        words, raw = carry
        acc = _start(plan, at, lambda u: ptx.least(unit_of(step, group, u), count - 1), split, row, quad)
        if chunks == splits:
            acc, words, raw = multiply(acc, words, raw, split, step + 1, start)
        else:

            def turn(i, carry):
                acc, words, raw = carry
                c = i * splits + split
                more = c + splits < chunks
                return multiply(
                    acc, words, raw, c, ptx.select(more, step, step + 1), ptx.select(more, c + splits, start)
                )

            acc, words, raw = ptx.loop((chunks - 1 - split + splits) // splits, (acc, words, raw), turn)
        for unit in range(units):
            turn = (step * units + unit) % 2
            _store_sums(plan, at, turn, warp, row, quad, acc[4 * unit * columns : 4 * (unit + 1) * columns])
            gpu.barrier()
            total = groups * plan.m * 16
            here = ptx.again(thread)
            for i in range(-(-total // threads)):
                e = here + i * threads
                finish = functools.partial(
                    _finish, plan, at, e, first, count, turn, lambda g, u=unit: unit_of(step, g, u)
                )
                finish() if total % threads == 0 else ptx.when(e < total, finish)
        return words, raw

    ptx.loop(steps, (words, raw), tile)


def _store_sums(plan: _Plan, at: dict, turn, warp, row, quad, acc: list) -> None:
    """A warp's accumulators of one unit, [column][4], to shared memory."""
    first = at["sums"] + _sum_index(plan, turn, warp, 2 * quad, row) * 4
    for i, value in enumerate(acc):
        offset = _sum_index(plan, 0, 0, 8 * (i // 4) + i % 2, 8 * (i % 4 // 2)) * 4
        ptx.store(first, value, "shared.f32", offset)


def _finish(plan: _Plan, at: dict, e, first, count, turn, unit_of) -> None:
    """Adds the warps' sums of output e of a step and writes it."""
    splits = plan.tiles.splits
    row, rest = e % 16, e // 16
    column, group = rest % plan.m, rest // plan.m
    index = _sum_index(plan, turn, group * splits, column, row)
    apart = _sum_index(plan, 0, 1, 0, 0) * 4
    parts = [ptx.load_float(at["sums"] + index * 4, "shared", apart * s) for s in range(splits)]
    while len(parts) > 1:
        parts = [
            ptx.arithmetic("add.rn.f32", *parts[i : i + 2]) if i + 1 < len(parts) else parts[i]
            for i in range(0, len(parts), 2)
        ]
    unit = unit_of(group)
    n = (first + unit) * 16 + row
    target = at["out"].plus((column * plan.n + n) * 2)
    # A unit beyond the last of this thread block belongs to another one.
    ptx.when((unit < count) & (n < plan.n), lambda: ptx.store_bf16(target, parts[0], "global"))


def _start(plan: _Plan, at: dict, unit_of, split, row, quad) -> list:
    """Initial sums [unit][column][4] of a tile: (x A) B, 16 of the rank for each warp that shares the columns of K."""
    total = plan.tiles.units * plan.columns
    zero = [ptx.constant(0.0)] * (4 * total)
    if not plan.rank:
        return zero
    acc = zero
    for step in range(0, plan.rank16 // 16, plan.tiles.splits):
        q = split + step

        def add(q=q, acc=acc):
            out = []
            thin = at["thin_smem"] + (row * (plan.rank16 + 8) + q * 16 + quad * 2) * 2
            for unit in range(plan.tiles.units):
                place = at["b_smem"] + ((q * 16 + quad * 2) * plan.rows + unit_of(unit) * 16 + row) * 2
                left = []
                for k8 in (0, 8):
                    for half in (0, 8):
                        pair = [ptx.load_shared(place, "u16", 2 * ((k8 + i) * plan.rows + half))[0] for i in range(2)]
                        left.append(pair[0] | pair[1] * 65536)
                for column in range(plan.columns):
                    offset = 16 * column * (plan.rank16 + 8)
                    right = [ptx.load_shared(thin, "b32", offset + 16 * i)[0] for i in range(2)]
                    first = (unit * plan.columns + column) * 4
                    out += ptx.mma(left, right, acc[first : first + 4])
            return out

        acc = ptx.if_else(q < plan.rank16 // 16, add, lambda acc=acc: acc)
    return acc


def _stage_adapter(plan: _Plan, at: dict, thread, threads: int, first) -> None:
    """Copies this thread block's columns of B to shared memory, and x A as bf16, its parts added."""
    jobs = []
    for i in range(-(-plan.rank16 * plan.rows // threads)):
        e = ptx.least(thread + i * threads, plan.rank16 * plan.rows - 1)
        r, n = e // plan.rows, ptx.least(first * 16 + e % plan.rows, plan.n - 1)
        jobs.append((at["b"].plus((ptx.least(r, plan.rank - 1) * plan.n + n) * 2), r < plan.rank, at["b_smem"] + e * 2))
    for i in range(0, len(jobs), 8):
        loaded = [ptx.select(real, ptx.load(source, "u16")[0], 0) for source, real, _ in jobs[i : i + 8]]
        for value, (_, _, target) in zip(loaded, jobs[i : i + 8], strict=True):
            ptx.store(target, value, "shared.u16")
    for i in range(-(-plan.columns * 8 * plan.rank16 // threads)):
        e = ptx.least(thread + i * threads, plan.columns * 8 * plan.rank16 - 1)
        m, r = e // plan.rank16, e % plan.rank16
        source = at["thin"].plus((ptx.least(m, plan.m - 1) * plan.rank + ptx.least(r, plan.rank - 1)) * 4)
        parts = [ptx.load_float(source, "global", 4 * part * plan.m * plan.rank) for part in range(_PARTS)]
        total = functools.reduce(functools.partial(ptx.arithmetic, "add.rn.f32"), parts)
        total = ptx.select_float((m < plan.m) & (r < plan.rank), total, ptx.constant(0.0))
        ptx.store_bf16(at["thin_smem"] + (m * (plan.rank16 + 8) + r) * 2, total, "shared")


def _fill_table(at: dict, warp, lane, warps: int) -> None:
    """Every entry 32 times: eight lanes write one, four words each."""
    for i in range(64 // warps):
        entry = (warp + i * warps) * 4 + lane // 8
        value = ptx.load(at["table"].plus(entry * 4), "b32")[0]
        place = at["table_smem"] + _table_place(entry, lane % 8 * 4)
        ptx.asm([], [place, value], "st.shared.v4.b32 [$0], {$1, $1, $1, $1};", "r,r", True)


def _thin_body(plan: _Plan, at: dict) -> None:
    """Part of K `block`, 16 columns of A: mma.sync of A^T [16 r, 16 k] and x^T, K split among the warps once more."""
    warps, columns = plan.tiles.warps, plan.columns
    thread, warp = ptx.thread_and_warp()
    lane = thread % 32
    row, quad = lane // 4, lane % 4
    part, unit = ptx.block_number() % _PARTS, ptx.block_number() // _PARTS
    steps = plan.k // 16
    acc = [ptx.constant(0.0)] * (4 * columns)

    def fragments(i):
        step = (part * warps + warp) + i * (_PARTS * warps)
        real = step < steps
        k = ptx.least(step, steps - 1) * 16 + quad * 4  # a lane takes four contiguous columns of x
        left = []
        for pair in (0, 2):
            for half in (0, 8):
                r = unit * 16 + row + half
                source = at["a"].plus((k * plan.rank + ptx.least(r, plan.rank - 1)) * 2)
                low, high = (ptx.load(source, "nc.u16", 2 * (pair + j) * plan.rank)[0] for j in range(2))
                left.append(ptx.select(real & (r < plan.rank), low | high * 65536, 0))
        right = []
        for column in range(columns):
            m = ptx.least(row + 8 * column, plan.m - 1)
            words = ptx.load(at["x"].plus((m * plan.k + k) * 2), "nc.v2.b32")
            right.append([ptx.select(real, word, 0) for word in words])
        return left, right

    turns = -(-steps // (_PARTS * warps))
    for i in range(0, turns, 4):
        for left, right in [fragments(j) for j in range(i, min(i + 4, turns))]:
            for column in range(columns):
                acc[4 * column : 4 * column + 4] = ptx.mma(left, right[column], acc[4 * column : 4 * column + 4])
    _store_sums(plan, at, 0, warp, row, quad, acc)
    gpu.barrier()
    for i in range(-(-plan.m * 16 // (32 * warps))):
        e = thread + 32 * warps * i

        def finish(e=e):
            m, r = e // 16, unit * 16 + e % 16
            index = _sum_index(plan, 0, 0, m, e % 16)
            apart = _sum_index(plan, 0, 1, 0, 0) * 4
            parts = [ptx.load_float(at["sums"] + index * 4, "shared", apart * w) for w in range(warps)]
            total = functools.reduce(functools.partial(ptx.arithmetic, "add.rn.f32"), parts)
            target = at["out"].plus(((part * plan.m + m) * plan.rank + r) * 4)
            ptx.when(r < plan.rank, lambda: ptx.store(target, total, "global.f32"))

        ptx.when(e < plan.m * 16, finish)
