"""Write MODEL_DIR as a bitsandbytes NF4 checkpoint, as the `*-bnb-4bit` ones on the hub, by transformers itself.

OUT_DIR receives the checkpoint (with the tokenizer files of MODEL_DIR) and, beside its own weights,
DEQUANT.safetensors: every weight under its Hugging Face name as the 4-bit model sees it (dequantised by bitsandbytes,
in --dtype).
"""
# pyright: reportMissingImports=false

import argparse
import shutil
from pathlib import Path

import hf_model  # noqa: F401  (sets threads, offline mode)
import torch
from bitsandbytes.nn import Params4bit
from bnb_nf4 import dequantize
from safetensors.torch import save_file
from tiny_models import write_classic_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")


def main() -> None:
    """Read the arguments and write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--double", action="store_true", help="quantise the absmax as well")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--classic", action="store_true", help="config.json in the form of hub files of transformers 4")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=args.double,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_dir, quantization_config=quantization, dtype=dtype, device_map="cpu"
    )
    # Before any forward call: on CPU one may repack the weights in place and round their absmax to bfloat16.
    model.save_pretrained(args.out_dir)
    if args.classic:
        write_classic_config(args.out_dir)
    for pattern in TOKENIZER_FILES:
        for file in args.model_dir.glob(pattern):
            shutil.copy(file, args.out_dir)
    dequantized = {
        name: dequantize(p, p.quant_state) if isinstance(p, Params4bit) else p.detach()
        for name, p in model.named_parameters()  # names a tied weight once, as the checkpoint does
    }
    save_file(dequantized, args.out_dir / "DEQUANT.safetensors")


if __name__ == "__main__":
    main()
