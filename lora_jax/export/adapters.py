"""Several adapters as one: their weighted sum, as PEFT's `add_weighted_adapter` makes it.

a, b = read_adapter(model, "coder"), read_adapter(model, "poet")  # of lora_jax.export.peft
put_on(model, a)  # ... and put_on(model, b) instead, as often as you like
put_on(model, combine([a, b], [0.7, 0.3], "cat"))
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from lora_jax.export.peft import Adapter
from lora_jax.lora import regex_of

__all__ = ["COMBINATIONS", "combine"]

COMBINATIONS = ("cat", "linear")
_KEY = re.compile(r"(base_model\.model\.(.+)\.lora_(?:embedding_)?)([AB])((?:\.weight)?)")


def combine(adapters: Sequence[Adapter], weights: Sequence[float], combination_type: str = "cat") -> Adapter:
    """One adapter for several of one base model.

    With s_i the scale of adapter i, the result has scale 1 and

      "cat": A = [w_1 s_1 A_1; w_2 s_2 A_2 ...] and B = [B_1, B_2 ...], of all ranks together: its product is exactly
        the weighted sum of the adapters' products.
      "linear": A = sum of sign(w_i) sqrt(|w_i| s_i) A_i and B = sum of sqrt(|w_i| s_i) B_i, of the rank that all have:
        smaller, and with products of one adapter's A and another's B in it.

    Args:
      adapters: from `read_adapter` or `take_off`.
      weights: one for each; may be negative.
      combination_type: "cat" or "linear".

    Raises:
      ValueError: unknown type, no adapters or another number of weights, ranks that differ ("linear"), DoRA, or modules
        that are trained whole.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r} is unknown; known are {', '.join(COMBINATIONS)}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"wanted adapters and as many weights, got {len(adapters)} and {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be numbers, got {list(weights)}")
    pairs = [_pairs(adapter) for adapter in adapters]
    modules = sorted(set().union(*pairs))
    found = {}
    for module in modules:
        own = [
            (pair[module], weight, adapter.config.scale_of(module))
            for pair, weight, adapter in zip(pairs, weights, adapters, strict=True)
            if module in pair
        ]
        found[module] = _cat(own) if combination_type == "cat" else _linear(module, own)
    rank = max(len(a) for a, _ in found.values())
    tensors = {}
    for module, (a, b) in found.items():
        a_name, b_name = _names(module)
        missing = rank - len(a)  # a module that not all have gets zeros, so that all are of one rank
        tensors[a_name] = np.pad(a, ((0, missing), (0, 0)))
        tensors[b_name] = np.pad(b, ((0, 0), (0, missing)))
    config = dataclasses.replace(
        adapters[0].config,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=regex_of(modules),
        layers_to_transform=None,
    )
    return Adapter(config, tensors)


def _cat(own: list[tuple[tuple[np.ndarray, np.ndarray], float, float]]) -> tuple[np.ndarray, np.ndarray]:
    a = np.concatenate([np.float32(weight * scale) * a for (a, _), weight, scale in own])
    return a, np.concatenate([b for (_, b), _, _ in own], axis=1)


def _linear(
    module: str, own: list[tuple[tuple[np.ndarray, np.ndarray], float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    if len(ranks := {len(a) for (a, _), _, _ in own}) > 1:
        raise ValueError(f"'linear' wants adapters of one rank, {module} has {sorted(ranks)}; use 'cat'")
    roots = [np.float32(math.sqrt(abs(weight) * scale)) for _, weight, scale in own]
    a = sum(
        np.float32(math.copysign(1, weight)) * root * a for root, ((a, _), weight, _) in zip(roots, own, strict=True)
    )
    b = sum(root * b for root, ((_, b), _, _) in zip(roots, own, strict=True))
    return np.asarray(a), np.asarray(b)


def _pairs(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [R, K] and B [N, R] of every module by its full name."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is not of an adapter's A or B (DoRA, or trained whole): it cannot be combined")
        parts.setdefault(match[2], {})[match[3]] = tensor
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _names(module: str) -> tuple[str, str]:
    root = f"base_model.model.{module}"
    if module.endswith("embed_tokens"):
        return f"{root}.lora_embedding_A", f"{root}.lora_embedding_B"
    return f"{root}.lora_A.weight", f"{root}.lora_B.weight"
