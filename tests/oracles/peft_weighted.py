"""Adapters combined by PEFT's `add_weighted_adapter`: logits [T, V], float32.

IN.json: {"model": folder, "adapters": [folders], "ids": [T], "cases": [{"name", "weights", "combination_type"}]};
OUT_DIR gets NAME.npy, logits with the combination.
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hf_model import load_causal_lm
from peft import PeftModel


def main() -> None:
    """Read the arguments and write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="IN.json")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    given = json.loads(args.cases.read_text())
    first, *others = given["adapters"]
    model = PeftModel.from_pretrained(load_causal_lm(given["model"]), first, adapter_name="0")
    for i, folder in enumerate(others, 1):
        model.load_adapter(folder, adapter_name=str(i))
    names = [str(i) for i in range(len(given["adapters"]))]
    for case in given["cases"]:
        model.add_weighted_adapter(
            names, case["weights"], adapter_name=case["name"], combination_type=case["combination_type"]
        )
        model.set_adapter(case["name"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([given["ids"]]), use_cache=False).logits[0]
        np.save(args.out_dir / f"{case['name']}.npy", logits.numpy())


if __name__ == "__main__":
    main()
