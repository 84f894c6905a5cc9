"""Decode MXFP4 as transformers does: IN.npz with `blocks` and `scales` -> OUT.npy, float32 [E, K, N]."""
# pyright: reportMissingImports=false

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def main() -> None:
    """Read the arguments and write OUT.npy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path, metavar="IN.npz")
    parser.add_argument("outputs", type=Path, metavar="OUT.npy")
    args = parser.parse_args()
    blocks, scales = (torch.tensor(array) for array in np.load(args.inputs).values())
    np.save(args.outputs, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy())


if __name__ == "__main__":
    main()
