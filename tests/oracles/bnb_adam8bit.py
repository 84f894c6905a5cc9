"""8-bit AdamW by bitsandbytes on CPU, and its block-wise 8-bit quantisation, blocks of 256.

IN.safetensors holds float32 tensors: `param.NAME` [...], gradients `grad.NAME` [steps, ...], and `values.NAME` [...].
OUT.safetensors holds
  signed_map, unsigned_map                            f32 [256]
  for each param, after every step, stacked [steps, ...]:
    NAME.param f32 [...]     NAME.codes1, NAME.codes2 u8 [...]     NAME.absmax1, NAME.absmax2 f32 [ceil(n/256)]
    with NAME.state1, NAME.state2 f32 [...] in place of codes and absmax for less than 4096 elements
  for each of `values`, with MAP signed and unsigned (of the absolute values for unsigned):
    NAME.MAP.codes u8 [...]  NAME.MAP.absmax f32 [ceil(n/256)]     nearest value of the map
    NAME.MAP.values f32 [...]                                      read back
"""
# pyright: reportMissingImports=false

import argparse
import os
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

torch.set_num_threads(2)


def optimize(name: str, start: torch.Tensor, grads: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """One parameter by itself through all steps."""
    parameter = torch.nn.Parameter(start.clone())
    betas = (args.beta1, args.beta2)
    optimizer = bnb.optim.AdamW8bit([parameter], lr=args.lr, betas=betas, eps=args.eps, weight_decay=args.weight_decay)
    steps: dict[str, list[torch.Tensor]] = {}
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[parameter]
        kept = {"param": parameter.data}
        for i in "12":
            if state[f"state{i}"].dtype == torch.uint8:
                kept |= {f"codes{i}": state[f"state{i}"], f"absmax{i}": state[f"absmax{i}"]}
            else:
                kept[f"state{i}"] = state[f"state{i}"]
        for key, value in kept.items():
            steps.setdefault(f"{name}.{key}", []).append(value.clone())
    return {key: torch.stack(values) for key, values in steps.items()}


def quantize(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both maps."""
    out = {}
    for kind in ("signed", "unsigned"):
        table = functional.create_dynamic_map(signed=kind == "signed")
        # As float64: the CPU kernel for float32 rounds to a grid first, the code for other dtypes takes the nearest.
        given = (values if kind == "signed" else values.abs()).double()
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(given, table, 256)
        back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, table, 256, torch.float32)
        out |= {f"{name}.{kind}.codes": codes, f"{name}.{kind}.absmax": absmax, f"{name}.{kind}.values": back}
    return out


def main() -> None:
    """Read the arguments and write OUT.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, metavar="IN.safetensors")
    parser.add_argument("outputs", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    args = parser.parse_args()
    given = load_file(args.inputs)
    out = {f"{kind}_map": functional.create_dynamic_map(signed=kind == "signed") for kind in ("signed", "unsigned")}
    for key, tensor in given.items():
        kind, name = key.split(".", 1)
        if kind == "param":
            out |= optimize(name, tensor, given[f"grad.{name}"], args)
        elif kind == "values":
            out |= quantize(name, tensor)
    save_file({key: tensor.contiguous() for key, tensor in out.items()}, args.outputs)


if __name__ == "__main__":
    main()
