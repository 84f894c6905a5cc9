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
from lora_jax.plan import MEMORY_FRACTION, Workload, choose, layer_widths, memory, seconds
from lora_jax.remat import ALL, RematPlan

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


# NVLink 4 as four H100s reached it without NVLS, together with their waiting for each other: steps of 8B and 70B on two
# and four took 34 to 247 ms longer than alone by these numbers, and 38 to 219 by the clock. Of the others about 0.8 of
# what is stated: 32 GB/s (PCIe 4, 16 lanes, shared by both ends of a copy through the host), 50 (a port of 400 Gbit/s
# for each GPU).
NVLINK = Link("NVLink", 280, 80e-6)
PCIE = Link("PCIe", 20, 25e-6)
NETWORK = Link("network", 40, 30e-6)


class Wire(NamedTuple):
    """Bytes that one device receives in a step, as `lora_jax.tools.collectives` counts them."""

    weights: int  # packed layers, gathered over "fsdp"
    tokens: int  # activations to and from a vocabulary that "fsdp" shares out
    between: int  # activations of layers, over "tensor", "context" and "expert"
    gradients: int  # of the adapters, added up over all devices
    collectives: int  # how many there are

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.tokens + self.between + self.gradients


def wire(make: Callable[[Any], Workload], devices: Mapping[str, int], plan: RematPlan | None = None) -> Wire:
    """What a step sends on a mesh.

    Args:
      make: gives the step of one device on an abstract mesh, its rows whole; see `lora_jax.plan.of_config`.
      devices: along each axis; those that are not named have one.
      plan: what backward recomputes, which decides what is sent again; None for "full".
    """
    sizes = _sizes(devices)
    f, t, c, e = (sizes[axis] for axis in ("fsdp", "tensor", "context", "expert"))
    n = math.prod(sizes.values())
    work, alone = make(abstract_mesh(sizes)), make(abstract_mesh({**sizes, "fsdp": 1}))
    config, m, a = work.config, work.tokens // c, work.itemsize
    hidden = m * config.hidden_size * a
    layers = [actions for count, actions in (plan or RematPlan.of("full")).resolve(config.num_layers)
              for _ in range(count)]  # fmt: skip
    vocabulary = weights = between = count = 0
    if f > 1:
        # Forward and backward gather every layer. The loss gathers all hidden states and scatters their gradients, the
        # embedding scatters its rows; ids and labels travel, and three numbers of each token are added up.
        weights = 2 * _gathered(work, alone, f, t) * (f - 1) // f
        small = (2 + 2 * 3) * (f - 1) * m * 4
        vocabulary = (3 * (f - 1) * hidden + small) * _divides_vocabulary(alone, f * t)
        count += 2 * config.num_layers + 8
    if t > 1:
        # Attention and MLP add up their results, and backward the gradients of their inputs; where the sum after
        # attention is computed again it is added up again. So are the embedding's rows and the gradients of the loss.
        sums = sum(4 + (not _keeps(actions, "residual")) for actions in layers) + 2
        between += 2 * (t - 1) * sums * hidden // t
        count += sums
    for layer, actions in enumerate(layers):
        w = layer_widths(config, layer)
        if c > 1:  # queries, keys, values and results of attention, in backward their gradients, and what is made again
            times = 2 + (ALL not in actions)
            between += times * (w.q + w.k + w.v + w.attention) * m * a * (c - 1) // c
            count += 4 * times
        if e > 1 and config.moe is not None and layer in config.moe.layers:
            # Tokens to all, with weights and numbers of their experts; the sums back; in backward the gradients of
            # these, and once more what is made again.
            again = ALL not in actions
            between += (e - 1) * ((4 + again) * hidden + (3 + 2 * again) * 4 * m * config.moe.top_k)
            count += 9
    if c > 1:
        between, count = between + 2 * 4 * work.batch * (c - 1), count + 2  # first labels, and where rows begin
    # Large adapters that "fsdp" shares out are gathered and scattered instead, which is as much.
    whole, here, x = make(abstract_mesh({})).adapters, alone.adapters, t * e
    divided = (whole - here) * x // (x - 1) if x > 1 else 0  # by "tensor" or "expert"
    gradients = 2 * (n - 1) * (whole - divided) // n + 2 * (n // x - 1) * divided // n
    steps = work.accumulation
    return Wire(steps * weights, steps * vocabulary, steps * between, gradients, steps * count + (n > 1))


def _keeps(actions: Mapping[str, str], name: str) -> bool:
    return ALL in actions or name in actions


def _sizes(devices: Mapping[str, int]) -> dict[str, int]:
    from lora_jax.kernels.parallel import AXES

    return {axis: devices.get(axis, 1) for axis in AXES}


def _gathered(work: Workload, alone: Workload, f: int, t: int) -> int:
    """Bytes of all layers' weights that `f` devices share out and gather: all but norms and second-level scales."""
    divided = (alone.weights - work.weights) * f // (f - 1)
    return divided - _tables(alone) // t if _divides_vocabulary(alone, f * t) else divided


def _tables(whole: Workload) -> int:
    """Bytes of the tables of the vocabulary, which are never gathered."""
    table = whole.config.vocab_size * whole.config.hidden_size * whole.itemsize
    return table * (1 if whole.config.tie_embeddings else 2 - whole.offload_embedding)


def _divides_vocabulary(whole: Workload, devices: int) -> bool:
    return whole.config.vocab_size % devices == 0


class MeshPlan(NamedTuple):
    """One mesh for one model."""

    devices: dict[str, int]
    work: Workload  # of one device
    plan: RematPlan | None  # what backward recomputes; None: nothing fits
    memory: int  # bytes of one device at the peak
    gathered: int  # of them for layers, and tokens of others, that have been gathered
    wire: Wire
    compute: float  # seconds of a step without sending

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        count = math.prod(self.devices.values()) // self.devices.get("tensor", 1)
        return self.work.accumulation * self.work.tokens * count


def plan_mesh(make: Callable[[Any], Workload], card: Card, devices: Mapping[str, int]) -> MeshPlan:
    """Plans a step on a mesh.

    Args:
      make: gives the step of one device on an abstract mesh; see `lora_jax.plan.of_config`.
      card: each device.
      devices: along each axis; those that are not named have one.

    Raises:
      ValueError: sizes that do not divide the model.
      NotImplementedError: the model cannot be divided along such an axis.
    """
    from lora_jax.sharding import check

    sizes = _sizes(devices)
    f, c, e, t = sizes["fsdp"], sizes["context"], sizes["expert"], sizes["tensor"]
    whole = make(abstract_mesh(sizes))
    check(whole.config, abstract_mesh(sizes))
    if whole.length % c:
        raise ValueError(f"rows of {whole.length} tokens cannot be shared out evenly over {c} devices")
    work = _of_one_device(whole, sizes)
    hidden = work.tokens * work.config.hidden_size * work.itemsize
    gathered = 0
    if f > 1:  # this layer and the next; hidden states of all, and their gradients
        alone = make(abstract_mesh({**sizes, "fsdp": 1}))
        gathered += 2 * _gathered(whole, alone, f, t) // work.config.num_layers + 2 * f * hidden
    if c > 1:  # queries, keys, values and results by heads as well as by tokens, and their gradients
        w = layer_widths(work.config, work.config.num_layers - 1)
        gathered += 2 * work.tokens * (w.q + w.k + w.v + w.attention) * work.itemsize
    if e > 1:  # tokens of all, what experts make of them, and the gradients of both
        gathered += 4 * e * hidden
    in_memory = _with_tokens_of_all(work, e)
    budget = int(MEMORY_FRACTION * card.memory) - gathered
    try:
        plan = choose(in_memory, card, budget)
    except MemoryError:
        plan = None
    shown = plan or RematPlan.of("full")
    need = memory(in_memory, shown, card).total + gathered
    sent = wire(make, sizes, shown)
    return MeshPlan(dict(devices), work, plan, need, gathered, sent, sum(seconds(work, shown, card).values()))


def _of_one_device(work: Workload, sizes: Mapping[str, int]) -> Workload:
    """What a device computes: its heads and features, its part of a row, as many tokens of experts as of its own."""
    t, c, e, config = sizes["tensor"], sizes["context"], sizes["expert"], work.config
    if t > 1:
        fewer = {name: getattr(config, name) // t for name in ("num_heads", "num_kv_heads", "intermediate_size")}
        fewer["vocab_size"] = -(-config.vocab_size // t)
        config = dataclasses.replace(config, **fewer)
    if e > 1 and config.moe is not None:
        moe = dataclasses.replace(config.moe, num_experts=config.moe.num_experts // e)
        config = dataclasses.replace(config, moe=moe)
    return dataclasses.replace(work, config=config, length=work.length // c, row_devices=c)


def _with_tokens_of_all(work: Workload, e: int) -> Workload:
    """The same with arrays that are as long as if all tokens along "expert" went to the experts of one device."""
    if e == 1 or work.config.moe is None:
        return work
    moe = work.config.moe
    moe = dataclasses.replace(moe, top_k=moe.top_k * e, num_experts=moe.num_experts * e)
    return dataclasses.replace(work, config=dataclasses.replace(work.config, moe=moe))


def plan_meshes(make: Callable[[Any], Workload], card: Card, count: int, host: int) -> list[MeshPlan]:
    """Meshes of `count` devices: "fsdp" over 1, 2, 4 ... and all of them, "data" over the rest.

    If none of these fits, also those where "tensor", "context" or "expert" has 2, 4 ... devices of a host, and "fsdp"
    all others.

    The `host` devices of a host share the memory there that offloaded activations may take.
    """
    card, make = dataclasses.replace(card, host_memory=card.host_memory // host), functools.cache(make)
    sizes = [f for f in range(1, count + 1) if count % f == 0 and (f & (f - 1) == 0 or f == count)]
    plans = _that_divide(make, card, [{"data": count // f, "fsdp": f} for f in sizes])
    if any(plan.plan is not None for plan in plans):
        return plans
    few = [f for f in sizes if 1 < f <= host and host % f == 0]
    axes = ("tensor", "context", "expert")
    more = [{"fsdp": count // n, axis: n} for axis in axes for n in few]
    return plans + _that_divide(make, card, more)


def _that_divide(make: Callable[[Any], Workload], card: Card, meshes: list[dict[str, int]]) -> list[MeshPlan]:
    plans = []
    for devices in meshes:
        try:
            plans.append(plan_mesh(make, card, devices))
        except (ValueError, NotImplementedError):  # rows, heads or experts that it does not divide
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
    f, n = plan.devices.get("fsdp", 1), math.prod(plan.devices.values())
    inside = plan.wire.total / (link.rate * 1e9) + plan.wire.collectives * link.latency
    inner = n // (f * plan.devices.get("data", 1))  # neighbours of a device that have the same layers' other parts
    hosts, spanned = -(-n // host), -(-f * inner // host)
    outside = 0.0
    if hosts > 1:
        outside += plan.wire.gradients / host / (network.rate * 1e9) + 2 * math.log2(hosts) * network.latency
    if spanned > 1:
        shared = (plan.wire.weights + plan.wire.tokens) * (spanned - 1) / spanned / ((f - 1) / f)
        outside += shared / max(1, host // inner) / (network.rate * 1e9) + plan.wire.collectives * network.latency
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
