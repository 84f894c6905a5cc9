"""What transformers and bitsandbytes make of a 4-bit folder: the weights as they see them, and what is missing.

For every folder of MODELS_DIR, OUT_DIR gets NAME.safetensors, every parameter by its name in the class, those in 4 bits
dequantised by bitsandbytes to float32; and NAME.json: names of those in 4 bits, missing and unexpected keys, and the
greedy continuation of a few ids, computed from the 4-bit model itself.
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import hf_model  # noqa: F401  (sets threads, offline mode)
import torch
from bitsandbytes.nn import Params4bit
from bnb_nf4 import dequantize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Read the arguments and write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    for folder in sorted(args.models_dir.iterdir()):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="cpu", output_loading_info=True
        )
        quantised, weights = [], {}
        # Before any forward call: on CPU one may repack the weights in place.
        for name, p in model.named_parameters():
            if isinstance(p, Params4bit):
                quantised.append(name)
                state = p.quant_state
                state.dtype = torch.float32
                weights[name] = dequantize(p, state)
            else:
                weights[name] = p.detach().float().contiguous()
        save_file(weights, args.out_dir / f"{folder.name}.safetensors")
        ids = torch.arange(3, 11)[None]
        report = {
            "quantised": sorted(quantised),
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "generated": model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[
                0
            ].tolist(),
        }
        (args.out_dir / f"{folder.name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
