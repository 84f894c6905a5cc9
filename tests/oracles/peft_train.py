"""Train a LoRA adapter with transformers + PEFT + torch AdamW, one optimizer step per entry of BATCHES.npz.

CONFIG.json: `lr` (a number, or one per step), `weight_decay`, `eps`, `betas`, optional `max_grad_norm` and `seed` (of
PEFT's init), `loraplus_lr_ratio` (PEFT's LoRA+ optimizer); `alpha` and every other key go to peft.LoraConfig by its own
names (r, target_modules, use_rslora, ...).
BATCHES.npz: `input_ids`, `labels` (-100: no loss), `attention_mask`, each [steps, A, B, T], padded on the right.
The loss of a step is sum(nll) / number of label tokens over all A micro-batches. OUT_DIR receives losses.npy and
grad_norms.npy (before clipping) [steps], first_grads.safetensors (before clipping, PEFT's file names), init/ (the
adapter before the first step) and adapter/ (after the last).
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hf_model import load_causal_lm
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

TRAIN_KEYS = ("lr", "weight_decay", "eps", "betas", "max_grad_norm", "seed", "loraplus_lr_ratio")


def make_model(model_dir: Path, base_weights: Path | None, config: dict, init_dir: Path | None):
    """Return the PEFT model in train mode, its adapter read from `init_dir` if given."""
    lora = {key: value for key, value in config.items() if key not in TRAIN_KEYS}
    torch.manual_seed(config.get("seed", 0))
    lora_config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=lora.pop("alpha"), **lora)
    model = get_peft_model(load_causal_lm(model_dir, base_weights=base_weights), lora_config)
    if init_dir is not None:
        initial = load_file(init_dir / "adapter_model.safetensors")
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        if set(initial) != wanted:
            raise SystemExit(f"{init_dir}: tensors differ from the config's: {sorted(set(initial) ^ wanted)[:5]}")
        set_peft_model_state_dict(model, initial)
    return model.train()


def accumulate(model, batch: dict[str, torch.Tensor]) -> float:
    """Leave the gradient of the step's loss in `.grad` and return the loss; batch leaves are [A, B, T]."""
    num_label_tokens = (batch["labels"][..., 1:] != -100).sum().item()
    total = 0.0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        loss = nll / num_label_tokens
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    """Read the arguments, train, write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("batches", type=Path, metavar="BATCHES.npz")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--init-dir", type=Path, help="PEFT adapter folder to start from")
    parser.add_argument("--base-weights", type=Path, help="safetensors file that replaces base weights")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    batches = {name: torch.from_numpy(array).long() for name, array in np.load(args.batches).items()}
    steps = len(batches["input_ids"])
    lrs = np.broadcast_to(config["lr"], steps)

    model = make_model(args.model_dir, args.base_weights, config, args.init_dir)
    model.save_pretrained(args.out_dir / "init")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # foreach=False: the plain per-tensor formula.
    options = {"betas": config["betas"], "eps": config["eps"], "foreach": False}
    ratio, decay = config.get("loraplus_lr_ratio"), config["weight_decay"]
    if ratio is None:
        optimizer = torch.optim.AdamW(params.values(), weight_decay=decay, **options)
    else:
        options |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_embedding=1.0, **options)
    factors = [1.0 if ratio is None else group["lr"] for group in optimizer.param_groups]
    losses, grad_norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(accumulate(model, {name: array[step] for name, array in batches.items()}))
        if step == 0:
            grads = {name.replace(".default", ""): p.grad.clone() for name, p in params.items()}
            save_file(grads, args.out_dir / "first_grads.safetensors")
        max_norm = config.get("max_grad_norm", float("inf"))
        grad_norms.append(torch.nn.utils.clip_grad_norm_(params.values(), max_norm).item())
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = float(lrs[step]) * factor
        optimizer.step()
    np.save(args.out_dir / "losses.npy", np.array(losses))
    np.save(args.out_dir / "grad_norms.npy", np.array(grad_norms))
    model.save_pretrained(args.out_dir / "adapter")


if __name__ == "__main__":
    main()
