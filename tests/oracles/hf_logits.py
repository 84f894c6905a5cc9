"""Logits of a Hugging Face folder, with or without a PEFT adapter.

IN.npz holds `prompt_0` [T], `prompt_1` [T'], ... (ids) and optionally `padded_ids` and `padded_mask` [B, T], padded on
the left. OUT.npz holds float32 logits [T, V] under the same `prompt_*` names and `padded_logits` [B, T, V]; with
`--last N` only the last N positions of each. Values at masked positions mean nothing. With `--each`, MODEL_DIR holds
one folder per model, all get the same inputs (which saves the start-up time), and names become `FOLDER/prompt_0`.
"""
# pyright: reportMissingImports=false

import argparse
from pathlib import Path

import numpy as np
import torch
from hf_model import load_causal_lm, positions_of


def logits_of(model, ids: np.ndarray, mask: np.ndarray, last: int) -> np.ndarray:
    """Return float32 logits [B, min(T, last), V] (all T if `last` is 0)."""
    ids_t, mask_t = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    position_ids = positions_of(mask_t)
    with torch.no_grad():
        if model.config.rope_parameters["rope_type"] == "dynamic":
            # The rotary module keeps the frequencies of the longest input so far; one short input resets them.
            model(input_ids=ids_t[:, :1], attention_mask=torch.ones_like(ids_t[:, :1]), use_cache=False)
        out = model(
            input_ids=ids_t,
            attention_mask=mask_t,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=min(last, ids.shape[1]),
        )
    return out.logits.float().numpy()


def all_logits(model, inputs: dict[str, np.ndarray], last: int) -> dict[str, np.ndarray]:
    """Return the logits of every prompt, each run alone, and of the padded batch."""
    outputs = {}
    for name, ids in inputs.items():
        if name.startswith("prompt_"):
            outputs[name] = logits_of(model, ids[None], np.ones_like(ids)[None], last)[0]
    if "padded_ids" in inputs:
        outputs["padded_logits"] = logits_of(model, inputs["padded_ids"], inputs["padded_mask"], last)
    return outputs


def main() -> None:
    """Read the arguments and write OUT.npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("inputs", type=Path, metavar="IN.npz")
    parser.add_argument("outputs", type=Path, metavar="OUT.npz")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter folder")
    parser.add_argument("--merge", action="store_true", help="merge_and_unload the adapter first")
    parser.add_argument("--base-weights", type=Path, help="safetensors file that replaces base weights")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--last", type=int, default=0, help="keep only the last N positions")
    parser.add_argument("--each", action="store_true", help="MODEL_DIR holds one folder per model")
    args = parser.parse_args()
    if args.merge and args.adapter is None:
        parser.error("--merge needs --adapter")

    inputs = dict(np.load(args.inputs))
    outputs = {}
    for folder in sorted(args.model_dir.iterdir()) if args.each else [args.model_dir]:
        model = load_causal_lm(folder, args.dtype, args.base_weights, args.adapter)
        if args.merge:
            model = model.merge_and_unload()
        prefix = f"{folder.name}/" if args.each else ""
        for name, logits in all_logits(model, inputs, args.last).items():
            outputs[prefix + name] = logits
    np.savez(args.outputs, **outputs)


if __name__ == "__main__":
    main()
