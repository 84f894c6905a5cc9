"""What PEFT makes of adapters: logits, what it complains about, and the adapter as PEFT saves it again.

IN.json is a list of cases {"name", "model": folder, "adapter": folder} or, for an adapter that PEFT makes with random
weights, {"name", "model", "config": fields of LoraConfig}. All get the ids of `ids` [T] in IDS.npz. OUT_DIR gets
NAME.npy, logits [T, V] in float32, NAME/, the adapter as PEFT saves it, NAME.safetensors with the gradients of the
mean loss of all next tokens, and warnings.json {NAME: messages}.
"""
# pyright: reportMissingImports=false

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from hf_model import load_causal_lm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy


def adapt(case: dict):
    """Return the model of a case, with its adapter."""
    model = load_causal_lm(case["model"])
    if "adapter" in case:
        return PeftModel.from_pretrained(model, case["adapter"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **case["config"]))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.4 / param.shape[-1] ** 0.5)
    return model.eval()


def main() -> None:
    """Read the arguments and write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="IN.json")
    parser.add_argument("ids", type=Path, metavar="IDS.npz")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    ids = torch.tensor(np.load(args.ids)["ids"])[None].long()
    messages = {}
    for case in json.loads(args.cases.read_text()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = adapt(case)
        messages[case["name"]] = [str(warning.message) for warning in caught]
        for name, param in model.named_parameters():
            param.requires_grad_("lora_" in name or "modules_to_save" in name)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        np.save(args.out_dir / f"{case['name']}.npy", logits.detach().numpy())
        cross_entropy(logits[:-1], ids[0, 1:]).backward()
        grads = {name: param.grad.contiguous() for name, param in model.named_parameters() if param.grad is not None}
        save_file(grads, args.out_dir / f"{case['name']}.safetensors")
        model.save_pretrained(args.out_dir / case["name"], save_embedding_layers=False)
    (args.out_dir / "warnings.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
