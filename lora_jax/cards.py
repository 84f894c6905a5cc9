"""GPUs: what their makers state, how they are called, and how much memory is meant by "24GB"."""

import dataclasses
import os
import re

from lora_jax.config import did_you_mean

__all__ = ["CARDS", "GIB", "HOST_LIMIT", "Card", "card_of", "parse_bytes", "this_card"]

GIB = 2**30
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # lets XLA pin more than 64 GB, if it is set before JAX starts


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU: what its maker states."""

    name: str
    memory: int  # bytes
    tflops: float  # 1e12 operations/s of bfloat16 matmuls with float32 sums, without sparsity
    bandwidth: float  # 1e9 bytes/s of its memory
    host_bandwidth: float = 25  # 1e9 bytes/s to and from the host's memory
    host_memory: int = 64 * 10**9  # bytes of the host's memory that XLA pins at most, unless it is told otherwise

    @property
    def hopper(self) -> bool:
        """Whether the kernels for Hopper run on it."""
        return self.name.startswith(("H100", "H200"))


def _cards() -> tuple[Card, ...]:
    rows = (
        ("RTX 3060", 12, 25, 360),
        ("RTX 4060 Ti", 16, 44, 288),
        ("T4", 16, 65, 320),
        ("RTX 4080", 16, 97, 717),
        ("RTX 3090", 24, 71, 936),
        ("A10", 24, 70, 600),
        ("A10G", 24, 70, 600),
        ("L4", 24, 121, 300),
        ("RTX 4090", 24, 165, 1008),
        ("RTX 5090", 32, 210, 1792, 50),
        ("A100 40GB", 40, 312, 1555),
        ("RTX A6000", 48, 155, 768),
        ("RTX 6000 Ada", 48, 364, 960),
        ("L40S", 48, 362, 864),
        ("A100 80GB", 80, 312, 2039),
        ("H100", 80, 989, 3350, 50),
        ("H200", 141, 989, 4800, 50),
    )
    return tuple(Card(name, memory * GIB, *rest) for name, memory, *rest in rows)


CARDS = _cards()


def parse_bytes(text: str | int | float) -> int:
    """Bytes from a number of them or from text such as "24GB" (2^30 bytes each, as cards are sold), "800 MiB".

    Raises:
      ValueError: it is neither.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return int(text)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise ValueError(f"memory: got {text!r}; wanted bytes, or a number with a unit such as 24GB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def card_of(text: str) -> Card:
    """A card by its name ("H100", "rtx 4090", "NVIDIA A100-SXM4-80GB") or by its memory alone ("24GB").

    Raises:
      ValueError: neither.
    """
    words = set(re.findall(r"[a-z0-9]+", text.casefold().replace("rtx", "")))
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        if set(card.name.casefold().removeprefix("rtx ").split()) <= words:
            return card
    try:
        size = parse_bytes(text)
    except ValueError:
        known = [card.name for card in CARDS]
        wrong = f"gpu: {text!r} is no size such as 24GB and none of the cards known here: {', '.join(known)}."
        raise ValueError(f"{wrong}{did_you_mean(text, known)}") from None
    like = min(CARDS, key=lambda card: (abs(card.memory - size), -card.tflops))
    return dataclasses.replace(like, name=f"{size / GIB:g} GB (as fast as {like.name})", memory=size)


def this_card() -> Card:
    """The card of the first device; of one that is not known here, the speed is that of an H100 and means little."""
    import jax

    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    try:
        card = card_of(device.device_kind)
    except ValueError:
        card = dataclasses.replace(card_of("H100"), name=device.device_kind)
    return dataclasses.replace(card, memory=limit, host_memory=_host_memory())


def _host_memory() -> int:
    """Bytes that a step may keep in this host's memory: what XLA pins at most, and four fifths of what is there."""
    allowed = int(float(os.environ.get(HOST_LIMIT, 64)) * 10**9)
    try:
        return min(allowed, int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    except (AttributeError, ValueError, OSError):  # not a system that says
        return allowed
