"""The peers' kernels for `bench_kernels`: torch and bitsandbytes, or Unsloth, each in a process of its own.

Needs torch with a GPU, bitsandbytes and, for `unsloth`, unsloth; a peer that cannot be imported prints one line that
says so. Times are medians of CUDA events around one call, with working sets that rotate; launches overlap with the
kernels before them, so that a call of many microseconds costs its kernels alone.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from lora_jax.tools.bench_kernels import D, F, V, print_row


def main() -> None:
    """Prints a ROW line for every measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["torch", "unsloth"])
    parser.add_argument("groups", nargs="*")
    args = parser.parse_args()
    try:
        if args.peer == "unsloth":
            importlib.import_module("unsloth")  # before torch's other users: it patches them
        torch, bnb = importlib.import_module("torch"), importlib.import_module("bitsandbytes")
    except ImportError as error:
        print(f"{args.peer} is not measured: {error}", file=sys.stderr)
        return
    peer = (Torch if args.peer == "torch" else Unsloth)(torch, bnb)
    versions = {"torch": torch.__version__, "bitsandbytes": bnb.__version__}
    if args.peer == "unsloth":
        versions["unsloth"] = importlib.import_module("unsloth").__version__
    print("ENVIRONMENT " + json.dumps(versions))
    for group in args.groups:
        if hasattr(peer, group):
            getattr(peer, group)()


class Torch:
    """torch, cuBLAS and bitsandbytes."""

    def __init__(self, torch: Any, bnb: Any):
        self.torch, self.bnb, self.functional = torch, bnb, bnb.functional

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = False):
        """Random normal bfloat16 numbers on the GPU."""
        x = scale * self.torch.randn(*shape, device="cuda")
        return x.to(self.torch.bfloat16).requires_grad_(grad)

    def nf4(self, n: int, k: int):
        """(packed, state) of a random double-quantised weight [N, K]."""
        w = self.normal(n, k, scale=k**-0.5)
        return self.functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")

    def report(
        self, op: str, case: str, name: str, fns: list[Callable], *, flops: float = 0, bytes: float = 0, reps=20
    ) -> None:
        """Times the functions in turn and prints a row."""
        torch = self.torch

        def measure() -> float:
            for i in range(max(3, len(fns))):
                fns[i % len(fns)]()
            torch.cuda.synchronize()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(reps + 1)]
            marks[0].record()
            for i in range(reps):
                fns[i % len(fns)]()
                marks[i + 1].record()
            torch.cuda.synchronize()
            return 1e3 * statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))

        print_row(op, case, name, measure, flops, bytes)

    def dequantize(self) -> None:
        """bitsandbytes' dequantisation."""
        for n, k in ((F, D), (D, F)):
            weights = [self.nf4(n, k) for _ in range(4)]
            fns = [lambda w=w: self.functional.dequantize_4bit(*w) for w in weights]
            self.report("dequantise NF4", f"{n}x{k}", "bitsandbytes", fns, bytes=n * k * (0.5 + 2 + 1 / 64))

    def linear(self) -> None:
        """bitsandbytes' matmul without an adapter."""
        for n, k in ((F, D), (D, F)):
            weights = [self.nf4(n, k) for _ in range(8)]
            for m in (1, 16, 64, 4096, 16384):
                x = self.normal(m, k)
                fns = [lambda w=w, x=x: self.bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]) for w in weights]
                case, name = f"M {m}, {k} -> {n}", "bitsandbytes, no LoRA"
                self.report("LoRA linear, forward", case, name, fns, flops=2 * m * n * k)

    def attention(self) -> None:
        """torch's scaled_dot_product_attention by its flash-2 and cuDNN kernels."""
        attention = importlib.import_module("torch.nn.attention")
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        for case, batch, length in (("2 x 2048", 2, 2048), ("1 x 8192", 1, 8192), ("1 x 32768", 1, 32768)):
            q = self.normal(batch, 32, length, 128, grad=True)
            k, v = (self.normal(batch, 8, length, 128, grad=True) for _ in range(2))
            dout = self.normal(*q.shape)
            flops = 2 * batch * 32 * length * length * 128

            def both(q=q, k=k, v=v, dout=dout):
                out = sdpa(q, k, v, is_causal=True, enable_gqa=True)
                self.torch.autograd.grad(out, (q, k, v), dout)

            for name, backend in (("torch flash-2", "FLASH_ATTENTION"), ("torch cuDNN", "CUDNN_ATTENTION")):
                with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                    one = [lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True, enable_gqa=True)]
                    self.report("attention, forward", case, name, one, flops=flops)
                    self.report("attention, fwd + bwd", case, name, [both], flops=3.5 * flops)


class Unsloth(Torch):
    """Unsloth's kernels."""

    def dequantize(self) -> None:
        """fast_dequantize."""
        kernels = importlib.import_module("unsloth.kernels.utils")
        for n, k in ((F, D), (D, F)):
            weights = [self.nf4(n, k) for _ in range(4)]
            fns = [lambda w=w: kernels.fast_dequantize(*w) for w in weights]
            self.report("dequantise NF4", f"{n}x{k}", "Unsloth", fns, bytes=n * k * (0.5 + 2 + 1 / 64))

    def linear(self) -> None:
        """matmul_lora at rank 16."""
        torch, kernels = self.torch, importlib.import_module("unsloth.kernels.utils")
        for n, k in ((F, D), (D, F)):
            weights = [self.nf4(n, k) for _ in range(4)]
            a, b = 0.02 * torch.randn(16, k, device="cuda"), 0.02 * torch.randn(n, 16, device="cuda")
            for m in (4096, 16384):
                x = self.normal(m, k)
                fns = [lambda w=w, x=x, a=a, b=b: kernels.matmul_lora(x, *w, a, b, 1.0) for w in weights]
                with torch.no_grad():
                    self.report("LoRA linear, forward", f"M {m}, {k} -> {n}", "Unsloth", fns, flops=2 * m * n * k)

    def attention(self) -> None:
        """Unsloth has no attention kernel of its own."""

    def mlp(self) -> None:
        """apply_lora_mlp_swiglu, forward and backward."""
        torch = self.torch
        peft, kernels = importlib.import_module("peft"), importlib.import_module("unsloth.kernels")
        blocks = [self._mlp(peft) for _ in range(2)]
        for m in (4096, 16384):
            x, dy = self.normal(1, m, D, grad=True), self.normal(1, m, D, scale=0.01)

            def both(block, x=x, dy=dy):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    out = kernels.apply_lora_mlp_swiglu(block.mlp, x)
                out.backward(dy)
                x.grad = None
                for p in block.parameters():
                    p.grad = None

            fns = [lambda block=block: both(block) for block in blocks]
            self.report("LoRA MLP, fwd + bwd", f"M {m}", "Unsloth", fns, flops=12 * m * D * F)

    def _mlp(self, peft: Any):
        torch, nn = self.torch, self.torch.nn
        block = nn.Module()
        block.mlp = nn.Module()
        for name, (n, k) in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items():
            linear = self.bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
            )
            setattr(block.mlp, name, linear.to(torch.bfloat16))
        block.mlp.act_fn = nn.SiLU()
        block = block.to("cuda").requires_grad_(False)
        block.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
        block = peft.inject_adapter_in_model(config, block)
        for name, p in block.named_parameters():
            if "lora_" in name:
                p.data = p.data.to("cuda").float()
                p.requires_grad_(True)
        return block.train()

    def loss(self) -> None:
        """unsloth_fused_ce_loss, forward and backward."""
        torch = self.torch
        fused = importlib.import_module("unsloth_zoo.loss_utils").unsloth_fused_ce_loss
        w = self.normal(V, D, scale=0.02)
        for m in (4096, 16384):
            x = self.normal(1, m, D, grad=True)
            labels = torch.randint(0, V, (1, m), device="cuda")

            def both(x=x, labels=labels):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    value = fused(
                        trainer=None, hidden_states=x, lm_head_weight=w, lm_head_bias=None, labels=labels,
                        torch_compile=True,
                    )  # fmt: skip
                value.backward()
                x.grad = None

            self.report("lm_head + cross-entropy, fwd + bwd", f"T {m}", "Unsloth", [both], flops=4 * m * D * V, reps=10)

    def elementwise(self) -> None:
        """fast_rms_layernorm, forward and backward."""
        kernel = importlib.import_module("unsloth.kernels").fast_rms_layernorm
        norm = self.torch.nn.RMSNorm(D, eps=1e-5, device="cuda", dtype=self.torch.bfloat16).requires_grad_(False)
        sets = [(self.normal(1, 8192, D, grad=True), self.normal(1, 8192, D)) for _ in range(4)]

        def both(x, dy):
            kernel(norm, x).backward(dy)
            x.grad = None

        fns = [lambda s=s: both(*s) for s in sets]
        self.report("RMSNorm, fwd + bwd", "8192 x 4096", "Unsloth", fns, bytes=5 * 8192 * D * 2)


if __name__ == "__main__":
    main()
