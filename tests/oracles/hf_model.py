"""Load a Hugging Face causal language model as the reference for the tests: float32, two threads, eager attention.

Imported by the oracle scripts beside it; runs in the torch environment, never in the library's own.
"""
# pyright: reportMissingImports=false

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait must not spin: beside other work on the same cores that made generation four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

torch.set_num_threads(2)
logging.disable_progress_bar()


def load_causal_lm(folder: Path, dtype: str = "float32", base_weights: Path | None = None, adapter: Path | None = None):
    """Return the model of `folder` in eval mode.

    `base_weights` is a safetensors file under Hugging Face names whose tensors replace the model's own (cast to its
    dtype), so that a dequantised NF4 base can be run in float32. `adapter` is a PEFT folder put on top.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    if base_weights is not None:
        replace_weights(model, base_weights)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def replace_weights(model: torch.nn.Module, file: Path) -> None:
    """Copy every tensor of `file` into `model`; a name or shape that the model does not have is an error."""
    result = model.load_state_dict(load_file(file), strict=False)
    if result.unexpected_keys:
        raise SystemExit(f"{file} has tensors that the model lacks: {result.unexpected_keys[:5]}")


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count positions from the first unmasked token of each row, as `generate` does (and `forward` alone does not)."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
