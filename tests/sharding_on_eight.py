"""What tests/test_sharding.py asserts about, computed on 8 virtual CPU devices: lines of JSON for a section.

It is a program of its own, because the number of devices is fixed when JAX starts.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import collections
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import lora_jax
from lora_jax import scaling, sharding
from lora_jax.auto import AutoModelForCausalLM
from lora_jax.batches import Example, pack_batch, pad_batch
from lora_jax.kernels.nf4.format import NF4Weight
from lora_jax.lora import add_adapters
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from lora_jax.plan import of_config
from lora_jax.step import make_eval_step, make_train_step
from lora_jax.tools.collectives import Collective, collectives, wire_bytes
from tests import tiny

# 9 blocks of scales in a row of 576, 1152 in a weight of 128 rows: groups of 256 end where no device's rows do.
DENSE = tiny.config(hidden_size=576, head_dim=16, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
MIXTRAL = tiny.config(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_local_experts=4)
MIXTRAL |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2}
BIASES = tiny.config(hidden_size=128, num_attention_heads=8, num_key_value_heads=4) | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}
STEPS = 20


def examples(count: int, seed: int = 0, longest: int = 20) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for length in rng.integers(3, longest + 1, count):
        ids = rng.integers(0, 256, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.4, -100, ids).astype(np.int32)
        labels[0], labels[-1] = -100, ids[-1]
        out.append(Example(ids, labels))
    return out


def batch_of(kind: str, seed: int) -> dict[str, np.ndarray]:
    """[1, 8, T]: rows of very different numbers of labels, and one without any."""
    if kind == "padded":
        rows: list[Any] = [*examples(7, seed), None]
        batch = pad_batch(rows, 32, pad_id=5)
    else:
        many = examples(20, seed)
        batch = pack_batch(many, [list(range(i, min(i + 3, 20))) for i in range(0, 20, 3)] + [[]], 64, pad_id=5)
    return {name: array[None] for name, array in batch.items()}


def run(folder: Path, mesh: Any, kind: str, *, steps: int = STEPS, lora: dict[str, Any] | None = None, **how: Any):
    """Trains; returns (losses, gradients of the first step, adapters at the end, compiled step, model)."""
    model = AutoModelForCausalLM.from_pretrained(folder, mesh=mesh, progress=False)
    lora_jax.get_peft_model(model, **{"r": 4, "verbose": False, **(lora or {})})
    tiny.randomize_adapter(model)
    optimizer = optax.sgd(1e-3, momentum=0.9)  # whose state after one step is the gradient
    _, lora_state, frozen = model.split()
    state = optimizer.init(lora_state)
    batches = [batch_of(kind, seed) for seed in range(2)]
    step = make_train_step(model, optimizer, **how).lower(lora_state, state, frozen, batches[0]).compile()
    losses, gradients = [], None
    for number in range(steps):
        lora_state, state, metrics = step(lora_state, state, frozen, batches[number % 2])
        losses.append(float(metrics["loss"]))
        gradients = jax.tree.map(np.array, state[0].trace) if gradients is None else gradients
    model.update_lora(lora_state)
    return losses, gradients, jax.tree.map(np.array, lora_state), step, model


def far(got: Any, want: Any) -> float:
    """The largest distance of two leaves, relative to the norm of the wanted one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30)) for g, w in pairs)


def compared(got: tuple, want: tuple) -> dict[str, float]:
    return {
        "loss": max(abs(g - w) / w for g, w in zip(got[0], want[0], strict=True)),
        "gradients": far(got[1], want[1]),
        "adapters": far(got[2], want[2]),
    }


def summed(found: list[Collective]) -> list[list]:
    """[kind, dtype, devices, times x operations, their bytes] of each kind, sorted."""
    kinds: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one in found:
        kind = kinds[one.kind, one.dtype, one.group]
        kind[0] += one.times
        kind[1] += one.times * one.bytes
    return sorted([*key, *value] for key, value in kinds.items())


def held(tree: Any) -> tuple[int, int]:
    """Bytes of a tree of arrays in all and on the first device."""
    leaves = jax.tree.leaves(tree)
    here = [np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
    return sum(leaf.nbytes for leaf in leaves), int(sum(here))


def meshes(tmp: Path, config: dict[str, Any], which: list[dict[str, int]], **options: Any) -> None:
    """Every mesh against one device, on packed rows."""
    # "tensor" adds up in another order forward: float32's roundings, ten times larger in the gradients of sharp scores.
    folder = tiny.write_random(tmp / "model", config, scale=1.0)
    want = run(folder, None, "packed", **options)
    for mesh in which:
        got = run(folder, mesh, "packed", **options)
        _, lora, frozen = got[4].split()
        total, here = held(frozen)
        stats, found = got[3].memory_analysis(), collectives(got[3].as_text())
        report(
            mesh=mesh,
            **compared(got, want),
            collectives=summed(found),
            planned=planned(config, mesh),
            received=wire_bytes(found),
            weights=total,
            weights_here=here,
            adapters_here=held(lora)[1],
            arguments=stats.argument_size_in_bytes,
        )


def planned(config: dict[str, Any], mesh: dict[str, int]) -> dict[str, int]:
    """What the planner says of such a step: bytes of weights, and received, on one device."""
    rows = 8 // sharding.row_shards(sharding.make_mesh(mesh))

    def make(mesh: Any) -> Any:
        return of_config(config, lora_jax.LoraConfig(r=4), rows, 64, mesh=mesh)

    work = make(scaling.abstract_mesh(mesh))
    return {"weights": work.weights, "received": scaling.wire(make, mesh).total}


def padded(tmp: Path) -> None:
    """Padded rows, evaluation, layers written out, nothing recomputed, adapters shared out for their size."""
    folder, mesh = tiny.write_random(tmp / "model", DENSE), {"data": 2, "fsdp": 4}
    want = run(folder, None, "padded", steps=2)
    written_out: dict[str, Any] = {"scan_layers": False}
    for how in (
        written_out,
        {**written_out, "remat": "selective"},
        {**written_out, "remat": "none"},
        {"remat": "none"},
    ):
        report(how=how, **compared(run(folder, mesh, "padded", steps=2, **how), want))
    sharding._REPLICATED_UP_TO = 0
    got = run(folder, mesh, "padded", steps=2)
    report(how="adapters shared out", **compared(got, want), bytes=held(got[4].split()[1]))
    batch = {name: array[0] for name, array in batch_of("packed", 3).items()}
    sums = [make_eval_step(one[4])(*one[4].split()[1:], batch) for one in (got, want)]
    report(how="evaluation", loss=abs(float(sums[0]["loss_sum"] / sums[1]["loss_sum"]) - 1))


def vocabulary(tmp: Path) -> None:
    """An adapter on the head, and the embedding table trained as a whole."""
    folder = tiny.write_random(tmp / "model", DENSE)
    trained = {"target_modules": ["q_proj", "down_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    want = run(folder, None, "padded", steps=2, lora=trained)
    for mesh in ({"data": 2, "fsdp": 4}, {"tensor": 2, "fsdp": 4}):
        got = run(folder, mesh, "padded", steps=2, lora=trained)
        report(mesh=mesh, **compared(got, want), bytes=held(got[4].split()[1]))


def real(folder: Path) -> None:
    """SmolLM2 with AdamW, whose 9 heads and 3 key/value heads only rows divide."""
    results = []
    for mesh in (None, {"data": 2, "fsdp": 4}):
        model = AutoModelForCausalLM.from_pretrained(folder, mesh=mesh, dtype="float32", progress=False)
        lora_jax.get_peft_model(model, r=4, verbose=False, target_modules=["q_proj", "down_proj"])
        optimizer = optax.adamw(1e-3)
        _, lora, frozen = model.split()
        state = optimizer.init(lora)
        step = make_train_step(model, optimizer)
        losses = []
        for seed in (0, 1):
            batch = {name: array[:, :, :32] for name, array in batch_of("padded", seed).items()}
            lora, state, metrics = step(lora, state, frozen, batch)
            losses.append(float(metrics["loss"]))
        results.append((losses, held(frozen)))
    (want, _), (got, (total, here)) = results
    report(loss=max(abs(g / w - 1) for g, w in zip(got, want, strict=True)), weights=total, weights_here=here)


def large() -> None:
    """Two and four layers of an 8B Llama on fsdp 8, compiled and not run."""
    for layers, nf4, scan in ((2, True, True), (4, True, True), (4, False, True), (2, True, False), (4, True, False)):
        text, stats = compile_large(layers, nf4, scan)
        weights = [one for one in collectives(text) if one.kind == "all-gather" and one.times == layers]
        others = [one for one in collectives(text) if one not in weights]
        report(
            layers=layers,
            nf4=nf4,
            weights=wire_bytes(weights),
            dtypes=sorted({one.dtype for one in weights}),
            others=wire_bytes(others),
            temp=stats.temp_size_in_bytes,
            whole=f"u8[{layers},14336,2048]" in text,
            logits=[size for size in (2048, 256) if f"[{size},128256]" in text],
        )


def compile_large(layers: int, nf4: bool, scan: bool) -> tuple[str, Any]:
    hf = tiny.config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, vocab_size=128256)
    hf |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    module = Decoder(config_from_hf(hf), jnp.bfloat16)
    for _, _, part in module.block_linears() if nf4 else ():
        part.weight.set_value(NF4Weight.abstract(part.weight.get_value().shape, True))
    model = lora_jax.CausalLM(module, hf_config=hf, source=Path("abstract"))
    model.lora_config = lora_jax.LoraConfig(r=16)
    add_adapters(module, model.lora_config)
    model.mesh = mesh = sharding.make_mesh({"fsdp": 8})
    optimizer = optax.sgd(1e-3)
    _, lora, frozen = model.split()

    def abstract(spec: P, x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    trees = [
        jax.tree.map(abstract, sharding.parameter_specs(tree, mesh), tree, is_leaf=lambda s: isinstance(s, P))
        for tree in (lora, frozen)
    ]
    ids = jax.ShapeDtypeStruct((1, 8, 256), np.int32)
    step = make_train_step(model, optimizer, scan_layers=scan)
    state = jax.eval_shape(optimizer.init, lora)
    compiled = step.lower(trees[0], state, trees[1], {"input_ids": ids, "labels": ids}).compile()
    return compiled.as_text(), compiled.memory_analysis()


def resume(tmp: Path) -> None:
    """A run saved on one mesh goes on on another as it would have gone on where it was."""
    folder = tiny.write_random(tmp / "model", BIASES)
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples(40)]

    def train(out: str, mesh: Any, per_device: int, steps: int, resume: bool) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, progress=False)
        lora_jax.get_peft_model(model, r=4, verbose=False)
        args = lora_jax.SFTConfig(
            output_dir=str(tmp / out),
            mesh=mesh,
            max_steps=steps,
            per_device_train_batch_size=per_device,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="adamw_8bit",
            packing=True,
            max_length=48,
            save_steps=3,
            disable_tqdm=True,
            overwrite_output_dir=False,
        )
        trainer = lora_jax.SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows[:5])
        trainer.train(resume_from_checkpoint=resume)
        losses = [json.loads(line)["loss"] for line in (tmp / out / "metrics.jsonl").read_text().splitlines()]
        return losses, trainer.evaluate()["eval_loss"], jax.tree.map(np.array, model.split()[1])

    want = train("whole", {"data": 2, "fsdp": 4}, 1, 6, resume=False)
    train("moved", {"data": 2, "fsdp": 4}, 1, 3, resume=False)
    for mesh, per_device in (({"fsdp": 2, "tensor": 2, "context": 2}, 4), (None, 8)):
        shutil.rmtree(tmp / "again", ignore_errors=True)
        shutil.copytree(tmp / "moved", tmp / "again")
        got = train("again", mesh, per_device, 6, resume=True)
        report(mesh=mesh, losses=[got[0], want[0]], evaluation=[got[1], want[1]], adapters=far(got[2], want[2]))


def loading(tmp: Path) -> None:
    """Weights that are read straight into their shares, against those that one device reads."""
    from tests.test_fp8 import QWEN, write_fp8

    qwen = {**QWEN, "num_experts": 4, "num_hidden_layers": 2, "vocab_size": 320}
    folders = {
        "a tensor each": tiny.write_random(tmp / "each", MIXTRAL),
        "FP8": write_fp8(tmp / "fp8", qwen)[0],
        "one tensor": fused(tmp / "each", tmp / "fused"),
    }
    meshes = [{"expert": 4, "fsdp": 2}, {"fsdp": 4, "data": 2}, {"expert": 2, "data": 4}]
    for number, (kind, folder) in enumerate(folders.items()):
        for how in ({}, {"load_in_4bit": False}):
            load = functools.partial(AutoModelForCausalLM.from_pretrained, folder, progress=False, **how)
            mesh = meshes[number]
            want, got = (load(mesh=one).split()[2] for one in (None, mesh))
            pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
            total, here = held(got)
            # The mean of the scales, and what is computed from it, may be off by its last bit.
            close = [np.allclose(np.float32(g), np.float32(w), rtol=1e-5, atol=0) for g, w in pairs]
            report(kind=kind, how=how, mesh=mesh, same=sum(close), leaves=len(pairs), weights=total, here=here)


def fused(source: Path, folder: Path) -> Path:
    """The same mixture in the layout of transformers 5: the experts of a layer in two tensors."""
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (np.stack([tensors.pop(f"{block}.{e}.{w}.weight") for e in range(4)]) for w in ("w1", "w2", "w3"))
        block = block.replace("block_sparse_moe", "mlp")
        tensors |= {f"{block}.gate_up_proj": np.concatenate([w1, w3], axis=1), f"{block}.down_proj": w2}
    tensors = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    hf = json.loads((source / "config.json").read_text())
    return tiny.write_folder(folder, hf, tensors, tokenizer=False)


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    section, where = sys.argv[1], Path(sys.argv[2])
    dense = {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 2, "fsdp": 4}, "context": {"context": 4, "data": 2}}
    if section in dense:
        meshes(where, DENSE, [dense[section]])
    elif section == "rows":
        meshes(where, DENSE, [{"data": 8}, {"data": 2, "fsdp": 4}])
    elif section == "biases":
        meshes(where, BIASES, [{"tensor": 2, "context": 2, "fsdp": 2}], steps=2)
    elif section == "mixture":
        meshes(where, MIXTRAL, [{"expert": 4, "data": 2}, {"expert": 2, "fsdp": 4}], steps=2, router_aux_loss_coef=0.1)
    else:
        one = {
            "loading": loading,
            "padded": padded,
            "vocabulary": vocabulary,
            "real": real,
            "resume": resume,
            "large": lambda _: large(),
        }
        one[section](where)
