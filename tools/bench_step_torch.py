"""The peers' training step for `bench_step`: Unsloth, or transformers, PEFT and bitsandbytes, in a process of its own.

    python -m lora_jax.tools.bench_step_torch peft --checkpoint /tmp/random-8b --model llama3.1-8b --case 2x2048

Both load a checkpoint of random weights in bitsandbytes' NF4 (double quantised), which is written first if it is not
there, and which `bench_step --checkpoint` loads too: with the same weights and tokens, and B of the adapters zero, the
first losses must agree. Steps are timed as there. Needs torch, transformers, PEFT and bitsandbytes, and for `unsloth`
that; without a GPU it runs on the CPU.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax.tools.bench_step import SHAPES, hf_config, token_ids

# Not with `import`: what this project needs is installed without them.
_import: Callable[[str], Any] = importlib.import_module

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Prints one RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["unsloth", "peft"])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder; written if it is not there")
    parser.add_argument("--model", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--case", default="2x2048", help="BATCHxTOKENS")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", choices=["adamw_8bit", "adamw_torch"], default="adamw_8bit")
    parser.add_argument("--checkpointing", default="unsloth", help="unsloth, true or false; unsloth is true for peft")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="in one run")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if args.peer == "unsloth":
            _import("unsloth")  # before torch's other users: it patches them
        for name in ("torch", "bitsandbytes", "transformers", "peft"):
            _import(name)
    except ImportError as error:
        print(f"{args.peer} is not measured: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    if not (args.checkpoint / "config.json").exists():
        write_checkpoint(args.checkpoint, args.model)
    print("RESULT " + json.dumps(run(args)))


def write_checkpoint(folder: Path, model: str) -> None:
    """Random weights of a shape in the layout that transformers writes for bitsandbytes; config.json comes last."""
    functional, torch = _import("bitsandbytes.functional"), _import("torch")
    save_file = _import("safetensors.torch").save_file

    config = hf_config(SHAPES[model])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", d // heads)
    q, kv = heads * head, config["num_key_value_heads"] * head
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    linears = {f"self_attn.{name}": shape for name, shape in attention.items()}
    linears |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config["architectures"] == ["Qwen3ForCausalLM"]:
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}

    def normal(shape, scale):
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=generator)

    def quantized(name, shape):
        options: Any = dict(blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8)
        codes, state = functional.quantize_4bit(normal(shape, shape[1] ** -0.5), **options)
        return {name: codes, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}

    index: dict[str, str] = {}

    def save(tensors):
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(config["num_hidden_layers"]):
        at, tensors = f"model.layers.{layer}", {}
        for name, shape in linears.items():
            tensors |= quantized(f"{at}.{name}.weight", shape)
        tensors |= {f"{at}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        save(tensors)
    vocabulary = (config["vocab_size"], d)
    tensors = {"model.embed_tokens.weight": normal(vocabulary, 0.02), "lm_head.weight": normal(vocabulary, 0.02)}
    save({**tensors, "model.norm.weight": torch.ones(d, dtype=torch.bfloat16)})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantization |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    quantization |= {"bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"]}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_tokenizer(folder, config["max_position_embeddings"])
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    _write(folder / "config.json", {**config, **ids, "dtype": "bfloat16", "quantization_config": quantization})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _write_tokenizer(folder: Path, length: int) -> None:
    """One id a byte: the peers want a tokenizer, and do not use it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special).save_pretrained(folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains on one batch again and again; the keys of the result are `bench_step`'s."""
    bitsandbytes, peft, torch, transformers = map(_import, ("bitsandbytes", "peft", "torch", "transformers"))
    gpu = torch.cuda.is_available()
    batch, length = map(int, args.case.split("x"))
    model = (_unsloth if args.peer == "unsloth" else _peft)(args, length, gpu)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = bitsandbytes.optim.AdamW8bit if args.optim == "adamw_8bit" else torch.optim.AdamW
    optimizer = kind(trained, lr=2e-4, weight_decay=0.0)
    ids = torch.from_numpy(token_ids(batch, length, SHAPES[args.model]["vocab_size"])).to("cuda" if gpu else "cpu")
    times, losses = [], []
    for steps in (*[1] * args.warmup, *[args.steps] * args.runs):
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        times.append((time.perf_counter() - start) / steps)
    timed = sorted(times[args.warmup :])
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    if args.peer == "unsloth":
        versions["unsloth"] = _import("unsloth").__version__
    seconds = timed[len(timed) // 2]
    return {
        "implementation": args.peer,
        "model": args.model,
        "case": args.case,
        "remat": f"checkpointing {args.checkpointing}",
        "rank": args.rank,
        "optim": args.optim,
        "ms": 1e3 * seconds,
        "ms_min_max": [1e3 * timed[0], 1e3 * timed[-1]],
        "tokens_per_s": batch * length / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
        "first_step_s": times[0],
        "losses": losses,
        "environment": {**versions, "device": torch.cuda.get_device_name() if gpu else "cpu"},
    }


def _unsloth(args: argparse.Namespace, length: int, gpu: bool) -> Any:
    fast = _import("unsloth").FastLanguageModel
    options: Any = {} if gpu else {"device_map": {"": "cpu"}}
    model, _ = fast.from_pretrained(
        str(args.checkpoint), max_seq_length=length, load_in_4bit=True, local_files_only=True, **options
    )
    checkpointing = {"true": True, "false": False}.get(args.checkpointing, args.checkpointing)
    model = fast.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=TARGETS,
        lora_dropout=0,
        use_gradient_checkpointing=checkpointing,
    )
    fast.for_training(model)
    return model


def _peft(args: argparse.Namespace, length: int, gpu: bool) -> Any:
    del length
    peft, torch, transformers = map(_import, ("peft", "torch", "transformers"))
    device: Any = {"": 0 if gpu else "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, device_map=device, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if args.checkpointing != "false":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


if __name__ == "__main__":
    main()
