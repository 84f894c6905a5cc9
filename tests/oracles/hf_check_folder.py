"""Load a folder with transformers (weights, tokenizer, generation config) and print one JSON object about it."""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import hf_model  # noqa: F401  (sets threads, offline mode)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    """Read the argument and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--no-tokenizer", action="store_true", help="the folder is meant to have none")
    args = parser.parse_args()
    model, info = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype="auto", output_loading_info=True)
    report = {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),  # a tied weight counts once
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "mismatched_keys": [str(key) for key in info["mismatched_keys"]],
        "error_msgs": [str(message) for message in info.get("error_msgs") or ()],
        "quantization_config": getattr(model.config, "quantization_config", None) is not None,
        "generation_config": None,
        "tokenizer": None,
    }
    if (args.model_dir / "generation_config.json").exists():
        report["generation_config"] = GenerationConfig.from_pretrained(args.model_dir).to_diff_dict()
    if not args.no_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
        report["tokenizer"] = {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "chat_template": tokenizer.chat_template is not None,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
