"""Greedy generation by transformers, attention masks always given.

IN.json: {"prompts": [[ids], ...], "max_new_tokens": n, "batched": false, "pad_token_id": 0, "eos_token_id": null}.
`batched` runs all prompts as one left-padded batch. `eos_token_id` (an id or a list) overrides generation_config;
[] never stops. OUT.json: {"tokens": [[new ids], ...], "margins": [[top logit minus the second, per new token], ...]};
a row ends with its end token. A small margin tells a rounding difference from a fault.
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import torch
from hf_model import load_causal_lm


def generate(model, prompts: list[list[int]], request: dict) -> tuple[list[list[int]], list[list[float]]]:
    """Generate for `prompts` as one left-padded batch."""
    width = max(map(len, prompts))
    pad = request.get("pad_token_id", 0)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = model.generation_config
    eos = request.get("eos_token_id")
    if eos is not None:
        config.eos_token_id = eos or None
    eos_ids = config.eos_token_id
    eos_ids = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids or ())
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=request["max_new_tokens"],
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top2 = torch.stack(out.logits, dim=1).float().topk(2).values  # [B, n, 2]
    tokens, margins = [], []
    for row, values in zip(out.sequences[:, width:].tolist(), top2, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
        tokens.append(row[:length])
        margins.append((values[:length, 0] - values[:length, 1]).tolist())
    return tokens, margins


def main() -> None:
    """Read the arguments and write OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("inputs", type=Path, metavar="IN.json")
    parser.add_argument("outputs", type=Path, metavar="OUT.json")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter folder")
    parser.add_argument("--base-weights", type=Path, help="safetensors file that replaces base weights")
    args = parser.parse_args()
    request = json.loads(args.inputs.read_text())
    model = load_causal_lm(args.model_dir, base_weights=args.base_weights, adapter=args.adapter)
    groups = [request["prompts"]] if request.get("batched") else [[p] for p in request["prompts"]]
    result: dict[str, list] = {"tokens": [], "margins": []}
    for group in groups:
        tokens, margins = generate(model, group, request)
        result["tokens"] += tokens
        result["margins"] += margins
    args.outputs.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
