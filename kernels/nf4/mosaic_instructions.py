"""Single instructions for Pallas Mosaic GPU kernels (`plgpu.inline_mgpu`) that are written as for one thread, in PTX.

Registers are `Int` (int32, and addresses: 32 bits in shared memory, 64 in device memory) or MLIR values (float32).
Instructions are those of the PTX ISA; only what the kernels of this folder use is here.
"""

from collections.abc import Callable

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

__all__ = [
    "F32",
    "I32",
    "Int",
    "address_of",
    "again",
    "arithmetic",
    "asm",
    "block_number",
    "constant",
    "copy_async",
    "fma",
    "if_else",
    "keep_loads_above",
    "least",
    "load",
    "load_float",
    "load_if",
    "load_shared",
    "loop",
    "mma",
    "select",
    "select_float",
    "shuffle",
    "store",
    "store_bf16",
    "thread_and_warp",
    "uniform",
    "wait_for_copies",
    "when",
]

I32, F32 = "i32", "f32"


class Int:
    """An int32, an address of shared memory (int32) or of device memory (int64) in a register, with operators."""

    def __init__(self, value):
        i32 = ir.IntegerType.get_signless(32)
        self.value = arith.constant(i32, value) if isinstance(value, int) else value

    def __add__(self, other):
        return Int(arith.addi(self.value, Int.raw(other)))

    def __sub__(self, other):
        return Int(arith.subi(self.value, Int.raw(other)))

    def __rsub__(self, other):
        return Int(other) - self

    def __mul__(self, other):
        return Int(arith.muli(self.value, Int.raw(other)))

    def __floordiv__(self, other):
        return Int(arith.divui(self.value, Int.raw(other)))

    def __mod__(self, other):
        return Int(arith.remui(self.value, Int.raw(other)))

    def __and__(self, other):
        return Int(arith.andi(self.value, Int.raw(other)))

    def __or__(self, other):
        return Int(arith.ori(self.value, Int.raw(other)))

    def __lt__(self, other):
        return Int(arith.cmpi(arith.CmpIPredicate.slt, self.value, Int.raw(other)))

    __radd__, __rmul__ = __add__, __mul__

    def plus(self, place: "Int") -> "Int":
        """A device address and a 32-bit number of bytes, unsigned."""
        return Int(arith.addi(self.value, arith.extui(ir.IntegerType.get_signless(64), place.value)))

    def entry(self, index: "Int", size: int) -> "Int":
        """A device address and `index` times `size` bytes, in 64 bits; neither is negative."""
        i64 = ir.IntegerType.get_signless(64)
        return Int(arith.addi(self.value, arith.muli(arith.extui(i64, index.value), arith.constant(i64, size))))

    @staticmethod
    def raw(other):
        """The MLIR value."""
        return (other if isinstance(other, Int) else Int(other)).value


def least(x, y):
    """The smaller of two numbers, neither negative."""
    return Int(arith.minsi(Int.raw(x), Int.raw(y)))


def select(condition: Int, x, y) -> Int:
    """x where the condition holds, else y."""
    return Int(arith.select(condition.value, Int.raw(x), Int.raw(y)))


def thread_and_warp() -> tuple[Int, Int]:
    """Numbers in the thread block; the second is `uniform`."""
    thread = Int(utils.thread_idx())
    return thread, uniform(thread // 32)


def uniform(value: Int) -> Int:
    """A number that is equal in all lanes, which the compiler now knows, too."""
    return asm([I32], [value], "shfl.sync.idx.b32 $0, $1, 0, 0x1f, -1;", "=r,r", True)[0]


def block_number() -> Int:
    """Number of the thread block, of a grid of one dimension."""
    return Int(arith.index_cast(ir.IntegerType.get_signless(32), gpu.block_id(gpu.Dimension.x)))


def address_of(ref) -> Int:
    """Of the first element: 32 bits in shared memory, 64 in device memory."""
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))
    if utils.is_smem_ref(ref):
        return Int(arith.trunci(ir.IntegerType.get_signless(32), address))
    return Int(address)


def asm(outputs: list[str], inputs: list, text: str, constraints: str, effects: bool) -> list:
    """Inline assembly; those that touch memory or other lanes keep their order."""
    kinds = [ir.Type.parse(kind) for kind in outputs]
    kind = None if not kinds else kinds[0] if len(kinds) == 1 else llvm.StructType.get_literal(kinds)
    values = [v.value if isinstance(v, Int) else v for v in inputs]
    out = llvm.inline_asm(kind, values, text, constraints, asm_dialect=0, has_side_effects=effects)
    if not kinds:
        return []
    many = [out] if len(kinds) == 1 else [llvm.extractvalue(kind, out, [i]) for i, kind in enumerate(kinds)]
    return [Int(v) if name == I32 else v for v, name in zip(many, outputs, strict=True)]


def load(address: Int, kind: str, offset: int = 0) -> list[Int]:
    """One, two or four int32 of device memory that nobody writes to."""
    return _words("global." + kind, address, "l", offset)


def load_if(condition: Int, address: Int, kind: str, offset: int = 0) -> list[Int]:
    """Two int32 of device memory that nobody writes to; where the condition does not hold, zeros and no load."""
    text = f"""{{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;
        @p ld.global.{kind} {{$0, $1}}, [$2 + {offset}]; }}"""
    return asm([I32] * 2, [address, select(condition, 1, 0)], text, "=&r,=&r,l,r", True)


def load_shared(address: Int, kind: str, offset: int = 0) -> list[Int]:
    """One, two or four int32 of shared memory."""
    return _words("shared." + kind, address, "r", offset)


def _words(kind: str, address: Int, register: str, offset: int) -> list[Int]:
    count = next((c for c in (2, 4) if f".v{c}." in kind), 1)
    targets = ", ".join(f"${i}" for i in range(count))
    targets = f"{{{targets}}}" if count > 1 else targets
    text = f"ld.{kind} {targets}, [${count} + {offset}];"
    return asm([I32] * count, [address], text, ",".join(["=r"] * count + [register]), True)


def load_float(address: Int, space: str, offset: int = 0):
    """A float32 of "shared" or "global" memory."""
    register = "r" if space == "shared" else "l"
    return asm([F32], [address], f"ld.{space}.f32 $0, [$1 + {offset}];", f"=f,{register}", True)[0]


def store(address: Int, value, kind: str, offset: int = 0) -> None:
    """A register to memory; `kind`: "shared.b32", "global.f32" ..."""
    registers = ("r" if kind.startswith("shared") else "l") + (",f" if kind.endswith("f32") else ",r")
    asm([], [address, value], f"st.{kind} [$0 + {offset}], $1;", registers, True)


def store_bf16(address: Int, value, space: str) -> None:
    """A float32, rounded to bf16, to memory."""
    register = "r" if space == "shared" else "l"
    text = f"{{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.{space}.b16 [$0], h; }}"
    asm([], [address, value], text, f"{register},f", True)


def copy_async(target: Int, source: Int) -> None:
    """16 bytes of device memory to shared memory."""
    asm([], [target, source], "cp.async.cg.shared.global [$0], [$1], 16;", "r,l", True)


def wait_for_copies() -> None:
    """Until this thread's `copy_async` are done."""
    asm([], [], "cp.async.wait_all;", "", True)


def constant(value: float):
    """A float32."""
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), value))


def keep_loads_above() -> None:
    """Loads (but not those through the read-only path) do not sink below this to where their values are used."""
    asm([], [], "bar.warp.sync -1;", "", True)


def again(value: Int) -> Int:
    """The same number, hidden from the compiler, which would keep all that follows from it in registers for good."""
    return asm([I32], [value], "mov.b32 $0, $1;", "=r,r", True)[0]


def select_float(condition: Int, x, y):
    """x where the condition holds, else y, both float32."""
    return arith.select(condition.value, x, y)


def arithmetic(name: str, x, y):
    """An instruction on two float32."""
    return asm([F32], [x, y], f"{name} $0, $1, $2;", "=f,f,f", False)[0]


def fma(x, y, z):
    """x y + z in float32."""
    return asm([F32], [x, y, z], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", False)[0]


def shuffle(value, quad: int):
    """The value of lane `quad` of each four lanes."""
    return asm([F32], [value], f"shfl.sync.idx.b32 $0, $1, {quad}, 0x1c1f, -1;", "=f,f", True)[0]


def mma(left: list, right: list, acc: list) -> list:
    """acc [16, 8] + left [16, 16] right [16, 8]: PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    text = """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"""
    return asm([F32] * 4, [*left, *right, *acc], text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", True)


def _raw_tree(tree):
    return jax.tree.map(lambda v: v.value if isinstance(v, Int) else v, tree)


def loop(bound: Int, carry, body: Callable):
    """for i in range(bound): carry = body(i, carry), with registers in any tree."""
    flat, tree = jax.tree.flatten(carry)
    wrapped = [isinstance(v, Int) for v in flat]

    def wrap(values):
        return jax.tree.unflatten(tree, [Int(v) if w else v for v, w in zip(values, wrapped, strict=True)])

    zero, one = Int(0).value, Int(1).value
    loop = scf.ForOp(zero, bound.value, one, _raw_tree(flat))
    with ir.InsertionPoint(loop.body):
        result = body(Int(loop.induction_variable), wrap(loop.inner_iter_args))
        scf.YieldOp(_raw_tree(jax.tree.leaves(result)))
    return wrap(loop.results)


def when(condition: Int, body: Callable) -> None:
    """Runs a body in the threads where the condition holds."""
    with utils.when(condition.value):
        body()


def if_else(condition: Int, then: Callable, otherwise: Callable) -> list:
    """float32 registers that one of two functions returns."""
    values = otherwise()
    branch = scf.IfOp(condition.value, [ir.F32Type.get()] * len(values), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(then())
    with ir.InsertionPoint(branch.regions[1].blocks[0]):
        scf.YieldOp(values)
    return list(branch.results)
