"""The Mosaic GPU kernel for few rows: its instructions, run in numpy anywhere, and the kernel on a Hopper GPU."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from lora_jax.kernels.nf4 import dequantize, lora_matmul, quantize
from lora_jax.kernels.nf4 import mosaic_few as mf
from lora_jax.kernels.nf4 import mosaic_instructions as ptx
from lora_jax.kernels.nf4.format import CODE, NF4Layer, NF4Weight

SCALE = 2.0


def float64(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def problem(m, n, k, rank, double_quantize):
    """x [m, k], weight, LoRA factors (None for rank 0)."""
    rng = np.random.default_rng(m + n + k)
    w = quantize(jnp.asarray(rng.normal(size=(n, k)) * 0.02, jnp.float32), double_quantize)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    if not rank:
        return x, w, None, None
    a = jnp.asarray(rng.normal(size=(k, rank)) / np.sqrt(k), jnp.float32)
    return x, w, a, jnp.asarray(rng.normal(size=(rank, n)) * 0.02, jnp.float32)


def forward64(x, w, a, b):
    base = float64(x) @ float64(dequantize(w, jnp.float32)).T
    return base if a is None else base + SCALE * (float64(x) @ float64(a)) @ float64(b)


class Machine:
    """Thread blocks of a kernel, all threads of one in step; every value is an array over its threads.

    Checks addresses, alignment, that all threads meet at barriers, and that no warp reads from shared memory, or
    overwrites, what another one writes, or reads, between the same two barriers.
    """

    def __init__(self, operations, device: list[np.ndarray], shared: dict[str, int], threads: int):
        self.operations, self.device, self.threads = operations, device, threads
        self.sizes = list(shared.values())

    def run(self, grid: int, arguments) -> None:
        for block in range(grid):
            self.index, self.epoch, self.values = block, 1, {}
            self.shared = [np.full(size, 0xFF, np.uint8) for size in self.sizes]  # NaN, if it is ever used
            self.marks = [np.zeros((4, size), np.int32) for size in self.sizes]  # epoch and warp of last write, read
            places = [(i + 1) << 36 for i in range(len(self.device))] + [(i + 1) << 20 for i in range(len(self.shared))]
            for argument, place in zip(arguments, places, strict=True):
                self.values[argument] = np.full(self.threads, place, np.int64)
            self.block(self.operations, np.ones(self.threads, bool))

    def block(self, operations, mask) -> list:
        for op in operations:
            name = op.operation.name
            operands = [self.values[v] for v in op.operation.operands]
            if name in ("scf.yield", "func.return"):
                return operands
            for result, value in zip(op.operation.results, self.execute(op, name, operands, mask), strict=True):
                self.values[result] = value
        return []

    def execute(self, op, name, operands, mask) -> list:
        attributes = op.operation.attributes
        if name == "scf.for":
            low, high, step, *carry = operands
            body = op.operation.regions[0].blocks[0]
            i = low
            while (active := mask & (i < high)).any():
                for argument, value in zip(body.arguments, [i, *carry], strict=True):
                    self.values[argument] = value
                new = self.block(body.operations, active)
                carry = [np.where(active, n, c) for n, c in zip(new, carry, strict=True)]
                i = i + step
            return carry
        if name == "scf.if":
            sides = []
            for region, active in zip(op.operation.regions, (mask & operands[0], mask & ~operands[0]), strict=True):
                blocks = list(region.blocks)
                sides.append(self.block(blocks[0].operations, active) if blocks and active.any() else None)
            then, otherwise = sides
            if then is None or otherwise is None:
                return (then or otherwise or []) if len(op.operation.results) else []
            return [np.where(operands[0], t, o) for t, o in zip(then, otherwise, strict=True)]
        if name == "gpu.barrier":
            assert mask.all(), "a barrier that some threads do not reach"
            self.epoch += 1
            return []
        if name.startswith("gpu."):
            dimension = re.search(r"dim<?\s*(\w)", str(attributes["dimension"])).group(1)
            if name == "gpu.block_id":
                return [np.full(self.threads, self.index if dimension == "x" else 0)]
            value = {"gpu.thread_id": np.arange(self.threads), "gpu.block_dim": np.full(self.threads, self.threads)}
            return [value[name] if dimension == "x" else np.full(self.threads, int(name == "gpu.block_dim"))]
        if name == "llvm.inline_asm":
            out = self.assembly(ir.StringAttr(attributes["asm_string"]).value, op, operands, mask)
            return [out] if len(op.operation.results) else []
        if name == "llvm.extractvalue":
            return [operands[0][ir.DenseI64ArrayAttr(attributes["position"])[0]]]
        kind = op.operation.results[0].type
        if name == "arith.constant":
            number = (
                ir.FloatAttr(attributes["value"])
                if isinstance(kind, ir.F32Type)
                else ir.IntegerAttr(attributes["value"])
            )
            dtype = np.float32 if isinstance(kind, ir.F32Type) else np.int64
            return [np.full(self.threads, number.value, dtype)]
        if name == "arith.cmpi":
            assert ir.IntegerAttr(attributes["predicate"]).value == 2  # signed less than
            return [operands[0] < operands[1]]
        arithmetic = {
            "arith.addi": lambda x, y: x + y,
            "arith.subi": lambda x, y: x - y,
            "arith.muli": lambda x, y: x * y,
            "arith.divui": lambda x, y: x // y,
            "arith.remui": lambda x, y: x % y,
            "arith.andi": lambda x, y: x & y,
            "arith.ori": lambda x, y: x | y,
            "arith.minsi": np.minimum,
            "arith.select": np.where,
            "arith.extui": lambda x: x & 0xFFFFFFFF,
            "arith.index_cast": lambda x: x,
        }
        result = arithmetic[name](*operands)
        return [result.astype(np.int32).astype(np.int64) if str(kind) == "i32" else result]

    def assembly(self, text, op, operands, mask):
        """Runs the few PTX instructions that the kernel is written in."""
        results = op.operation.results
        count = 0
        if len(results):
            kind = str(results[0].type)
            count = kind.count("i32") + kind.count("f32")
        names = {f"${count + i}": value for i, value in enumerate(operands)}
        text = re.sub(r"^\{(.*)\}$", r"\1", text.strip(), flags=re.DOTALL)
        for statement in filter(None, (part.strip() for part in text.split(";"))):
            active = mask
            if statement.startswith("@p "):
                statement, active = statement.removeprefix("@p "), mask & names["p"]
            opcode, _, rest = statement.partition(" ")
            if opcode == ".reg":
                continue
            self.instruction(opcode, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest), names, active)
        out = [names[f"${i}"] for i in range(count)]
        return out[0] if count == 1 else out

    def instruction(self, opcode, operands, names, mask):
        def read(text):
            if text in names:
                return names[text]
            return np.full(self.threads, int(text, 0), np.int64)

        def split(text):
            return re.findall(r"[^,\s{}]+", text)

        def unsigned(text):
            return read(text) & 0xFFFFFFFF

        parts = opcode.split(".")
        if parts[0] in ("ld", "st") or opcode == "cp.async.cg.shared.global":
            space = "shared" if parts[1] == "shared" or parts[0] == "cp" else "global"
            if parts[0] == "cp":
                target, source = (read(operands[i].strip("[]")) for i in (0, 1))
                self.write("shared", target, self.read("global", source, 16, mask), mask)
                return
            width = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
            size = {"8": 1, "16": 2, "32": 4}[re.sub(r"\D", "", parts[-1])]
            place = operands[1 if parts[0] == "ld" else 0].strip("[]").split(" + ")
            address = read(place[0]) + (int(place[1]) if len(place) > 1 else 0)
            assert (address[mask] % (size * width) == 0).all(), (opcode, "unaligned")
            if parts[0] == "ld":
                data = self.read(space, address, size * width, mask)
                for i, name in enumerate(split(operands[0])):
                    piece = np.ascontiguousarray(data[:, size * i : size * (i + 1)])
                    if parts[-1] == "f32":
                        value = piece.view(np.float32)[:, 0]
                    else:
                        piece = piece.view({1: np.uint8, 2: np.uint16, 4: np.int32}[size])
                        value = piece[:, 0].astype(np.int64)
                    names[name] = np.where(mask, value, names.get(name, value))
            else:
                pieces = []
                for name in split(operands[1]):
                    value = read(name)
                    value = value if value.dtype == np.float32 else value.astype({2: np.uint16, 4: np.uint32}[size])
                    pieces.append(np.ascontiguousarray(value).view(np.uint8).reshape(self.threads, -1))
                self.write(space, address, np.concatenate(pieces, axis=1), mask)
        elif parts[0] == "mma":
            warps = self.threads // 32
            left, right, start = (np.stack([read(n) for n in split(t)], -1) for t in operands[1:])
            result = mma(*(v.reshape(warps, 32, -1) for v in (left, right, start))).reshape(self.threads, 4)
            for i, name in enumerate(split(operands[0])):
                names[name] = result[:, i]
        elif parts[0] == "shfl":
            value, lane = read(operands[1]), np.arange(self.threads)
            segment = {"0x1f": 32, "0x1c1f": 4}[operands[3]]
            names[operands[0]] = value[lane - lane % segment + read(operands[2])]
        elif opcode == "mov.b32":
            names[operands[0]] = read(operands[1])
        elif opcode == "setp.ne.b32":
            names[operands[0]] = read(operands[1]) != read(operands[2])
        elif opcode in ("cp.async.wait_all", "bar.warp.sync"):
            pass
        elif opcode == "cvt.rn.bf16.f32":
            names[operands[0]] = read(operands[1]).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int64)
        elif parts[-1] == "f32":
            x, y, *z = (read(n).astype(np.float64) for n in operands[1:])
            result = x + y if parts[0] == "add" else x * y + (z[0] if z else 0)
            names[operands[0]] = result.astype(np.float32)
        else:
            x, y, *z = (unsigned(n) for n in operands[1:])
            result = {
                "shl": lambda: x << y,
                "shr": lambda: x >> y,
                "add": lambda: x + y,
                "lop3": lambda: x & y | z[0],
            }[parts[0]]()
            assert parts[0] != "lop3" or operands[4] == "0xEA"
            names[operands[0]] = (result & 0xFFFFFFFF).astype(np.uint32).astype(np.int32).astype(np.int64)

    def places(self, space, address, size, mask):
        shift, memory = (20, self.shared) if space == "shared" else (36, self.device)
        number = address[mask][0] >> shift
        offset = np.where(mask, address - (number << shift), 0)
        memory = memory[number - 1]
        assert offset.min() >= 0, (space, number, "before the array")
        assert offset.max() + size <= memory.size, (space, number, "behind the array", offset.max(), memory.size)
        return number - 1, memory, offset[:, None] + np.arange(size)

    def read(self, space, address, size, mask):
        if not mask.any():
            return np.zeros((self.threads, size), np.uint8)
        number, memory, places = self.places(space, address, size, mask)
        if space == "shared":
            marks, places_, warp = self.marks[number], places[mask], np.arange(self.threads)[mask, None] // 32 + 1
            assert not ((marks[0][places_] == self.epoch) & (marks[1][places_] != warp)).any(), "race: read"
            both = (marks[2][places_] == self.epoch) & (marks[3][places_] != warp)
            marks[3][places_] = np.where(both, -1, np.broadcast_to(warp, places_.shape))
            marks[2][places_] = self.epoch
            again = marks[3][places_] != warp  # several warps in one instruction
            marks[3][places_] = np.where(again, -1, marks[3][places_])
        return memory[places]

    def write(self, space, address, data, mask):
        if not mask.any():
            return
        number, memory, places = self.places(space, address, data.shape[1], mask)
        places, data = places[mask], data[mask]
        if space == "shared":
            marks, warp = self.marks[number], np.arange(self.threads)[mask, None] // 32 + 1
            assert not ((marks[2][places] == self.epoch) & (marks[3][places] != warp)).any(), "race: write after read"
            other = (marks[0][places] == self.epoch) & (marks[1][places] != warp)
            assert not (other & (memory[places] != data)).any(), "race: two writes"
            marks[0][places], marks[1][places] = self.epoch, warp
        memory[places] = data


def bf16_pair(words):
    """int32 [...] -> float64 [..., 2], lower half first."""
    bits = np.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).astype(np.uint16)
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def mma(left, right, start):
    """mma.sync.m16n8k16 of warps: registers [warps, 32, 4], [warps, 32, 2], float32 [warps, 32, 4].

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
    """
    lane = np.arange(32)
    row, quad = lane // 4, lane % 4
    a, b, c = (np.zeros((left.shape[0], *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    for i in range(4):
        for half in range(2):
            a[:, row + 8 * (i % 2), quad * 2 + half + 8 * (i // 2)] = bf16_pair(left[..., i])[..., half]
    for i in range(2):
        for half in range(2):
            b[:, quad * 2 + half + 8 * i, row] = bf16_pair(right[..., i])[..., half]
    for i in range(4):
        c[:, row + 8 * (i // 2), quad * 2 + i % 2] = start[..., i]
    c += a @ b
    return np.stack([c[:, row + 8 * (i // 2), quad * 2 + i % 2] for i in range(4)], -1).astype(np.float32)


def emulate(body, plan, name, arrays, out, scratch, grid, warps):
    """In place of mosaic_few._call: the kernel's instructions are written as for a GPU, and run in numpy."""
    assert warps % 4 == 0
    device = [np.asarray(v).reshape(-1).view(np.uint8).copy() for v in arrays.values()]
    device.append(np.full(np.prod(out.shape) * out.dtype.itemsize, 0xFF, np.uint8))
    sizes = {key: int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for key, s in scratch.items()}
    with mlir.make_ir_context(), ir.Location.unknown():
        i64, i32 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32)
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            kernel = func.FuncOp("kernel", ([i64] * len(device) + [i32] * len(sizes), []))
            entry = kernel.add_entry_block()
        with ir.InsertionPoint(entry):
            names = [*arrays, "out", *scratch]
            body(plan, {key: ptx.Int(v) for key, v in zip(names, entry.arguments, strict=True)})
            func.ReturnOp([])
        Machine(entry.operations, device, sizes, 32 * warps).run(grid, entry.arguments)
    return jnp.asarray(device[-1].view(out.dtype).reshape(out.shape))


def check(m, n, k, rank, double_quantize, tiles):
    """The error is at most 1.1 times that of the standard computation, whose weight is rounded more."""
    x, w, a, b = problem(m, n, k, rank, double_quantize)
    assert mf.why_not(x, w, a) is None
    y = float64(mf.matmul(x, w, a, b, SCALE, tiles=tiles))
    want = forward64(x, w, a, b)
    standard = float64(lora_matmul(x, w, a, b, SCALE, implementation="xla"))
    assert np.linalg.norm(y - want) <= 1.1 * np.linalg.norm(standard - want)
    return y


@pytest.fixture
def in_numpy(monkeypatch):
    monkeypatch.setattr(mf, "_call", emulate)
    monkeypatch.setattr(mf, "sm_count", lambda: 3)


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "double_quantize", "tiles"),
    [
        pytest.param(*case, marks=pytest.mark.rotate("17 rows or more" if case[0] > 16 else "16 rows or fewer"))
        for case in (
            (1, 70, 64, 0, False, mf.Tiles(warps=4, splits=4)),  # K is less than one block for each warp
            (3, 77, 192, 5, True, mf.Tiles(warps=4, splits=2)),  # warps with different numbers of blocks, two groups
            (16, 130, 512, 16, True, mf.Tiles(warps=8, splits=8, units=2, blocks=2)),
            (17, 129, 1024, 40, True, mf.Tiles(warps=4, splits=4, per_sm=4)),  # x does not fit into shared memory
            (64, 96, 256, 17, False, mf.Tiles(warps=4, splits=1, units=2, blocks=1)),
            (9, 100, 320, 256, True, mf.Tiles(warps=16, splits=16, per_sm=2)),  # the adapter takes every warp
        )
    ],
)
def test_instructions(m, n, k, rank, double_quantize, tiles, in_numpy):
    check(m, n, k, rank, double_quantize, tiles)


def check_layers(m, n, k, rank, double_quantize, tiles):
    """Every layer of a stack gives bitwise what the weight gives that is cut out, and other numbers than its likes."""
    x, _, a, b = problem(m, n, k, rank, double_quantize)
    rng = np.random.default_rng(0)
    single = [
        quantize(jnp.asarray(rng.normal(size=(n, k)) * s, jnp.float32), double_quantize) for s in (0.02, 0.03, 0.05)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    wanted = [float64(mf.matmul(x, w, a, b, SCALE, tiles=tiles)) for w in single]
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    for i, want in enumerate(wanted):
        layer = NF4Layer(stack, jnp.int32(i))
        assert mf.why_not(x, layer, a) is None
        np.testing.assert_array_equal(float64(mf.matmul(x, layer, a, b, SCALE, tiles=tiles)), want)


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "double_quantize", "tiles"),
    [
        (3, 77, 192, 5, True, mf.Tiles(warps=4, splits=2)),
        (9, 40, 256, 0, False, mf.Tiles(warps=4, splits=4, blocks=1)),
    ],
)
def test_layers_of_a_stack(m, n, k, rank, double_quantize, tiles, in_numpy, monkeypatch):
    monkeypatch.setattr(NF4Layer, "cut", lambda layer: pytest.fail("the layer was cut out"))
    check_layers(m, n, k, rank, double_quantize, tiles)


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "double_quantize", "tiles"),
    [
        pytest.param(*case, marks=pytest.mark.rotate("9 rows or more" if case[0] > 8 else "8 rows or fewer"))
        for case in (
            (1, 149, 1024, 16, True, mf.Tiles(warps=4, splits=4)),  # thread blocks of three and four units
            (1, 33, 64, 0, False, mf.Tiles(warps=4, splits=1, blocks=1)),  # groups without a unit
            (8, 70, 256, 5, False, mf.Tiles(warps=4, splits=4, blocks=1)),
            (9, 117, 512, 5, False, mf.Tiles(warps=8, splits=4, units=2, blocks=2)),
            (16, 209, 256, 0, True, mf.Tiles(warps=4, splits=4, blocks=1)),
            (16, 131, 1024, 16, False, None),
            (3, 35, 4096, 16, True, None),
        )
    ],
)
def test_x_in_registers(m, n, k, rank, double_quantize, tiles, in_numpy, monkeypatch):
    """As exact as the other form, and equal to it: the order of all sums is the same."""
    x, w, a, _ = problem(m, n, k, rank, double_quantize)
    assert mf._plan(x, w, a, tiles or mf.choose(m, n, k)).x_stays
    y = check(m, n, k, rank, double_quantize, tiles)
    monkeypatch.setattr(mf._Plan, "x_stays", False)
    np.testing.assert_array_equal(y, check(m, n, k, rank, double_quantize, tiles))


def test_words_are_read_once(in_numpy, monkeypatch):
    """With x in registers, a warp reads no words for a step after its last one."""
    bytes_read, read = [], Machine.read

    def count(machine, space, address, size, mask):
        if space == "global" and size == 8:
            bytes_read.append(size * int(mask.sum()))
        return read(machine, space, address, size, mask)

    monkeypatch.setattr(Machine, "read", count)
    check(1, 160, 512, 0, True, mf.Tiles(warps=4, splits=4, blocks=2))
    assert sum(bytes_read) == 160 * 512 // 2


def test_shared_memory_suffices_for_every_shape(monkeypatch):
    monkeypatch.setattr(mf, "sm_count", lambda: 132)
    for m in (1, 8, 9, 16, 17, 32, 64):
        for k in (64, 192, 1024, 2048, 4096, 5120, 14336, 28672):
            for n in (40, 1024, 4096, 14336, 28672):
                w = NF4Weight.abstract((n, k), True)
                x, a = jnp.zeros((m, k), jnp.bfloat16), jnp.zeros((k, 64))
                plan = mf._plan(x, w, a, mf.choose(m, n, k))
                assert mf.why_not(x, w, a) is None
                assert plan.scratch_bytes(plan.x_shared) <= mf._SHARED, plan
                assert plan.x_stays == (m <= 16 and k in (1024, 2048, 4096)), plan


@pytest.mark.parametrize("blocks", [4, 2])  # with 2, x is in registers
def test_the_machine_sees_a_missing_barrier(blocks, in_numpy, monkeypatch):
    monkeypatch.setattr(mf.gpu, "barrier", lambda: None)
    with pytest.raises(AssertionError, match="race"):
        check(3, 40, 256, 5, True, mf.Tiles(warps=4, splits=2, blocks=blocks))


def test_table_holds_the_pair_of_a_byte():
    values = bf16_pair(mf._table()) / float(mf._STRETCH)
    byte = np.arange(256)
    # bf16 has 8 significant bits.
    np.testing.assert_allclose(values, CODE[np.stack([byte >> 4, byte & 15], -1)], rtol=2**-8)


def test_why_not_names_what_it_cannot_do():
    x = jnp.zeros((2, 128), jnp.bfloat16)
    w = NF4Weight.abstract((130, 128), True)
    assert mf.why_not(x, w) is None
    assert "float32" in str(mf.why_not(x.astype(jnp.float32), w))
    assert "K = 96" in str(mf.why_not(x[:, :96], NF4Weight.abstract((64, 96), True)))
    assert "not NF4" in str(mf.why_not(x, jnp.zeros((128, 128), jnp.bfloat16)))
    assert "64 rows" in str(mf.why_not(jnp.zeros((65, 128), jnp.bfloat16), w))
    assert "rank" in str(mf.why_not(x, w, jnp.zeros((128, 257))))
    with pytest.raises(NotImplementedError, match="float32"):
        mf.matmul(x.astype(jnp.float32), w)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [None, mf.Tiles(warps=8, splits=4, units=2, per_sm=2)])
@pytest.mark.parametrize("double_quantize", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [
        (1, 1000, 4096, 16),
        (3, 77, 192, 5),
        (16, 2050, 4096, 0),
        (11, 4100, 4160, 16),
        (17, 129, 64, 40),
        (64, 4097, 4096, 256),
    ],
)
def test_kernel_against_float64(m, n, k, rank, double_quantize, tiles):
    first, second = (check(m, n, k, rank, double_quantize, tiles) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "rank"), [(1, 16), (16, 16), (40, 0)])
def test_kernel_on_layers_of_a_stack(m, rank):
    check_layers(m, 4100, 4096, rank, True, None)
