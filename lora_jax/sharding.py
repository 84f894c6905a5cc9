"""One step on many devices: the mesh, and which device holds what.

A mesh has up to five axes; those that are not named have one device:

    data      rows of the batch
    fsdp      rows of the batch, and of every frozen weight, which are gathered where a layer begins
    expert    rows of the batch, and the experts of a mixture
    context   tokens of a row
    tensor    heads, features of the feed-forward layers, vocabulary

Every array has logical axes ("heads", "vocab", ...), by the name of its module; `RULES` maps them to mesh axes, and
everything else follows: where weights, adapters and optimizer state lie, and how batches are cut.

How a step runs. Loss and gradients are computed inside ONE `jax.shard_map` over the whole mesh, by the code of a single
device on this device's share (`over_devices`); where devices have to meet it calls `lora_jax.kernels.parallel`. A
layer's weights are gathered over "fsdp" as the packed 4-bit bytes they are stored in, 0.26 of the bytes of bfloat16,
and decoded here: where layers are written out, while the layer before is at work, else at its start. Backward gathers
again, so that nothing of full size is kept. Frozen weights have no gradient, so nothing is sent back. Second-level
scales of double quantisation, one for 16,384 weights, are on every device, and count blocks of the whole weight. Tables
of the vocabulary are never gathered: tokens travel to them. Gradients are then added up, once a step, and the optimizer
runs outside the shard_map on global arrays, so that norms and blocks of 8-bit state are those of one device.

So kernels and their custom_vjp see local arrays alone. The other way, a shard_map in every kernel, would repeat sizes
and specs in every file, and transposing it would add collectives that nobody wrote.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.kernels.nf4.format import BLOCK, NF4Weight
from lora_jax.kernels.parallel import AXES, ROW_AXES, Shard, sharing, total

if TYPE_CHECKING:
    from lora_jax.model import CausalLM
    from lora_jax.models.decoder import DecoderConfig

__all__ = [
    "RULES",
    "batch_specs",
    "bytes_here",
    "check",
    "describe",
    "fetch",
    "hold_beside",
    "make_mesh",
    "move",
    "over_devices",
]
__all__ += [
    "on_all",
    "parameter_specs",
    "place",
    "put",
    "put_batch",
    "put_beside",
    "row_shards",
    "share_of_adapters",
    "shardings_of",
    "specs_beside",
]

# Mesh axes that a logical axis is shared out over, the first the slowest.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ROW_AXES,
    "sequence": ("context",),
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "rows": ("fsdp",),  # of a frozen weight [N, K], whatever N is, within what "tensor" has left
    None: (),
}

# Logical axes of a weight [N, K], by the name of its module; others are not divided but by "rows".
_WEIGHTS: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("heads", None)),
    "o_proj": (None, "heads"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), ("mlp", None)),
    **dict.fromkeys(("down_proj", "w2"), (None, "mlp")),
    **dict.fromkeys(("embed_tokens", "lm_head"), ("vocab", None)),
}
# Trained leaves up to so many elements are on every device; larger ones are shared out over "fsdp".
_REPLICATED_UP_TO = 2**22


def make_mesh(
    sizes: str | Mapping[str, int] | Mesh, *, model_bytes: int = 0, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh of these sizes.

    Args:
      sizes: devices along each axis, {"data": 2, "fsdp": 4} or "data=2,fsdp=4"; one may be -1, for all that are left.
        Devices are those of all processes, and neighbours of one host along the later axes. "auto" takes all
        devices: "data" if the weights take less than a quarter of one device's memory, else "fsdp", which divides
        their memory too. A mesh with these axis names is taken as it is.
      model_bytes: bytes of the weights, for "auto".
      devices: None for all that JAX has.

    Raises:
      ValueError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    if isinstance(sizes, Mesh):
        _check_names(sizes.axis_names)
        order = sorted(range(sizes.devices.ndim), key=lambda i: AXES.index(sizes.axis_names[i]))
        return _mesh({axis: sizes.shape.get(axis, 1) for axis in AXES}, sizes.devices.transpose(order).ravel())
    devices = jax.devices() if devices is None else devices
    if isinstance(sizes, str):
        if sizes != "auto":
            return make_mesh(_sizes_of(sizes), devices=devices)
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        sizes = {"data" if model_bytes < memory / 4 else "fsdp": len(devices)}
    _check_names(sizes)
    given = {axis: sizes.get(axis, 1) for axis in AXES}
    if any(not isinstance(n, int) or n < -1 or n == 0 for n in given.values()) or list(given.values()).count(-1) > 1:
        raise ValueError(f"mesh={dict(sizes)}: sizes are whole numbers of at least 1, and one may be -1 for the rest")
    known = math.prod(n for n in given.values() if n != -1)
    given = {axis: max(len(devices) // known, 1) if n == -1 else n for axis, n in given.items()}
    if (places := math.prod(given.values())) != len(devices):
        raise ValueError(
            f"mesh={dict(sizes)} has places for {places} devices, and there are {len(devices)}; sizes must multiply to "
            "that number (-1 for one of them takes the rest)"
        )
    return _mesh(given, devices)


def _sizes_of(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 4} of "data=2,fsdp=4"."""
    try:
        return {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f'mesh={text!r} is neither "auto" nor sizes such as "data=2,fsdp=4"') from None


def _check_names(names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(AXES)):
        raise ValueError(f"mesh: {', '.join(unknown)} is no axis; the axes are {', '.join(AXES)}")


def _mesh(sizes: dict[str, int], devices: Any) -> Mesh:
    # The order of the devices is JAX's own where it knows how they are wired.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=list(devices)
    )


def describe(mesh: Mesh) -> str:
    """ "data 2 x fsdp 4"."""
    return " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"


def row_shards(mesh: Mesh | None) -> int:
    """Devices that share out the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)


# ---- which device holds what ----------------------------------------------------------------------------------------


def parameter_specs(state: Any, mesh: Mesh) -> Any:
    """PartitionSpecs of the arrays of a state of `CausalLM.split`, a tree of the same structure."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(_names(path), leaf, mesh), state, is_leaf=_is_nf4)


def shardings_of(name: str, leaf: Any, mesh: Mesh) -> Any:
    """Where an array or NF4Weight (of `jax.ShapeDtypeStruct`s) lies that a tensor of a checkpoint is, or is a part of.

    Args:
      name: Hugging Face's, "model.layers.0.mlp.up_proj.weight".
      leaf: of the shape that it has in the model, with the axes of layers and experts.
      mesh: the devices.
    """
    names = tuple(name.split("."))
    names = names[names.index("layers") :] if "layers" in names else names[-2:]
    return _map_specs(lambda spec: NamedSharding(mesh, spec), _spec(names, leaf, mesh))


def _spec(names: tuple[str, ...], leaf: Any, mesh: Mesh) -> Any:
    """The PartitionSpec of one array, or an NF4Weight of them."""
    *_, module, attribute = ("", *names)
    lead: tuple = ()
    if names[0] == "layers":
        lead = (None, "experts") if "experts" in names else (None,)
    n, k = _WEIGHTS.get(module, (None, None))
    matrix = (n, k)
    if module == "embed_tokens":  # it looks up rows: for its adapter they are the inputs
        n, k = k, n
    known: dict[str, tuple[str | None, ...]] = {
        "weight": matrix,
        "trained": matrix,
        "bias": (n,),
        "lora_a": (k, None),
        "lora_b": (None, n),
        "lora_magnitude": (n,),
        "weight_norm": (n,),
        "sinks": ("heads",),
    }
    shape: tuple[int, ...] = leaf.shape
    logical: list[str | None] = [*lead, *known.get(attribute.replace("start_", "lora_"), ())][: len(shape)]
    if len(shape) != len(logical):  # norms and the like
        return P()
    axes = [tuple(a for a in RULES[name] if mesh.shape[a] > 1) for name in logical]
    if "vocab" in logical and shape[at := logical.index("vocab")] % _product(mesh, axes[at]):
        axes[at] = tuple(a for a in axes[at] if a != "fsdp")  # every device along "fsdp" has all rows
    frozen_matrix = attribute == "weight" and len(logical) - len(lead) == 2 and names[0] == "layers"
    if frozen_matrix and mesh.shape["fsdp"] > 1 and _rows_divide(leaf, axes, mesh):
        axes[-2] = (*axes[-2], *RULES["rows"])
    if attribute.startswith("lora_") and names[0] == "layers":
        axes = _share_out(shape, axes, mesh)
    for length, along, name in zip(shape, axes, logical, strict=True):
        if length % _product(mesh, along):
            raise ValueError(
                f"mesh of {describe(mesh)}: the {length} {name} of {'.'.join(names)} cannot be shared out evenly over "
                f"{_product(mesh, along)} devices ({' x '.join(along)}); choose sizes that divide them"
            )
    if _is_nf4(leaf) and (axes[-1] or axes[-2][:1] == ("tensor",)):
        n, k = shape[-2] // _product(mesh, axes[-2]), shape[-1] // _product(mesh, axes[-1])
        if (k if axes[-1] or leaf.absmax.ndim == len(shape) else n * k) % BLOCK:
            raise ValueError(
                f"mesh of {describe(mesh)}: {'.'.join(names)} {list(shape[-2:])} would be cut within a block of "
                f'{BLOCK} weights, which share a scale; use a smaller "tensor"'
            )
    axes = [one or None for one in axes]
    return _nf4_specs(leaf, axes) if _is_nf4(leaf) else P(*axes)


def _rows_divide(leaf: Any, axes: list, mesh: Mesh) -> bool:
    """Whether "fsdp" can share out the rows of a weight, without cutting a block of scales."""
    n, k = leaf.shape[-2:]
    rows, rest = divmod(n, _product(mesh, axes[-2]) * mesh.shape["fsdp"])
    return rest == 0 and (not _is_nf4(leaf) or (rows * k) % BLOCK == 0)


def _share_out(shape: tuple[int, ...], axes: list, mesh: Mesh) -> list:
    """A trained leaf that is large lies over "fsdp" too, along its longest axis that this divides."""
    if math.prod(shape) <= _REPLICATED_UP_TO or any("fsdp" in along for along in axes):
        return axes
    for at in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if shape[at] % (_product(mesh, axes[at]) * mesh.shape["fsdp"]) == 0:
            return [(*along, "fsdp") if i == at and mesh.shape["fsdp"] > 1 else along for i, along in enumerate(axes)]
    return axes


def _nf4_specs(w: NF4Weight, axes: list) -> NF4Weight:
    *lead, rows, columns = axes
    absmax = P(*lead, rows, columns) if w.absmax.ndim == w.packed.ndim else P(*lead, rows)
    nested: tuple = ()
    if w.double_quantized:
        nested = (P(*lead, None), P(*lead), P(*lead, None))
    return NF4Weight(P(*lead, rows, columns), absmax, *nested)  # pyright: ignore[reportArgumentType]


def bytes_here(state: Any, mesh: Any) -> int:
    """Bytes that one device holds of a state of `CausalLM.split`; the mesh may be a `jax.sharding.AbstractMesh`."""
    specs = jax.tree.leaves(parameter_specs(state, mesh), is_leaf=_is_spec)
    sizes = [
        (math.prod(leaf.shape) * leaf.dtype.itemsize, spec)
        for leaf, spec in zip(jax.tree.leaves(state), specs, strict=True)
    ]
    return sum(size // _product(mesh, _axes_of(spec)) for size, spec in sizes)


def share_of_adapters(shapes: Mapping[str, tuple[int, int, int]], mesh: Any) -> float:
    """The share of adapters that one device holds, of adapters (K, R, N) by the full names of their modules."""
    stacks: dict[tuple, int] = {}
    for name, (k, r, n) in shapes.items():
        for side, of_output in ((k, False), (n, True)):
            key = re.sub(r"\d+", "", name), r, side, of_output
            stacks[key] = stacks.get(key, 0) + 1
    total = here = 0
    for (name, r, side, of_output), count in stacks.items():
        along = _WEIGHTS.get(name.rpartition(".")[2], (None, None))[0 if of_output else 1]
        axes = [RULES["experts"] if ".experts." in name else (), RULES[along] if along != "vocab" else (), ()]
        axes = [tuple(axis for axis in one if mesh.shape[axis] > 1) for one in axes]
        shape = (count, side, r)
        total += math.prod(shape)
        here += math.prod(shape) // _product(mesh, [a for one in _share_out(shape, axes, mesh) for a in one])
    return here / max(1, total)


def batch_specs(batch: Mapping[str, Any]) -> dict[str, P]:
    """PartitionSpecs of a batch whose arrays are [..., B, T] or [..., B, T, D]; "seed" is the same everywhere."""
    lead = (None,) * (np.ndim(batch["input_ids"]) - 2)
    spec = P(*lead, RULES["batch"], RULES["sequence"])
    return {name: P() if name == "seed" else spec for name in batch}


def place(model: "CausalLM", mesh: Mesh) -> None:
    """Puts every array of a model where the mesh wants it, one after the other; those that are there stay."""
    check(model.config, mesh)
    if model.lora_config is not None and model.lora_config.use_dora and mesh.shape["tensor"] > 1:
        raise NotImplementedError(
            'use_dora on a mesh with "tensor": the norms of a weight would have to be added up over devices that hold '
            'parts of its rows; use "data" or "fsdp" instead, or train without DoRA'
        )
    _, lora, frozen = model.split()
    places = [(state, parameter_specs(state, mesh)) for state in (lora, frozen)]  # what cannot be raises before a move
    for state, specs in places:
        nnx.update(model.module, _put(state, specs, mesh))


def put(state: Any, mesh: Mesh) -> Any:
    """The state with its arrays on the mesh."""
    return _put(state, parameter_specs(state, mesh), mesh)


def _put(state: Any, specs: Any, mesh: Mesh) -> Any:
    def put_one(spec: P, leaf: Any) -> Any:  # an embedding table on the host stays there
        return leaf if isinstance(leaf, np.ndarray) else move(leaf, NamedSharding(mesh, spec))

    return _map_specs(put_one, specs, state)


def move(x: Any, where: NamedSharding) -> jax.Array:
    """The array there. An array of this process alone must be the same in all processes; each takes its part of it."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding == where else jax.jit(lambda y: y, out_shardings=where)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch, which all processes have, on the devices that need its parts."""
    specs = batch_specs(batch)
    return {name: move(array, NamedSharding(mesh, specs[name])) for name, array in batch.items()}


def fetch(tree: Any, only: Sequence[str] | None = None) -> Any:
    """The tree with arrays of several processes copied to the host, whole, in each; all processes must call it.

    Args:
      tree: a state of `CausalLM.split`.
      only: names of leaves to fetch, such as "lora_a"; others stay as they are. None for all.
    """

    def copy(path: Any, x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or (only and _names(path)[-1] not in only):
            return x
        assert isinstance(x.sharding, NamedSharding)
        return np.asarray(move(x, NamedSharding(x.sharding.mesh, P())))

    return jax.tree_util.tree_map_with_path(copy, tree)


def on_all(tree: Any, mesh: Mesh) -> Any:
    """Traced arrays, whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), tree)


def put_beside(tree: Any, lora: Any, mesh: Mesh) -> Any:
    """The optimizer's state, every array of it where the trained leaf lies that its path and shape belong to."""
    specs = specs_beside(tree, lora, mesh)
    return _map_specs(lambda spec, x: move(x, NamedSharding(mesh, spec)), specs, tree)


def hold_beside(tree: Any, lora: Any, mesh: Mesh) -> Any:
    """The same for traced arrays, which the compiler would otherwise be free to put elsewhere."""

    def hold(spec: P, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return _map_specs(hold, specs_beside(tree, lora, mesh), tree)


def specs_beside(tree: Any, lora: Any, mesh: Mesh) -> Any:
    """Where each leaf of an optimizer's state lies: where the trained leaf does that its path and shape belong to."""
    specs = jax.tree.leaves(parameter_specs(lora, mesh), is_leaf=_is_spec)
    leaves = jax.tree_util.tree_leaves_with_path(lora)
    known = {(_names(path), leaf.shape): spec for (path, leaf), spec in zip(leaves, specs, strict=True)}

    def spec_of(path: Any, leaf: jax.Array) -> P:
        names = _names(path)  # those of the leaf come after those of the optimizer, and before "codes" of 8 bits
        ends = [(i, j) for i in range(len(names)) for j in (len(names), len(names) - 1)]
        return next((known[key] for i, j in ends if (key := (names[i:j], leaf.shape)) in known), P())

    return jax.tree_util.tree_map_with_path(spec_of, tree)


# ---- running on it --------------------------------------------------------------------------------------------------


def over_devices(f: Callable, mesh: Mesh, *, gradients: bool) -> Callable:
    """f(lora, frozen, batch) -> (loss, count) or (loss, count, gradients of lora) of a batch, by all devices.

    f is the function of one device and its rows. Its results are sums, and are added up.

    Raises:
      ValueError: when it is called: rows or tokens of the batch cannot be shared out evenly.
    """

    def mapped(lora: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
        _check_batch(batch, mesh)
        specs = parameter_specs(lora, mesh), parameter_specs(frozen, mesh)

        def on_one_device(lora: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
            lora = _map_specs(_gather_trained, specs[0], lora)
            frozen = jax.tree.map(_as_shard, specs[1], frozen, is_leaf=_is_specs_of_weight)
            loss, count, *grads = f(lora, frozen, batch)
            return *total((loss, count)), *(_map_specs(_add_up, specs[0], g) for g in grads)

        out_specs = (P(), P(), specs[0]) if gradients else (P(), P())
        run = jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(*specs, batch_specs(batch)),
            out_specs=out_specs,
            check_vma=False,  # results are added up by hand, and kernels do not say what they vary over
        )
        return run(lora, frozen, dict(batch))

    return mapped


def _gather_trained(spec: P, leaf: jax.Array) -> jax.Array:
    """A whole leaf from one that is shared out over "fsdp" for its size; a share of the vocabulary stays one."""
    at = _fsdp_axis(spec)
    return leaf if at is None else jax.lax.all_gather(leaf, "fsdp", axis=at, tiled=True)


def _add_up(spec: P, gradient: jax.Array) -> jax.Array:
    """The sum of what devices have of a gradient, where the parameter lies."""
    at = _fsdp_axis(spec)
    if at is not None:
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=at, tiled=True)
    axes = tuple(axis for axis in sharing(*AXES) if axis not in _axes_of(spec))
    return jax.lax.psum(gradient, axes) if axes else gradient


def _as_shard(spec: Any, leaf: Any) -> Any:
    """A frozen weight with what is to be done to have it whole; anything that is whole as it is."""
    spec = spec.packed if _is_nf4(spec) else spec
    if len(spec) < 2:
        return leaf
    rows, columns = (_entries(entry) for entry in spec[-2:])
    split = -2 if "tensor" in rows else -1 if "tensor" in columns else None
    return Shard(leaf, "fsdp" in rows, split) if "fsdp" in rows or split is not None else leaf


def _check_batch(batch: Mapping[str, Any], mesh: Mesh) -> None:
    *_, rows, tokens = np.shape(batch["input_ids"])
    for count, what, axes in ((rows, "rows", RULES["batch"]), (tokens, "tokens in a row", RULES["sequence"])):
        if count % _product(mesh, axes):
            raise ValueError(
                f"mesh of {describe(mesh)}: {count} {what} cannot be shared out evenly over {_product(mesh, axes)} "
                f"devices ({' x '.join(axes)})"
            )


def check(config: "DecoderConfig", mesh: Mesh) -> None:
    """Raises NotImplementedError for a model that a mesh cannot run, and ValueError for one that it does not divide."""
    sizes, where = mesh.shape, f"mesh of {describe(mesh)}, {config.architecture}"
    if sizes["tensor"] > 1:
        reasons = {
            "q, k and v are one matrix": config.fused_qkv,
            "gate and up are one matrix": config.fused_gate_up,
            "of latent attention": config.mla is not None,
            "of its experts": config.moe is not None,
            "queries are normalised over all heads": config.qk_norm == "projection",
            "the output projection has a bias": config.out_bias or config.mlp_bias,
        }
        for reason, holds in reasons.items():
            if holds:
                raise NotImplementedError(f'{where}: "tensor" is not possible because {reason}; use "fsdp"')
    if sizes["expert"] > 1 and (config.moe is None or config.moe.num_experts % sizes["expert"]):
        experts = "no" if config.moe is None else str(config.moe.num_experts)
        raise ValueError(f'{where}: it has {experts} experts to share out over {sizes["expert"]} devices ("expert")')
    if sizes["context"] > 1 and any(rope.depends_on_length for rope in (config.rope, config.local_rope) if rope):
        raise NotImplementedError(f'{where}: "context" is not possible, since rotations depend on the row\'s length')
    heads = sizes["tensor"] * sizes["context"]
    for count, what in ((config.num_heads, "heads"), (config.num_kv_heads, "key/value heads")):
        if count % heads:
            raise ValueError(
                f"{where}: its {count} {what} cannot be shared out evenly over {heads} devices (tensor x context); "
                'choose sizes that divide them, or use "data" and "fsdp", which share out rows'
            )


# ---- trees of specs -------------------------------------------------------------------------------------------------


def _is_nf4(leaf: Any) -> bool:
    return isinstance(leaf, NF4Weight)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)


def _is_specs_of_weight(leaf: Any) -> bool:
    return _is_spec(leaf) or _is_nf4(leaf)


def _map_specs(f: Callable, specs: Any, *trees: Any) -> Any:
    return jax.tree.map(f, specs, *trees, is_leaf=_is_spec)


def _axes_of(spec: P) -> tuple[str, ...]:
    return tuple(axis for entry in spec for axis in _entries(entry))


def _entries(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _fsdp_axis(spec: P) -> int | None:
    """The array's axis that "fsdp" shares out for its size, if there is one: the vocabulary's is not."""
    return next((i for i, entry in enumerate(spec) if "fsdp" in _entries(entry) and len(spec) > 2), None)


def _product(mesh: Mesh, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _names(path: Any) -> tuple[str, ...]:
    """("layers", "0", "mlp", "up_proj", "lora_a") of a leaf's path."""
    names = (str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)
    return tuple(name for name in names if name not in (".value", "value"))
