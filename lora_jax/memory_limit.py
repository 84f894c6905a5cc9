"""A limit for what a process takes of its GPU: to share a card, or to try what a smaller one can do."""

import os
import subprocess

from lora_jax.cards import GIB, parse_bytes

__all__ = ["BESIDE_THE_POOL", "limit_memory"]

# What CUDA, cuBLAS and cuDNN take of a card beside JAX's pool of memory, rounded up.
BESIDE_THE_POOL = int(0.75 * GIB)


def limit_memory(limit: str | int) -> None:
    """Lets this process take at most so much of its GPU, as if the card had no more: CUDA's own share included.

    JAX takes its pool of memory once, when it first looks at the GPU, so call this before anything else.

    Args:
      limit: bytes, or text such as "12GB" (2^30 bytes each, as cards are sold).

    Raises:
      ValueError: the limit is no amount of memory, too little for a GPU's own needs, or more than the card has.
      RuntimeError: there is no NVIDIA GPU, or JAX took its memory before.
    """
    size, total = parse_bytes(limit), _total_memory()
    if size <= 2 * BESIDE_THE_POOL:
        raise ValueError(
            f"memory_limit={limit!r}: CUDA and its libraries take {BESIDE_THE_POOL / GIB:.2f} GiB; allow more"
        )
    if size > total:
        raise ValueError(f"memory_limit={limit!r}: the GPU has {total / GIB:.1f} GiB")
    pool = size - BESIDE_THE_POOL
    os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{pool / total:.5f}"
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name
    import jax

    taken = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if taken is None:
        raise RuntimeError(f"memory_limit={limit!r}: JAX runs on {jax.local_devices()[0]}, which has no limit to set")
    if taken > 1.01 * pool:
        raise RuntimeError(
            f"memory_limit={limit!r}: JAX took {taken / GIB:.1f} GiB of the GPU before the limit was set. Set it "
            "first: call lora_jax.limit_memory before anything that asks JAX for its devices or makes an array"
        )


def _total_memory() -> int:
    """Bytes of the first GPU that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *(["-i", visible] if visible else [])], capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("memory_limit: nvidia-smi was not found, which says what memory the GPU has") from None
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"memory_limit: nvidia-smi says of no GPU what memory it has: {done.stderr or done.stdout}")
    return int(float(done.stdout.split()[0]) * 2**20)
