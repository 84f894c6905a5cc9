"""NF4 by bitsandbytes with other block sizes, as a checkpoint stores it.

IN.safetensors holds weights [N, K]; OUT.safetensors gets, for every block size B of --blocksizes and every NAME, the
tensors B.NAME, B.NAME.absmax ... of the checkpoint format (with --double doubly quantised scales), and
B.NAME.DEQUANT, what bitsandbytes makes of them, float32.
"""
# pyright: reportMissingImports=false

import argparse
from pathlib import Path

import bitsandbytes.functional as bnb
from bnb_nf4 import dequantize
from safetensors.torch import load_file, save_file


def main() -> None:
    """Read the arguments and write OUT.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, metavar="IN.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--blocksizes", type=int, nargs="+", default=[128])
    parser.add_argument("--double", action="store_true", help="quantise the absmax as well")
    args = parser.parse_args()
    out = {}
    for name, weight in load_file(args.inputs).items():
        for size in args.blocksizes:
            packed, state = bnb.quantize_4bit(weight, blocksize=size, quant_type="nf4", compress_statistics=args.double)
            out[f"{size}.{name}.DEQUANT"] = dequantize(packed, state)
            out[f"{size}.{name}"] = packed
            out |= {f"{size}.{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, args.out)


if __name__ == "__main__":
    main()
