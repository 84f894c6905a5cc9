"""Measures which form of the NF4 linear layer is fastest on this GPU, and keeps the answer for `lora_matmul`.

    python -m lora_jax.tools.tune_kernels
    python -m lora_jax.tools.tune_kernels --shapes 14336x4096 4096x14336 --rows 1 16 64 128 --out table.json

For each shape N x K and number of rows every form is compiled, compared with XLA's result and timed (the sum of its
kernels, with weights that come from device memory). What differs from XLA by more than rounding is reported and left
out. The table goes to `~/.cache/lora-jax/tuning.json` (or $LORA_JAX_TUNING, or --out), where later programs find it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

SHAPES = ("14336x4096", "4096x14336", "4096x4096", "1024x4096")
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
RANK = 16
# Two ways to round a weight to bfloat16 differ by 2^-9 of it in root mean square; a wrong tile differs by far more.
TOLERANCE = 2**-7
ONE_TILES: tuple[dict[str, Any], ...] = (  # a single row
    {},
    {"rows": 32, "blocks": 4},
    {"warps": 8},
)
FEW_TILES: tuple[dict[str, Any], ...] = ({}, {"shuffle": True}, {"bn": 128}, {"warps": 2, "bn": 32})
MANY_TILES: tuple[dict[str, Any], ...] = ({}, {"bm": 128, "bn": 128, "warps": 8}, {"bm": 256, "bn": 64, "warps": 8})


def main() -> None:
    """Tunes every shape, prints the times and writes the table."""
    from lora_jax.kernels.dispatch import tuning_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[_shape(s) for s in SHAPES], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="numbers of rows to measure")
    parser.add_argument("--out", type=Path, default=tuning_file(), help="JSON file to add to (%(default)s)")
    args = parser.parse_args()
    import jax

    if jax.default_backend() != "gpu":
        parser.error(f"tuning needs an NVIDIA GPU, JAX runs on {jax.default_backend()}")
    table = json.loads(args.out.read_text()) if args.out.is_file() else {}
    shapes = [{"n": n, "k": k, "rows": table_rows(tune(n, k, sorted(args.rows)))} for n, k in args.shapes]
    table.setdefault(jax.devices()[0].device_kind, {})["lora_matmul"] = shapes
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside = args.out.with_suffix(".tmp")
    aside.write_text(json.dumps(table, indent=1) + "\n")
    aside.replace(args.out)
    print(f"wrote {args.out}")


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def table_rows(best: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table of one shape from the best forms at increasing numbers of rows.

    A form holds up to the geometric mean of the last number of rows where it was best and the next; the last form holds
    for all more.
    """
    rows: list[dict[str, Any]] = []
    for i, (m, form) in enumerate(best):
        limit = math.isqrt(m * best[i + 1][0]) if i + 1 < len(best) else None
        if rows and {**rows[-1], "m": None} == {"m": None, **form}:
            rows[-1]["m"] = limit
        else:
            rows.append({"m": limit, **form})
    return rows


def tune(n: int, k: int, all_rows: list[int]) -> list[tuple[int, dict[str, Any]]]:
    """(rows, {"forward", "dx" and, where they are not the default, "tiles"}) for a weight [N, K]."""
    import jax

    from lora_jax.tools.bench_kernels import nf4_weight, normal

    count = max(2, 2 * 10**8 // (n * k // 2))
    weights = [nf4_weight(seed, n, k) for seed in range(min(count, 32))]
    a, b = normal(1, (k, RANK), k**-0.5, "float32"), normal(2, (RANK, n), 0.02, "float32")
    best = []
    for m in all_rows:
        x, dy = normal(3, (m, k)), normal(4, (m, n))
        chosen: dict[str, Any] = {}
        for direction in ("forward", "dx"):
            operand = x if direction == "forward" else dy
            sets = [(operand, w, a, b) for w in weights]
            times = {}
            want = jax.jit(_call("xla", direction, None))(*sets[0])
            for name, tiles in _forms(direction, m):
                label = name + "".join(f" {key}={value}" for key, value in (tiles or {}).items())
                us = _measure(_call(name, direction, tiles), sets, want)
                print(
                    f"{n}x{k}, {m} rows, {direction}, {label}: {us if isinstance(us, str) else f'{us:.1f} us'}",
                    flush=True,
                )
                if not isinstance(us, str):
                    times[us] = name, tiles
            name, tiles = times[min(times)]
            chosen |= {direction: name, **({"tiles": tiles} if tiles else {})}
        best.append((m, chosen))
    return best


def _forms(direction: str, m: int) -> list[tuple[str, dict[str, Any] | None]]:
    """(implementation, tiles) to try; the table holds tiles for forward only."""
    tiles = ONE_TILES if m == 1 else FEW_TILES if m <= 64 else MANY_TILES
    tiles = tiles if direction == "forward" else ({},)
    return [("triton", None), *(("triton_in_loop", t) for t in tiles), ("mosaic", None), ("xla", None)]


def _call(name: str, direction: str, tiles: dict[str, Any] | None):
    """The layer or its dx as a function of (operand, w, a, b)."""
    from lora_jax.kernels.nf4 import matmul

    def call(operand, w, a, b):
        factors = a.astype(operand.dtype), b.astype(operand.dtype)
        module = matmul._module(name)
        if direction == "dx":
            return module.input_gradient(operand, w, *factors)[0]
        options = {"tiles": tuple(tiles.items())} if tiles else {}
        return module.forward(operand, w, *factors, **options)[0]

    return call


def _measure(f, sets, want) -> float | str:
    """Microseconds of one call, or why it cannot be used."""
    import jax
    import jax.numpy as jnp

    from lora_jax.tools.measure import kernel_times

    try:
        got = jax.jit(f)(*sets[0])
        difference, size = (jnp.linalg.norm(v.astype(jnp.float32)) for v in (got - want, want))
        if not (relative := float(difference / size)) <= TOLERANCE:
            return f"differs from XLA by {relative:.2g}"
        return sum(us for _, us in kernel_times(f, sets))
    except Exception as error:  # measured is what runs; the reason is printed
        return f"{type(error).__name__}: {str(error)[:200]}"


if __name__ == "__main__":
    main()
