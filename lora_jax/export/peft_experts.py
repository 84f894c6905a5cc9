"""Adapters on experts in PEFT's two layouts: one for each linear of each expert, or one for all experts of a layer.

transformers 5 holds the experts of a layer in two parameters, gate_up_proj [E, 2 F, D] and down_proj [E, D, F], which
PEFT adapts by `target_parameters`: its module then stands for all experts, with

    A [E R, K], the rank running fastest, and B [N, R E], the expert running fastest.

Where both parameters are adapted, their two modules are nested: that of gate_up_proj is the `base_layer` of the other.
Adapters of gate and up become one of twice their rank, whose B is zero outside of two blocks. PEFT converts adapters of
single experts to this when it loads them, but then adapts no MLP beside the experts; this layout names those by their
weights.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lora_jax.fused_experts import Part, parts_of, renamed
from lora_jax.models.decoder import DecoderConfig

__all__ = ["LAYOUTS", "config_of_fused", "default_layout", "fuse", "modules_of", "separate"]

LAYOUTS = ("separate", "fused")
# Classes whose single experts PEFT 0.21 does not know of.
_ONLY_FUSED = ("GptOssForCausalLM", "Qwen2MoeForCausalLM")
_ROOT, _INNER, _GATE_UP = "base_model.model.", ".base_layer", "gate_up_proj"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def default_layout(config: DecoderConfig, modules: Iterable[str], dropout: float) -> str:
    """The layout that PEFT, with transformers 5, loads whole: "separate" unless that leaves something out.

    Args:
      config: the model's.
      modules: full names of what has an adapter.
      dropout: that of the adapters.
    """
    experts = {re.search(r"\.layers\.(\d+)\.", name)[1] for name in modules if _is_expert(name)}  # pyright: ignore
    if not experts:
        return "separate"
    some_layers = config.moe is not None and len(experts) < len(config.moe.layers)
    beside = any(_is_mlp(name) and _leaf(name) not in ("gate", "router") for name in modules)
    return "fused" if some_layers or beside or dropout or config.architecture in _ONLY_FUSED else "separate"


def fuse(tensors: dict[str, np.ndarray], config: DecoderConfig, r: int) -> dict[str, np.ndarray]:
    """Tensors of an adapter, by PEFT's names of single experts, in the layout for all experts of a layer.

    Args:
      tensors: A [r, K] and B [N, r] of every linear, and whatever else the adapter has.
      config: of the model.
      r: rank.
    """
    sizes, parts = _wholes(config), _parts(config)
    out, wholes = {}, {}
    for key, tensor in tensors.items():
        match = _LORA.fullmatch(key)
        if match is None or (part := parts.get(match[1])) is None:
            out[_named_by_class(key)] = tensor
        else:
            wholes.setdefault(part.whole, {}).setdefault(match[1], {})[match[2]] = tensor
    for whole, modules in wholes.items():
        linears = list(dict.fromkeys(_leaf(module) for module in modules))
        n, k = sizes[whole]
        experts = config.moe.num_experts  # pyright: ignore[reportOptionalMemberAccess]
        a = np.zeros((experts, len(linears), r, k), np.float32)
        b = np.zeros((n, len(linears), r, experts), np.float32)
        for module, own in modules.items():
            part, j = parts[module], linears.index(_leaf(module))
            a[part.expert, j] = own["A"]
            b[part.rows, j, :, part.expert] = own["B"]
        block, parameter = whole.rpartition(".")[::2]
        inner = _INNER if parameter == _GATE_UP and f"{block}.down_proj" in wholes else ""
        out[f"{_ROOT}{block}{inner}.lora_A.weight"] = a.reshape(-1, k)
        out[f"{_ROOT}{block}{inner}.lora_B.weight"] = b.reshape(n, -1)
    return out


def config_of_fused(peft: dict[str, Any], modules: dict[str, bool], config: DecoderConfig) -> dict[str, Any]:
    """adapter_config.json for the layout that `fuse` makes, of that for single experts.

    Args:
      peft: adapter_config.json.
      modules: full name of every linear and embedding of the model -> whether it has an adapter.
      config: of the model.
    """
    parts = _parts(config)
    modules_or_not, parameters_or_not = {}, {}
    for name, adapted in modules.items():
        if (part := parts.get(name)) is not None:
            parameters_or_not[part.whole] = parameters_or_not.get(part.whole, False) or adapted
        elif _is_mlp(name):  # PEFT takes the names of these for experts
            parameters_or_not[f"{_named_by_class(name)}.weight"] = adapted
        else:
            modules_or_not[name] = adapted
    gate_and_up = {_leaf(name) for name, part in parts.items() if part.whole.endswith(_GATE_UP) and modules.get(name)}
    new = {
        **peft,
        "target_modules": _short(modules_or_not),
        "target_parameters": _short(parameters_or_not),
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,  # PEFT refuses another where parameters are targets
    }
    if len(gate_and_up) == 2:
        pattern = f"experts.{_GATE_UP}"
        factor = math.sqrt(2) if peft["use_rslora"] else 2  # keeps alpha / r, or alpha / sqrt(r)
        new["rank_pattern"] = {pattern: 2 * peft["r"]}
        new["alpha_pattern"] = {pattern: factor * peft["lora_alpha"]}
    return new


def separate(tensors: dict[str, np.ndarray], peft: dict[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """Tensors of an adapter with `target_parameters`, by the names of single experts; what others are named stays.

    An adapter that gate and up share becomes two with equal A: the same model, whose training goes on with two.

    Args:
      tensors: as PEFT saves them.
      peft: adapter_config.json.
      config: of the model.

    Raises:
      ValueError: a tensor has another shape than the model implies, or a rank or scale of its own.
    """
    out, pairs = {}, {}
    for key, tensor in tensors.items():
        match = _LORA.fullmatch(key)
        if match is None or not match[1].removesuffix(_INNER).endswith(".experts"):
            out[renamed(key, config.architecture)] = tensor
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    sizes, parts = _wholes(config), _parts(config)
    by_whole: dict[str, dict[str, Part]] = {}
    for module, part in parts.items():
        by_whole.setdefault(part.whole, {})[module] = part
    named = {f"{module.removesuffix(_INNER)}.{_parameter(module, pairs, peft)}": p for module, p in pairs.items()}
    if missing := sorted(whole for whole in sizes if _is_target(whole, peft) and whole not in named):
        raise ValueError(f"the adapter is damaged: it lacks that of {missing[0]}, which target_parameters names")
    for whole, pair in named.items():
        if whole not in sizes or pair.keys() != {"A", "B"}:
            raise ValueError(f"there is an adapter of {whole}, which this model does not have, or A or B is missing")
        for name, a, b in _split(whole, pair["A"], pair["B"], by_whole[whole], sizes[whole], peft):
            out[f"{_ROOT}{name}.lora_A.weight"], out[f"{_ROOT}{name}.lora_B.weight"] = a, b
    return out


def modules_of(tensors: Iterable[str]) -> set[str]:
    """Full names of the modules whose tensors are those of an adapter."""
    return {match[1] for key in tensors if (match := _LORA.fullmatch(key)) is not None}


def _split(
    whole: str, a: np.ndarray, b: np.ndarray, parts: dict[str, Part], size: tuple[int, int], peft: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, A [r, K], B [N, r]) of every linear of every expert."""
    linears = list(dict.fromkeys(_leaf(module) for module in parts))
    experts, (n, k), r = len(parts) // len(linears), size, peft["r"]
    rank = a.shape[0] // experts
    if a.shape != (experts * rank, k) or b.shape != (n, rank * experts):
        raise ValueError(
            f"the adapter of {whole} has shapes {list(a.shape)} and {list(b.shape)}; {experts} experts [{n}, {k}] want "
            f"[{experts} R, {k}] and [{n}, {experts} R]"
        )
    alpha = _of_pattern(peft.get("alpha_pattern"), whole, peft["lora_alpha"])
    root = math.sqrt if peft.get("use_rslora") else float
    a, b = a.reshape(experts, rank, k), b.reshape(n, rank, experts)
    blocks = rank == len(linears) * r and rank != r
    ranks = {name: slice(j * r, (j + 1) * r) if blocks else slice(None) for j, name in enumerate(linears)}
    if blocks:
        outside = b.copy()
        for module, part in parts.items():
            outside[part.rows, ranks[_leaf(module)]] = 0
        blocks = not outside.any()
    if not math.isclose(alpha / root(rank), peft["lora_alpha"] / root(r), rel_tol=1e-6) or not (blocks or rank == r):
        raise ValueError(
            f"the adapter of {whole} has rank {rank} and lora_alpha {alpha} where r={r} and lora_alpha="
            f"{peft['lora_alpha']}; implemented is one rank and scale for all, or gate and up side by side"
        )
    for module, part in parts.items():
        own = ranks[_leaf(module)]
        yield module, a[part.expert, own], b[part.rows, own, part.expert]


def _parameter(module: str, pairs: dict[str, Any], peft: dict[str, Any]) -> str:
    """Which parameter of its experts a module of PEFT's adapts."""
    block = module.removesuffix(_INNER)
    if module.endswith(_INNER):
        return _GATE_UP
    if f"{block}{_INNER}" in pairs:
        return "down_proj"
    # The module of the other parameter would be nested in it.
    return _GATE_UP if not _is_target(f"{block}.down_proj", peft) else "down_proj"


def _is_target(parameter: str, peft: dict[str, Any]) -> bool:
    return any(f".{parameter}".endswith(f".{target}") for target in peft["target_parameters"])


def _of_pattern(patterns: dict[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches, as PEFT looks it up."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _wholes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of the experts' parameters, by their names in transformers' class."""
    moe, d, wholes = config.moe, config.hidden_size, {}
    if moe is None:
        return wholes
    f = moe.intermediate_size
    for layer in moe.layers:
        block = f"{config.hf_prefix}.layers.{layer}.mlp.experts"
        wholes |= {f"{block}.{_GATE_UP}": (2 * f, d), f"{block}.down_proj": (d, f)}
    return wholes


def _parts(config: DecoderConfig) -> dict[str, Part]:
    """Where each expert's linears, by their full names, are in the parameters of all."""
    if config.moe is None:
        return {}
    swap = -1 if config.architecture == "GptOssForCausalLM" else 1
    shapes = {name: (config.moe.num_experts, *size[::swap]) for name, size in _wholes(config).items()}
    parts = parts_of(shapes, shapes.__getitem__, config.architecture)
    return {name.removesuffix(".weight"): part for name, part in parts.items()}


def _short(adapted: dict[str, bool]) -> list[str]:
    """The names that are adapted; without the layer's number where all layers that have a name are."""
    short = {name: re.sub(r"^.*\.layers\.\d+\.", "", name) for name in adapted}
    partly = {short[name] for name, yes in adapted.items() if not yes}
    return sorted({name if short[name] in partly else short[name] for name, yes in adapted.items() if yes})


def _named_by_class(name: str) -> str:
    """The name in transformers' class of what published files of Mixtral call otherwise."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _is_expert(module: str) -> bool:
    return ".experts." in module


def _is_mlp(module: str) -> bool:
    """Whether it is a router, or a linear of an MLP, beside the experts."""
    return (".mlp." in module or ".block_sparse_moe." in module) and not _is_expert(module)
