"""What a training step takes of several GPUs: bytes of each, bytes over the wire, and the time that both cost.

Weights of one device follow from the rules by which they are shared out, bytes over the wire from what the step sends;
tests hold both to programs that the compiler has made. Seconds are estimates: computing as `lora_jax.plan` counts it,
sending by the rates below. Whether sending hides behind computing is up to the compiler and was not measured here, so
both ends are given: all of it hidden, and none.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_jax.cards import Card, card_of
from lora_jax.plan import MEMORY_FRACTION, Workload, choose, memory, seconds
from lora_jax.remat import RematPlan

__all__ = [
    "NETWORK",
    "NVLINK",
    "PCIE",
    "Link",
    "MeshPlan",
    "Wire",
    "gpus_of",
    "plan_mesh",
    "plan_meshes",
    "step_seconds",
]
__all__ += ["wire"]


@dataclasses.dataclass(frozen=True)
class Link:
    """What a GPU receives over a kind of connection, as assumed."""

    name: str
    rate: float  # 1e9 bytes/s that collectives reach, of one GPU
    latency: float  # seconds of a collective without bytes


# About 0.8 of what is stated: 450 GB/s in each direction (NVLink 4), 32 (PCIe 4, 16 lanes, shared by both ends of a
# copy through the host), 50 (a port of 400 Gbit/s for each GPU).
NVLINK = Link("NVLink", 360, 15e-6)
PCIE = Link("PCIe", 20, 25e-6)
NETWORK = Link("network", 40, 30e-6)


class Wire(NamedTuple):
    """Bytes that one device receives in a step, as `lora_jax.tools.collectives` counts them."""

    weights: int  # packed layers, gathered over "fsdp"
    tokens: int  # activations to and from a vocabulary that "fsdp" shares out
    gradients: int  # of the adapters, added up over all devices
    collectives: int  # how many there are

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.tokens + self.gradients


def wire(work: Workload, whole: Workload, devices: Mapping[str, int]) -> Wire:
    """What a step sends on a mesh of "data" and "fsdp".

    Args:
      work: of one device.
      whole: the same with nothing shared out.
      devices: along "data" and "fsdp".
    """
    f, n = devices["fsdp"], devices["data"] * devices["fsdp"]
    weights = tokens = count = 0
    if f > 1:
        # Forward and backward gather every layer. The loss gathers all hidden states and scatters their gradients, the
        # embedding scatters its rows; ids and labels travel, and three numbers of each token are added up.
        weights = work.accumulation * 2 * _gathered(work, whole, f) * (f - 1) // f
        hidden = 3 * (f - 1) * work.tokens * work.config.hidden_size * work.itemsize
        small = (2 + 2 * 3) * (f - 1) * work.tokens * 4
        tokens = work.accumulation * (hidden + small) * _divides_vocabulary(whole, f)
        count = work.accumulation * (2 * 14 * work.config.num_layers + 8)
    # Large adapters that "fsdp" shares out are gathered and scattered instead, which is as much.
    gradients = 2 * (n - 1) * whole.adapters // n
    return Wire(weights, tokens, gradients, count + (n > 1))


def _gathered(work: Workload, whole: Workload, f: int) -> int:
    """Bytes of all layers' weights that `f` devices share out and gather: all but norms and second-level scales."""
    divided = (whole.weights - work.weights) * f // (f - 1)
    return divided - _tables(whole) if _divides_vocabulary(whole, f) else divided


def _tables(whole: Workload) -> int:
    """Bytes of the tables of the vocabulary, which are never gathered."""
    table = whole.config.vocab_size * whole.config.hidden_size * whole.itemsize
    return table * (1 if whole.config.tie_embeddings else 2 - whole.offload_embedding)


def _divides_vocabulary(whole: Workload, f: int) -> bool:
    return whole.config.vocab_size % f == 0


class MeshPlan(NamedTuple):
    """One mesh for one model."""

    devices: dict[str, int]
    work: Workload  # of one device
    plan: RematPlan | None  # what backward recomputes; None: nothing fits
    memory: int  # bytes of one device at the peak
    gathered: int  # of them for layers, and tokens of others, that have been gathered
    wire: Wire
    compute: float  # seconds of a step without sending


def plan_mesh(make: Callable[[Any], Workload], card: Card, devices: Mapping[str, int]) -> MeshPlan:
    """Plans a step on a mesh.

    Args:
      make: gives the step of one device on an abstract mesh; see `lora_jax.plan.of_config`.
      card: each device.
      devices: along "data" and "fsdp".
    """
    work, whole, f = make(abstract_mesh(devices)), make(abstract_mesh({})), devices["fsdp"]
    gathered = 0
    if f > 1:  # this layer and the next; hidden states of all, and their gradients
        gathered = 2 * _gathered(work, whole, f) // work.config.num_layers
        gathered += 2 * f * work.tokens * work.config.hidden_size * work.itemsize
    budget = int(MEMORY_FRACTION * card.memory) - gathered
    try:
        plan = choose(work, card, budget)
    except MemoryError:
        plan = None
    shown = plan or RematPlan.of("full")
    sent = wire(work, whole, devices)
    need = memory(work, shown, card).total + gathered
    return MeshPlan(dict(devices), work, plan, need, gathered, sent, sum(seconds(work, shown, card).values()))


def plan_meshes(make: Callable[[Any], Workload], card: Card, count: int, host: int) -> list[MeshPlan]:
    """The meshes of `count` devices: "fsdp" over 1, 2, 4 ... and all of them, "data" over the rest.

    The `host` devices of a host share the memory there that offloaded activations may take.
    """
    card, make = dataclasses.replace(card, host_memory=card.host_memory // host), functools.cache(make)
    sizes = [f for f in range(1, count + 1) if count % f == 0 and (f & (f - 1) == 0 or f == count)]
    plans = []
    for f in sizes:
        try:
            plans.append(plan_mesh(make, card, {"data": count // f, "fsdp": f}))
        except ValueError:  # rows that f does not divide
            continue
    return plans


def step_seconds(plan: MeshPlan, link: Link, host: int, network: Link = NETWORK) -> tuple[float, float]:
    """(all sending hidden behind computing, none of it) seconds of a step.

    Neighbours of a host hold one another's shares. What crosses hosts: of gradients, which are first added up within a
    host, the part of each GPU; of weights, if "fsdp" spans hosts, all that others hold, through the ports of all GPUs.

    Args:
      plan: of the mesh.
      link: within a host.
      host: GPUs of a host.
      network: between hosts.
    """
    f, n = plan.devices["fsdp"], plan.devices["data"] * plan.devices["fsdp"]
    inside = plan.wire.total / (link.rate * 1e9) + plan.wire.collectives * link.latency
    hosts, spanned = -(-n // host), -(-f // host)
    outside = 0.0
    if hosts > 1:
        outside += plan.wire.gradients / host / (network.rate * 1e9) + 2 * math.log2(hosts) * network.latency
    if spanned > 1:
        shared = (plan.wire.weights + plan.wire.tokens) * (spanned - 1) / spanned / ((f - 1) / f)
        outside += shared / host / (network.rate * 1e9) + plan.wire.collectives * network.latency
    sending = inside + outside
    return max(plan.compute, sending), plan.compute + sending


def gpus_of(text: str) -> tuple[int, int, Card]:
    """(devices, devices of a host, card) of "4x48GB", "8xH100", or "2x8xH100" (two hosts of eight).

    Raises:
      ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\d+)\s*x\s*(\S.*)", text, re.IGNORECASE)
    if match is None or not int(match[2]) or not int(match[1] or 1):
        raise ValueError(f"gpus: got {text!r}; wanted such as 4x48GB, 8xH100, or 2x8xH100 for two hosts of eight")
    count = int(match[2])
    host = count if match[1] else min(count, 8)
    return int(match[1] or 1) * count, host, card_of(match[3])


def abstract_mesh(devices: Mapping[str, int]) -> Any:
    """A mesh without devices, of these sizes."""
    from jax.sharding import AbstractMesh

    from lora_jax.kernels.parallel import AXES

    return AbstractMesh(tuple(devices.get(axis, 1) for axis in AXES), AXES)
