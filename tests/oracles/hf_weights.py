"""Weights as transformers loads them: MODEL_DIR -> OUT.safetensors, float32, under the names of its class."""
# pyright: reportMissingImports=false

import argparse
from pathlib import Path

from hf_model import load_causal_lm
from safetensors.torch import save_file


def main() -> None:
    """Read the arguments and write OUT.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("outputs", type=Path, metavar="OUT.safetensors")
    args = parser.parse_args()
    model = load_causal_lm(args.model_dir)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, args.outputs)


if __name__ == "__main__":
    main()
