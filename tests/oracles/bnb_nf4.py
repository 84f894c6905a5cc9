"""NF4 by bitsandbytes on CPU, block 64, for every tensor of IN.safetensors (float32, bfloat16 or float16, [N, K]).

OUT.safetensors holds, once, `code` f32 [16] and `nested_code` f32 [256], and for each input NAME:
  NAME.packed u8 [ceil(n/2), 1]           NAME.absmax f32 [ceil(n/64)]   NAME.dequant (input's shape and dtype)
  NAME.double.absmax u8 [ceil(n/64)]      NAME.double.nested_absmax f32 [ceil(n/64/256)]   NAME.double.offset f32 []
  NAME.double.absmax_dequant f32 [ceil(n/64)]                            NAME.double.dequant (input's shape and dtype)
"""
# pyright: reportMissingImports=false

import argparse
import copy
import os
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # else bitsandbytes compiles its path for odd shapes: tens of seconds, same values
)

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(2)


def dequantize(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantise as one flat row.

    NF4 blocks run flat over the weight, but the CPU kernel of bitsandbytes 0.50 counts them from the start of each row:
    its values are wrong where in_features is even and no multiple of 64, and it is right for a single row.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return bnb.dequantize_4bit(packed, flat).reshape(state.shape)


def quantize(name: str, weight: torch.Tensor, out: dict[str, torch.Tensor]) -> None:
    """Add the single and the double quantised form of `weight` to `out`."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    out[f"{name}.packed"] = packed
    out[f"{name}.absmax"] = state.absmax
    out[f"{name}.dequant"] = dequantize(packed, state)
    out["code"] = state.code

    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    if not torch.equal(packed, out[f"{name}.packed"]):
        raise SystemExit(f"{name}: double quantisation changed the packed bytes")
    out[f"{name}.double.absmax"] = state.absmax
    out[f"{name}.double.nested_absmax"] = state.state2.absmax
    out[f"{name}.double.offset"] = state.offset
    # The two steps of bitsandbytes' dequantize_4bit: look up and multiply, then add the offset.
    out[f"{name}.double.absmax_dequant"] = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    out[f"{name}.double.dequant"] = dequantize(packed, state)
    out["nested_code"] = state.state2.code.clone()


def main() -> None:
    """Read the arguments and write OUT.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, metavar="IN.safetensors")
    parser.add_argument("outputs", type=Path, metavar="OUT.safetensors")
    args = parser.parse_args()
    out: dict[str, torch.Tensor] = {}
    for name, weight in load_file(args.inputs).items():
        quantize(name, weight, out)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, args.outputs)


if __name__ == "__main__":
    main()
