"""`lora-jax doctor`: what of this machine matters to training, each kernel run once, and what to mend.

A check yields findings; each says how it stands, and what to do where something is wrong.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.cards import GIB

__all__ = ["Finding", "check", "check_kernels"]

# What the CUDA runtimes of JAX's plugins want of the driver.
_LEAST_DRIVER = {"cuda13": 580, "cuda12": 525}
# Relative error allowed between two implementations in bfloat16: sums of K products rounded to 8 bits differ by about
# 2^-8 of their size; a wrong kernel is off by a multiple of it.
TOLERANCE = 0.02


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str  # "ok", "note" (works, could be better), "wrong", or "-" (nothing to check here)
    text: str
    fix: str = ""


def check(*, kernels: bool = True) -> Iterator[Finding]:
    """Every check, one after another. Starts the JAX backend.

    Args:
      kernels: whether the kernels are run, which takes a minute of compiling on a GPU.
    """
    yield from _packages()
    cards = _cards()
    yield from _driver(cards)
    yield (backend := _backend(cards))
    if backend.state == "wrong":  # what follows would speak of another device
        return
    yield from _memory(cards)
    yield from _folders()
    if kernels:
        yield from check_kernels()


# ---- software -----------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 12)
    yield Finding("Python", "ok" if good else "wrong", python, "" if good else "use Python 3.12 or newer")
    try:
        wanted = [Requirement(line) for line in metadata.requires("lora-jax") or ()]
        yield Finding("lora-jax", "ok", metadata.version("lora-jax"))
    except metadata.PackageNotFoundError:
        yield Finding("lora-jax", "note", "run from a source folder", "pip install -e . in it")
        return
    found, wrong = [], []
    for requirement in wanted:
        if requirement.marker is not None:  # of an extra
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(requirement.name, "wrong", "not installed", f'pip install "{requirement}"'))
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            text = f"{version}, but {requirement.specifier} is needed"
            wrong.append(Finding(requirement.name, "wrong", text, f'pip install "{requirement}"'))
    yield Finding("packages", "ok", ", ".join(found))
    yield from wrong


# ---- GPU ----------------------------------------------------------------------------------------------------------


class _Card(NamedTuple):
    name: str
    driver: str
    total: int  # bytes
    used: int


def _cards() -> list[_Card]:
    """What nvidia-smi knows; [] where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    cards = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, driver, total, used = (part.strip() for part in line.split(","))
        cards.append(_Card(name, driver, *(int(float(n)) * 2**20 for n in (total, used))))
    return cards


def _plugin() -> str | None:
    """ "cuda13" or "cuda12", whichever of JAX's plugins is installed."""
    for kind in _LEAST_DRIVER:
        try:
            metadata.version(f"jax-{kind}-plugin")
        except metadata.PackageNotFoundError:
            continue
        return kind
    return None


def _driver(cards: list[_Card]) -> Iterator[Finding]:
    if not cards:
        fix = "" if shutil.which("nvidia-smi") is None else "nvidia-smi is there but finds no card: check the driver"
        yield Finding("GPU", "-" if not fix else "wrong", "no NVIDIA GPU was found", fix)
        return
    for number, card in enumerate(cards):
        yield Finding(f"GPU {number}", "ok", f"{card.name}, {card.total / GIB:.1f} GiB, driver {card.driver}")
    major = int(cards[0].driver.split(".")[0])
    best = next((kind for kind, least in _LEAST_DRIVER.items() if major >= least), None)
    if best is None:
        text = f"{cards[0].driver} is older than {_LEAST_DRIVER['cuda12']}, the least that CUDA 12 runs on"
        yield Finding("driver", "wrong", text, "install a newer NVIDIA driver")
        return
    plugin = _plugin()
    if plugin is None:
        yield Finding("CUDA", "wrong", "JAX is installed without CUDA", f'pip install "lora-jax[{best}]"')
    elif major < _LEAST_DRIVER[plugin]:
        text = f"JAX is installed for {plugin}, which wants driver {_LEAST_DRIVER[plugin]}; here is {cards[0].driver}"
        fix = f'pip uninstall jax-{plugin}-plugin jax-{plugin}-pjrt, then pip install "lora-jax[{best}]"'
        yield Finding("CUDA", "wrong", text, fix)
    else:
        ours, jaxlib = metadata.version(f"jax-{plugin}-plugin"), metadata.version("jaxlib")
        same = ours == jaxlib
        fix = "" if same else f'pip install "jax-{plugin}-plugin=={jaxlib}" "jax-{plugin}-pjrt=={jaxlib}"'
        yield Finding("CUDA", "ok" if same else "wrong", f"jax-{plugin}-plugin {ours}, jaxlib {jaxlib}", fix)


def _backend(cards: list[_Card]) -> Finding:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        fix = "unset JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else "see the lines above"
        return Finding("JAX", "wrong", f"no backend starts: {str(error).splitlines()[0]}", fix)
    text = f"{jax.default_backend()}: {len(devices)} x {devices[0].device_kind}"
    capability = getattr(devices[0], "compute_capability", None)
    if jax.default_backend() == "gpu":
        old = capability is not None and float(capability) < 8
        fix = "cards of the Ampere family and newer have bfloat16, which training uses" if old else ""
        return Finding("JAX", "note" if old else "ok", f"{text}, compute capability {capability}", fix)
    if not cards:
        return Finding("JAX", "note", f"{text}; everything runs, slowly", "train on a machine with an NVIDIA GPU")
    platforms = os.environ.get("JAX_PLATFORMS")
    fix = f"unset JAX_PLATFORMS, which is {platforms!r}" if platforms else "see the line on CUDA"
    return Finding("JAX", "wrong", f"{text}, though there is a GPU", fix)


def _memory(cards: list[_Card]) -> Iterator[Finding]:
    import jax

    from lora_jax.plan import MEMORY_FRACTION

    stats = jax.local_devices()[0].memory_stats() or {}
    if not cards or (pool := stats.get("bytes_limit")) is None:
        yield Finding("memory", "-", "JAX takes what it needs of this device")
        return
    card = cards[0]
    share = pool / card.total
    text = f"JAX may take {pool / GIB:.1f} of {card.total / GIB:.1f} GiB ({100 * share:.0f} %)"
    low = share < 0.9
    fix = f"XLA_CLIENT_MEM_FRACTION={MEMORY_FRACTION} in the environment gives it more" if low else ""
    yield Finding("memory pool", "note" if low else "ok", text, fix)
    if card.used > 2 * GIB:  # counted before JAX took its pool
        text = f"hold {card.used / GIB:.1f} GiB of the GPU"
        yield Finding("other programs", "note", text, "nvidia-smi names them; `--memory-limit` leaves room for them")


def _folders() -> Iterator[Finding]:
    from lora_jax.kernels.dispatch import tuning, tuning_file
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    import jax

    folder = Path(jax.config.jax_compilation_cache_dir or "")  # pyright: ignore[reportAttributeAccessIssue]
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    good = os.access(parent, os.W_OK)
    free = f"{shutil.disk_usage(parent).free / GIB:.0f} GiB free"
    fix = "" if good else "set JAX_COMPILATION_CACHE_DIR to a folder that can be written"
    yield Finding("compile cache", "ok" if good else "note", f"{folder}, {free}", fix)
    try:
        shapes = tuning("lora_matmul")
    except ValueError as error:
        yield Finding("tuning", "wrong", str(error), f"delete {tuning_file()}")
        return
    if jax.default_backend() == "gpu":
        fix = "" if shapes else "python -m lora_jax.tools.tune_kernels measures this GPU (some minutes)"
        text = f"{len(shapes)} shapes of the NF4 layer were measured on such a GPU"
        yield Finding("tuning", "ok" if shapes else "note", text, fix)


# ---- kernels ------------------------------------------------------------------------------------------------------


def check_kernels(only: set[str] | None = None, *, interpret: bool = False) -> Iterator[Finding]:
    """Runs every implementation of every op once, forward and backward, and compares it with the XLA one.

    Args:
      only: names of ops; None for all.
      interpret: run them without a GPU, too, in Pallas' interpreter, where they can be: slow, for tests.
    """
    import jax

    if jax.default_backend() != "gpu" and not interpret:
        yield Finding("kernels", "-", "not run: they need an NVIDIA GPU; XLA does their work here")
        return
    for op, (make, names) in _ops().items():
        if only is not None and op not in only:
            continue
        run = make()
        reference = _numbers(run("xla"))
        for name in names:
            yield _compare(f"{op}, {name}", functools.partial(run, name), reference)


def _compare(what: str, run: Callable[[], Any], reference: list[Any]) -> Finding:
    import numpy as np

    try:
        got = _numbers(run())
    except NotImplementedError as error:
        return Finding(what, "-", str(error).partition("cannot do this call: ")[2] or str(error))
    except Exception as error:  # whatever a compiler says is what there is to report
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        return Finding(what, "wrong", text, "report it with this output; lora_jax.kernels.dispatch.using avoids it")
    errors = [np.linalg.norm(g - r) / max(np.linalg.norm(r), 1e-30) for g, r in zip(got, reference, strict=True)]
    worst = float(np.max(errors))
    good = worst <= TOLERANCE  # False for NaN
    text = f"differs from XLA by {worst:.1e} at most, of values and gradients"
    return Finding(what, "ok" if good else "wrong", text, "" if good else f"more than {TOLERANCE}: report it")


def _numbers(tree: Any) -> list[Any]:
    import jax
    import numpy as np

    return [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]


def _ops() -> dict[str, tuple[Callable[[], Callable[[str], Any]], tuple[str, ...]]]:
    """Op -> (a maker of its run by implementation: values and gradients, the implementations beside XLA)."""
    return {
        "lora_matmul": (_matmul_case, ("triton", "triton_in_loop", "mosaic")),
        "lora_matmuls": (_matmuls_case, ("triton",)),
        "lora_mlp": (_mlp_case, ("triton",)),
        "flash_attention": (_attention_case, ("cudnn", "triton", "mosaic")),
        "flash_attention, packed": (functools.partial(_attention_case, packed=True), ("triton", "mosaic")),
        "grouped_lora_matmul": (_grouped_case, ("triton", "mosaic")),
        "grouped_lora_mlp": (_experts_case, ("triton",)),
        "linear_cross_entropy": (_loss_case, ("mosaic",)),
        "rms_norm": (_norm_case, ("triton",)),
    }


def _random(*shapes: tuple[int, ...]) -> list[Any]:
    """Normal arrays in bfloat16, divided by the root of their last axis where they are matrices."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.bfloat16) for shape in shapes]


def _with_gradients(function: Callable[..., Any], *arguments: Any) -> Any:
    """Values of a function of arrays, and the gradients of the sum of their products with fixed numbers."""
    import jax
    import jax.numpy as jnp

    def loss(*arguments):
        values = function(*arguments)
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(values)]
        weights = [jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape) for leaf in leaves]
        return sum(jnp.vdot(w, leaf) for w, leaf in zip(weights, leaves, strict=True)), leaves

    every = tuple(range(len(arguments)))
    (_, values), gradients = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*arguments)
    return values, gradients


def _factors(k: int, n: int, rank: int = 16, lead: tuple[int, ...] = ()) -> tuple[Any, Any]:
    import jax.numpy as jnp

    a, b = _random((*lead, rank, k), (*lead, n, rank))
    return jnp.swapaxes(a, -1, -2).astype(jnp.float32), jnp.swapaxes(b, -1, -2).astype(jnp.float32)


def _matmul_case() -> Callable[[str], Any]:
    from lora_jax.kernels.nf4 import lora_matmul, quantize

    x, w = _random((256, 512), (384, 512))
    packed, (a, b) = quantize(w), _factors(512, 384)

    def run(name):
        return _with_gradients(lambda x, a, b: lora_matmul(x, packed, a, b, 2.0, implementation=name), x, a, b)

    return run


def _projections(*widths: tuple[int, int]) -> tuple[list[Any], list[tuple[Any, Any]]]:
    from lora_jax.kernels.nf4 import quantize

    return [quantize(w) for w in _random(*((n, k) for k, n in widths))], [_factors(k, n) for k, n in widths]


def _matmuls_case() -> Callable[[str], Any]:
    from lora_jax.kernels.nf4.shared_input import Projection, lora_matmuls

    weights, factors = _projections((512, 512), (512, 128), (512, 128))
    (x,) = _random((256, 512))

    def op(name, x, factors):
        layers = [Projection(w, a, b, 2.0) for w, (a, b) in zip(weights, factors, strict=True)]
        return lora_matmuls(x, layers, implementation=name)

    return lambda name: _with_gradients(functools.partial(op, name), x, factors)


def _mlp_case() -> Callable[[str], Any]:
    from lora_jax.kernels.nf4.mlp import lora_mlp
    from lora_jax.kernels.nf4.shared_input import Projection

    weights, factors = _projections((512, 1024), (512, 1024), (1024, 512))
    (x,) = _random((256, 512))

    def op(name, x, factors):
        layers = [Projection(w, a, b, 2.0) for w, (a, b) in zip(weights, factors, strict=True)]
        return lora_mlp(x, *layers, implementation=name)

    return lambda name: _with_gradients(functools.partial(op, name), x, factors)


def _attention_case(packed: bool = False) -> Callable[[str], Any]:
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.kernels.attention.attention import flash_attention

    length = 256
    q, k, v = (x * 64**0.5 for x in _random((2, length, 4, 64), (2, length, 2, 64), (2, length, 2, 64)))
    start = jnp.asarray(np.where(np.arange(length) < 100, 0, 100)[None].repeat(2, 0), jnp.int32) if packed else None

    def run(name):
        return _with_gradients(
            lambda q, k, v: flash_attention(q, k, v, segment_start=start, implementation=name), q, k, v
        )

    return run


def _grouped_case() -> Callable[[str], Any]:
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.grouped import grouped_lora_matmul
    from lora_jax.kernels.nf4 import quantize

    x, w = _random((256, 512), (4, 256, 512))
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(quantize, w))
    sizes, (a, b) = jnp.asarray([100, 0, 29, 120], jnp.int32), _factors(512, 256, lead=(4,))

    def run(name):
        return _with_gradients(
            lambda x, a, b: grouped_lora_matmul(x, packed, sizes, a, b, 2.0, implementation=name), x, a, b
        )

    return run


def _experts_case() -> Callable[[str], Any]:
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.grouped import grouped_lora_mlp
    from lora_jax.kernels.nf4 import quantize
    from lora_jax.kernels.nf4.shared_input import Projection

    (x,), stacks = _random((256, 512)), _random((4, 256, 512), (4, 256, 512), (4, 512, 256))
    packed = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(quantize, w)) for w in stacks]
    factors = [_factors(k, n, lead=(4,)) for k, n in ((512, 256), (512, 256), (256, 512))]
    sizes, scores = jnp.asarray([100, 0, 29, 120], jnp.int32), jnp.linspace(0.1, 1, 256)

    def op(name, x, scores, factors):
        gate, up, down = (Projection(w, a, b, 2.0) for w, (a, b) in zip(packed, factors, strict=True))
        return grouped_lora_mlp(x, gate, up, down, sizes, scores, implementation=name)

    return lambda name: _with_gradients(functools.partial(op, name), x, scores, factors)


def _loss_case() -> Callable[[str], Any]:
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.kernels.loss.linear_cross_entropy import Head, linear_cross_entropy

    x, w = _random((256, 512), (4096, 512))
    x, labels = x * 512**0.5, jnp.asarray(np.random.default_rng(1).integers(0, 4096, 256), jnp.int32)

    def run(name):
        return _with_gradients(lambda x: linear_cross_entropy(x, Head(w), labels, implementation=name)[0], x)

    return run


def _norm_case() -> Callable[[str], Any]:
    from lora_jax.kernels.rms_norm import add_rms_norm

    x, residual, weight = _random((256, 512), (256, 512), (512,))
    x, residual, weight = x * 512**0.5, residual * 512**0.5, weight + 1

    def run(name):
        return _with_gradients(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, implementation=name), x, residual, weight)

    return run
