"""Loads a Hugging Face checkpoint into a model, tensor by tensor, quantised on the way to the device."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lora_jax.distributed import agree, is_first
from lora_jax.fp8 import block_size
from lora_jax.guards import is_out_of_memory
from lora_jax.hf_checkpoint import Checkpoint, QuantState, read_json, resolve_folder
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.kernels.nf4.format import CODE, quantize_absmax
from lora_jax.model import CausalLM
from lora_jax.models.decoder import Decoder, Slot, full_names
from lora_jax.models.hf_config import further_layers
from lora_jax.models.linear import Linear, set_layer
from lora_jax.models.registry import config_from_hf
from lora_jax.models.streamed import Streamed, make_room, pin, to_host
from lora_jax.reporting import console
from lora_jax.sharding import check, make_mesh, move, shardings_of

__all__ = ["from_pretrained", "load", "load_decoder", "load_tokenizer"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Tensors that old checkpoints hold and that follow from config.json.
_IGNORED = ("rotary_emb.inv_freq",)


def from_pretrained(
    model_name: str | Path,
    *,
    load_in_4bit: bool = True,
    double_quantize: bool = True,
    dtype: DTypeLike | None = None,
    max_seq_length: int | None = None,
    offload_embedding: bool = False,
    offload_head: bool = False,
    offload_layers: bool = False,
    mesh: str | Mapping[str, int] | Mesh | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> tuple[CausalLM, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
      model_name: local folder, hub id, or a folder with a PEFT adapter (whose base model is loaded too).
      load_in_4bit: keep the linear layers of all blocks in NF4 (QLoRA); embeddings, norms and lm_head stay 16-bit. A
        checkpoint that bitsandbytes has quantised to NF4 is taken as it is, or dequantised if this is False. Weights in
        FP8 with scales, or experts in MXFP4, are decoded first.
      double_quantize: quantise the scales of NF4 too (0.5 bit a weight less).
      dtype: of activations and unquantised weights, "bfloat16" or "float32"; None for the checkpoint's own
        (float16 becomes bfloat16).
      max_seq_length: longest row that will be trained on; must not exceed what the model was made for.
      offload_embedding: keep the table of token embeddings in the host's memory; see `CausalLM.offload_embedding`.
      offload_head: keep the weight of lm_head there; see `CausalLM.offload_head`.
      offload_layers: keep the layers' NF4 weights in the host's memory, for models that are too large for the device
        even so; see `CausalLM.offload_layers`.
      mesh: load straight into the memory of several devices: "auto", sizes such as {"fsdp": 8}, or a mesh; see
        `CausalLM.shard`. None for one device.
      revision: branch, tag or commit of a hub repository.
      token: hub token for gated repositories; None for the one logged in with.
      progress: show a progress bar.

    Returns:
      (model, tokenizer): a `CausalLM` and transformers' tokenizer of the folder.

    Raises:
      FileNotFoundError, PermissionError: the model is not there or may not be read.
      ValueError: a file is damaged, the architecture is unknown, or the tensors contradict config.json.
      MemoryError: the weights do not fit on the device.
    """
    return load(
        model_name,
        load_in_4bit=load_in_4bit,
        double_quantize=double_quantize,
        dtype=dtype,
        max_seq_length=max_seq_length,
        offload_embedding=offload_embedding,
        offload_head=offload_head,
        offload_layers=offload_layers,
        mesh=mesh,
        revision=revision,
        token=token,
        progress=progress,
    )


def load(
    model_name: str | Path,
    *,
    architecture: str | None = None,
    with_tokenizer: bool = True,
    load_in_4bit: bool,
    double_quantize: bool,
    dtype: DTypeLike | None,
    max_seq_length: int | None,
    offload_embedding: bool,
    offload_head: bool,
    offload_layers: bool,
    mesh: str | Mapping[str, int] | Mesh | None,
    revision: str | None,
    token: str | bool | None,
    progress: bool,
) -> tuple[CausalLM, Any]:
    """What `from_pretrained` does, for one architecture alone if it is named, and without the tokenizer (None) too.

    Raises:
      ValueError: the model, or the base of the adapter, is of another architecture; or as `from_pretrained`.
    """
    folder = resolve_folder(model_name, revision=revision, token=token)
    if (folder / "adapter_config.json").exists():
        from lora_jax.export.peft import base_of_adapter, load_adapter

        model, tokenizer = load(
            base_of_adapter(folder),
            architecture=architecture,
            with_tokenizer=with_tokenizer,
            load_in_4bit=load_in_4bit,
            double_quantize=double_quantize,
            dtype=dtype,
            max_seq_length=max_seq_length,
            offload_embedding=offload_embedding,
            offload_head=offload_head,
            offload_layers=offload_layers,
            mesh=mesh,
            revision=None,  # that of the adapter's repository
            token=token,
            progress=progress,
        )
        return load_adapter(model, folder), tokenizer
    hf_config = read_json(folder / "config.json")
    config = config_from_hf(hf_config)
    if architecture is not None and config.architecture != architecture:
        raise ValueError(
            f"{architecture}.from_pretrained: {folder} holds a {config.architecture}; load it with "
            f"lora_jax.{config.architecture}, or with lora_jax.AutoModelForCausalLM, which reads every architecture"
        )
    if max_seq_length is not None and max_seq_length < 1:
        raise ValueError(
            f"max_seq_length must be at least 1, got {max_seq_length}; None is for the model's own maximum"
        )
    if max_seq_length is not None and max_seq_length > config.max_position:
        raise ValueError(
            f"max_seq_length={max_seq_length} exceeds the {config.max_position} positions {folder} was made for; "
            "lower it, or extend the context by a 'rope_scaling' in config.json"
        )
    if offload_embedding and config.tie_embeddings:
        raise ValueError(
            f"offload_embedding=True: the head of {folder} is its embedding table, which the loss needs on the device"
        )
    if offload_head and (mesh is not None or config.tie_embeddings):
        raise ValueError(
            "offload_head=True is for one device: leave out mesh, or offload_head"
            if mesh is not None
            else f"offload_head=True: the head of {folder} is its embedding table, which tokens are looked up in"
        )
    if offload_layers and (mesh is not None or not load_in_4bit):
        raise ValueError(
            "offload_layers=True is for NF4 weights and one device: "
            + ("leave out mesh, or offload_layers" if mesh is not None else "set load_in_4bit=True")
        )
    tokenizer = load_tokenizer(folder) if with_tokenizer else None
    checkpoint = Checkpoint(folder)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
    stored = "bfloat16" if stored == "float16" else stored  # the range of float16 is too small to train in
    model_dtype = _resolve_dtype(stored if dtype is None else dtype)
    nf4 = load_in_4bit and ("nf4-double" if double_quantize else "nf4")
    if mesh is not None:
        stored_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        mesh = make_mesh(mesh, model_bytes=stored_bytes // 4 if load_in_4bit else stored_bytes)
        how = {"mesh": dict(mesh.shape), "config.json": zlib.crc32(repr(sorted(hf_config.items())).encode())}
        agree("the model", {**how, "bytes": stored_bytes, "storage": str(nf4), "dtype": model_dtype.name})
    try:
        options: Any = {"nf4": nf4 or None, "dtype": model_dtype, "mesh": mesh, "progress": progress}
        options |= {
            "offload_embedding": offload_embedding,
            "offload_head": offload_head,
            "offload_layers": offload_layers,
        }
        module = load_decoder(checkpoint, hf_config, **options)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = "" if load_in_4bit else " load_in_4bit=True needs about a quarter of the memory."
        raise MemoryError(f"the weights of {folder} do not fit on {jax.devices()[0]}.{hint} ({error})") from error
    name = str(model_name)
    model = CausalLM(module, hf_config=hf_config, source=folder, name_or_path=name, max_seq_length=max_seq_length)
    return model if mesh is None else model.shard(mesh), tokenizer


def load_tokenizer(folder: Path):
    """transformers' fast tokenizer of a model folder.

    Where there is no tokenizer.json it is made from tokenizer.model, which takes the package sentencepiece, or from
    Mistral's tekken.json, which takes mistral-common; the latter then encodes as that package does, BOS first.

    Raises:
      FileNotFoundError: the folder holds none.
      ImportError: the package that reads it is not installed.
    """
    names = ("tokenizer.json", "vocab.json", "tokenizer.model", "tekken.json")
    kind = next((name for name in names if (folder / name).exists()), None)
    if kind is None:
        others = sorted(path.name for path in folder.glob("tokenizer.model.*"))
        hint = f"; {others[0]} is to be called tokenizer.model" if others else "; copy the tokenizer files beside it"
        raise FileNotFoundError(f"{folder} holds no tokenizer ({', '.join(names)}){hint}")
    needs = {"tokenizer.model": ("sentencepiece",), "tekken.json": ("mistral_common",)}.get(kind, ())
    if missing := [package.replace("_", "-") for package in needs if find_spec(package) is None]:
        raise ImportError(
            f"{folder} holds its tokenizer as {kind} only, which takes a package to read: pip install {missing[0]} "
            "(or copy tokenizer.json from the model's Hugging Face folder beside it)"
        )
    from transformers import AutoTokenizer

    if kind == "tekken.json":
        from tokenizers.processors import TemplateProcessing
        from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

        tokenizer = convert_tekken_tokenizer(str(folder / kind))
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        return tokenizer
    # Else transformers would take mistral-common's own class, which is not a fast tokenizer, where that is installed.
    other = {"mistral_format": False} if (folder / "tekken.json").exists() else {}
    return AutoTokenizer.from_pretrained(folder, **other)


def load_decoder(
    checkpoint: Checkpoint,
    hf_config: dict[str, Any],
    *,
    nf4: str | None,
    dtype: DTypeLike,
    offload_embedding: bool = False,
    offload_head: bool = False,
    offload_layers: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Decoder:
    """Loads the weights. Peak host memory is one tensor; peak device memory is its part of the result and one tensor.

    On a mesh every process reads the rows that its devices hold, and nothing of experts that others have.

    Args:
      checkpoint: the files.
      hf_config: config.json.
      nf4: None for weights in `dtype`, "nf4" for NF4 blocks, "nf4-double" for NF4 with quantised scales.
      dtype: of everything that is not quantised.
      offload_embedding: keep the embedding table in the host's memory.
      offload_head: keep the weight of lm_head there.
      offload_layers: keep the layers' NF4 weights there.
      mesh: of the devices that hold the weights; None for one.
      progress: show a progress bar.

    Raises:
      ValueError: the tensors are not those that config.json implies.
    """
    _check_quantization(hf_config)
    config = config_from_hf(hf_config)
    plain = Decoder(config, dtype)
    shapes = {name: slot.shape for name, slot in plain.slots().items()}
    # A tied checkpoint may hold the head all the same; a quantised base may not hold it tied.
    ignored = (*_IGNORED, *(("lm_head.weight",) if config.tie_embeddings else ()))
    within = "" if config.hf_prefix == "model" else config.hf_prefix
    checkpoint.check_names(shapes, ignored, within=within, beside=further_layers(hf_config))
    states = {name: checkpoint.quant_state(name) for name in shapes}
    storage = _choose_storage(plain, states, nf4)
    model = Decoder(config, dtype, _by_layer(plain, storage))
    if mesh is not None:
        check(config, mesh)
    for name, stack, module in model.named_modules():
        form = storage.get(f"{next(full_names(name, stack, module))[0]}.weight")
        if form is not None:
            module.weight.set_value(NF4Weight.abstract(module.weight.get_value().shape, form == "nf4-double"))
    if offload_layers:
        make_room(model)
    slots = model.slots()
    for names in _track(_neighbours(checkpoint, _together(slots, mesh)), progress):
        name, slot = names[0], slots[names[0]]
        like = slot.variable.get_value()
        offloaded = offload_embedding and slot.owner is model.embed_tokens
        head_there = offload_head and slot.owner is model.lm_head
        where = None if mesh is None or offloaded else shardings_of(name, like, mesh)
        if slot.index is not None and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(like)):
            like = _zeros(like, where)
        if where is None:
            new = _read(checkpoint, name, states[name], like, on_host=offloaded or head_there)
        elif isinstance(slot.index, tuple):
            new = _read_experts(checkpoint, names, [states[one] for one in names], like, where)
        else:
            new = _read_shares(checkpoint, name, states[name], like, _of_one(where, 0 if slot.index is None else 1))
        if slot.index is None:
            slot.variable.set_value(new)
        elif where is not None and isinstance(slot.index, tuple):
            slot.variable.set_value(_expert_setter(tuple(jax.tree.leaves(where)))(like, new, slot.index))
        else:
            slot.variable.set_value(set_layer(like, new, slot.index))
        if offloaded:
            model.embed_tokens.offload()
        elif head_there:
            slot.variable.set_value(to_host(slot.variable.get_value()))
        # JAX works ahead of the device: without waiting, many tensors would be in memory at once.
        jax.block_until_ready(slot.variable.get_value())
    if offload_layers:
        pin(model)
    return model


def _choose_storage(model: Decoder, states: dict[str, QuantState | None], nf4: str | None) -> dict[str, str | None]:
    """How each linear weight of the blocks will be held: None (in 16 bits), "nf4" or "nf4-double"."""
    prequantized = any(state is not None for state in states.values())
    storage = {}
    for name, stack, module in model.block_linears():
        for full, _ in full_names(name, stack, module):
            weight = f"{full}.weight"
            if nf4 is None or not prequantized:
                storage[weight] = nf4
            elif (state := states[weight]) is None:
                storage[weight] = None  # quantised checkpoints may leave some of their layers in 16 bits
            else:
                storage[weight] = "nf4" if state.nested_offset is None else "nf4-double"
    return storage


def _by_layer(model: Decoder, storage: dict[str, str | None]) -> list[tuple]:
    """The storage of each layer's weights, equal for layers that can share a stack."""
    kinds: list[list] = [[] for _ in range(model.config.num_layers)]
    for name, stack, module in model.named_modules():
        if stack is None or not isinstance(module, Linear):
            continue
        forms: dict[int, set] = {}
        for full, index in full_names(name, stack, module):
            layer = stack.first + (index[0] if isinstance(index, tuple) else index or 0)
            forms.setdefault(layer, set()).add(storage.get(f"{full}.weight"))
        for layer, found in forms.items():
            if len(found) > 1:
                raise ValueError(
                    f"the experts {name.format(layer)} of one layer are quantised in different ways: {found}"
                )
            kinds[layer] += found
    return [tuple(kind) for kind in kinds]


def _check_quantization(hf_config: dict[str, Any]) -> None:
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "bitsandbytes")
    if method == "fp8":  # which `Checkpoint` decodes, like MXFP4, that of experts
        block_size(quantization)
        return
    if method == "mxfp4":
        return
    if method != "bitsandbytes" or not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
        raise ValueError(
            f"config.json: the checkpoint is quantised with {method!r}"
            f"{' in 8 bits' if quantization.get('load_in_8bit') else ''}; 16-bit checkpoints, bitsandbytes' NF4 "
            "(load_in_4bit), FP8 with scales ('fp8') and experts in MXFP4 ('mxfp4') can be read: use the original model"
        )


def _resolve_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        name = np.dtype(dtype).name
    except TypeError:  # a name that numpy does not know, or a dtype of torch
        name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} is not possible; use 'bfloat16' or 'float32'")
    return np.dtype(_DTYPES[name])


def _read(
    checkpoint: Checkpoint, name: str, state: QuantState | None, like, *, on_host: bool = False
) -> jax.Array | np.ndarray | NF4Weight:
    """One tensor on the device, in the form of `like`; for the host one that is stored plainly never gets there."""
    if state is not None:
        weight = _read_nf4(checkpoint, name, state)
        return weight if isinstance(like, NF4Weight) else dequantize(weight, like.dtype)
    array = _floats(checkpoint, name, checkpoint.read(name))
    if not isinstance(like, NF4Weight):
        return np.array(array, like.dtype) if on_host else jnp.asarray(array, like.dtype)
    return _quantize(jnp.asarray(array), like.double_quantized)


def _floats(checkpoint: Checkpoint, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ValueError(f"{checkpoint.folder}: {name} is stored as {array.dtype}, wanted a 16- or 32-bit float")
    return array


def _read_nf4(checkpoint: Checkpoint, name: str, state: QuantState, where: Any = None) -> NF4Weight:
    """A weight as bitsandbytes stores it, on one device or `where`; the bytes are kept."""
    if not np.array_equal(checkpoint.read(f"{name}.quant_map"), CODE):
        raise ValueError(f"{checkpoint.folder}: {name}.quant_map is not the NF4 table")
    spec: Any = NF4Weight.abstract(state.shape, state.nested_offset is not None)

    def part(ending: str, like, place: NamedSharding | None) -> jax.Array:
        def as_part(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            # bitsandbytes may store the bytes of the codes under another dtype (bnb_4bit_quant_storage).
            array = array if ending else array.view(np.uint8)
            if array.size != math.prod(shape) or array.dtype != like.dtype:
                got, want = f"{list(array.shape)} {array.dtype}", f"{like.shape} {like.dtype}"
                raise ValueError(
                    f"{checkpoint.folder}: {name}{ending} is {got}, a weight {state.shape} in NF4 wants {want}"
                )
            return array.reshape(shape)

        if place is None:
            return jnp.asarray(as_part(checkpoint.read(name + ending), like.shape))
        if len(like.shape) == 2:
            return _rows_on_mesh(checkpoint, name + ending, like.shape, place, as_part)
        return move(as_part(checkpoint.read(name + ending), like.shape), place)  # small, or not in rows

    def read(ending: str, attribute: str) -> jax.Array:
        return part(ending, getattr(spec, attribute), getattr(where, attribute, None))

    packed, absmax = read("", "packed"), read(".absmax", "absmax")
    if state.nested_offset is None:
        return NF4Weight(packed, absmax)
    nested, code = read(".nested_absmax", "nested_absmax"), read(".nested_quant_map", "nested_code")
    offset = jnp.float32(state.nested_offset)
    return NF4Weight(packed, absmax, nested, offset if where is None else move(offset, where.nested_offset), code)


def _of_one(where, leading: int, mesh: Mesh | None = None):
    """Where one entry of a stack with so many leading axes lies, whose arrays lie `where`; on another mesh if given."""
    return jax.tree.map(lambda place: NamedSharding(mesh or place.mesh, PartitionSpec(*place.spec[leading:])), where)


def _together(slots: Mapping[str, Slot], mesh: Mesh | None) -> list[list[str]]:
    """Names of the tensors in the order they are loaded in, those together that devices along "expert" load at a time.

    Of a layer's experts each device has a row of neighbours: the first of each row are loaded together, then the
    second, and so on.
    """
    shares = 1 if mesh is None else mesh.shape["expert"]
    groups: dict[Any, list[str]] = {}
    for name, slot in slots.items():
        of_layer = isinstance(slot.index, tuple) and (id(slot.owner), slot.attribute, slot.index[0])
        groups.setdefault(of_layer or name, []).append(name)
    found = []
    for names in groups.values():
        each = max(1, len(names) // shares)  # experts of a device
        found += [names[i::each] for i in range(each)]
    return found


def _neighbours(checkpoint: Checkpoint, groups: list[list[str]]) -> list[list[str]]:
    """The groups of `_together`, in a row those that files hold as one tensor of an expert, such as gate and up."""
    order: dict[Any, int] = {}

    def place(names: list[str]) -> int:
        part = checkpoint.part(names[0])
        return order.setdefault(names[0] if part is None else (part.whole, part.expert), len(order))

    return sorted(groups, key=place)


def _read_experts(
    checkpoint: Checkpoint, names: list[str], states: list[QuantState | None], like, where
) -> jax.Array | NF4Weight:
    """One tensor of an expert of each device along "expert", stacked in their order, in the form of `like`.

    Only devices of that place along "expert" read and quantise a tensor: for all that is done they are a mesh.
    """
    places, structure = jax.tree.flatten(where)
    mesh = places[0].mesh
    axis, here = mesh.axis_names.index("expert"), set(jax.local_devices())
    shards: list[list[jax.Array]] = [[] for _ in places]
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        devices = mesh.devices.take([number], axis)
        if not here & set(devices.flat):
            continue
        own = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        leaves = jax.tree.leaves(_read_shares(checkpoint, name, state, like, _of_one(where, 2, own)))
        for all_shards, leaf in zip(shards, leaves, strict=True):
            all_shards += [shard.data[None] for shard in leaf.addressable_shards]
    stacked = [
        jax.make_array_from_single_device_arrays(
            (len(names), *leaf.shape[2:]), NamedSharding(mesh, PartitionSpec(*place.spec[1:])), own
        )
        for leaf, place, own in zip(jax.tree.leaves(like), places, shards, strict=True)
    ]
    return jax.tree.unflatten(structure, stacked)


@functools.cache
def _expert_setter(where: tuple[NamedSharding, ...]):
    """f(stack, what `_read_experts` gives, (layer, expert on each device)): the stack with these in it, in place."""
    mesh, specs = where[0].mesh, [place.spec for place in where]

    def on_one_device(leaves, new, index):
        return [leaf.at[index].set(n[0].astype(leaf.dtype)) for leaf, n in zip(leaves, new, strict=True)]

    of_new, whole = [PartitionSpec(*spec[1:]) for spec in specs], PartitionSpec()
    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=(specs, of_new, whole), out_specs=specs, check_vma=False)

    def put(stack, new, index):
        leaves, structure = jax.tree.flatten(stack)
        return jax.tree.unflatten(structure, mapped(leaves, jax.tree.leaves(new), index))

    return jax.jit(put, donate_argnums=0)


def _read_shares(checkpoint: Checkpoint, name: str, state: QuantState | None, like, where) -> jax.Array | NF4Weight:
    """One tensor on a mesh, in the form of `like`. Every process reads the rows of its own devices."""
    quantized = isinstance(like, NF4Weight)
    if state is not None:
        return (
            _read_nf4(checkpoint, name, state, where)
            if quantized
            else move(_read(checkpoint, name, state, like), where)
        )

    def as_stored(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return _floats(checkpoint, name, array).reshape(shape)

    shape = checkpoint.shape(name)
    if not quantized:
        return _rows_on_mesh(checkpoint, name, shape, where, lambda x, part: as_stored(x, part).astype(like.dtype))
    w = _rows_on_mesh(checkpoint, name, shape, where.packed, as_stored)
    mesh = where.packed.mesh
    packed, absmax = _quantizer(mesh, where.packed.spec, where.absmax.spec)(w)
    if not like.double_quantized:
        return NF4Weight(packed, absmax)
    nested = where.absmax, where.nested_absmax, where.nested_offset, where.nested_code
    return NF4Weight(packed, *_nested_quantizer(mesh, nested)(absmax))


def _rows_on_mesh(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], where: NamedSharding, convert
) -> jax.Array:
    """A tensor on a mesh, of which this process reads the rows that its devices have, as convert(array, shape)."""

    @functools.cache  # devices may have the same rows
    def read(start: int, stop: int) -> np.ndarray:
        return convert(checkpoint.read_rows(name, start, stop, shape[0]), (stop - start, *shape[1:]))

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        start, stop, _ = index[0].indices(shape[0])
        return read(start, stop)[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, where, part)


@functools.cache
def _quantizer(mesh: Mesh, spec: PartitionSpec, absmax_spec: PartitionSpec):
    """w [N, K] -> codes and float32 scales, all devices quantising what they hold."""

    def on_one_device(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = quantize(w, False)
        return q.packed, q.absmax

    out = spec, absmax_spec
    return jax.jit(jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False))


@functools.cache
def _nested_quantizer(mesh: Mesh, where: tuple[NamedSharding, ...]):
    """Scales -> their quantised form. All devices quantise all of them, so that their mean is that of one device."""
    whole = PartitionSpec()
    all_of_them = jax.shard_map(quantize_absmax, mesh=mesh, in_specs=whole, out_specs=(whole,) * 4, check_vma=False)
    return jax.jit(all_of_them, out_shardings=where)


def _zeros(like, shardings):
    """Zeros in place of `jax.ShapeDtypeStruct`s, made where they shall lie."""
    if isinstance(like, NF4Weight) and isinstance(codes := like.packed, Streamed):
        return dataclasses.replace(_zeros(dataclasses.replace(like, packed=()), shardings), packed=codes)
    if shardings is None:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    return jax.tree.map(
        lambda s, place: jax.jit(lambda: jnp.zeros(s.shape, s.dtype), out_shardings=place)(), like, shardings
    )


_quantize = jax.jit(quantize, static_argnums=1)


def _track(names: list[list[str]], show: bool):
    from rich.progress import track

    return track(names, "Loading weights", disable=not show or not is_first(), console=console)
