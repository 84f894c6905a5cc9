"""One process of several that tests/test_distributed.py starts: it prints lines of JSON.

python -m tests.one_of_several HOST:PORT PROCESSES NUMBER SECTION FOLDER JSON

With "launcher" in place of HOST:PORT the environment says where and which it is.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import lora_jax
from lora_jax import data, distributed
from tests import tiny

ROWS = [
    {"input_ids": ids.tolist(), "labels": np.where(np.arange(len(ids)) < 2, -100, ids).tolist()}
    for ids in (tiny.ids(1, 4 + 5 * i % 17, seed=i)[0] for i in range(40))
]


def train(
    folder: Path, *, out: str, mesh: Any, rows: int, resume: bool = False, callbacks: Any = (), **more: Any
) -> Any:
    """Trains four steps in folder / out, on `rows` rows per device that has rows of its own."""
    model = lora_jax.AutoModelForCausalLM.from_pretrained(folder / "model", mesh=mesh, progress=False)
    lora_jax.get_peft_model(model, r=4, verbose=False)
    args = lora_jax.SFTConfig(
        output_dir=str(folder / out),
        mesh=mesh,
        max_steps=4,
        per_device_train_batch_size=rows,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        packing=True,
        max_length=48,
        save_steps=2,
        disable_tqdm=True,
        **more,
    )
    trainer = lora_jax.SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:5], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def losses(folder: Path) -> list[float]:
    """Of the training steps that metrics.jsonl holds."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def read_bytes() -> int:
    """Bytes that this process has read from files so far."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def message(call: Any, *arguments: Any, **more: Any) -> str:
    """What the error says that the call ends with."""
    try:
        call(*arguments, **more)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failing(number: int) -> None:
    with distributed.together("reading the data"):
        if jax.process_index() == number:
            raise ValueError("the file is not there")


def agreements(folder: Path) -> None:
    """What processes tell each other, the errors that all have, and what is read of the weights."""
    number, load = jax.process_index(), lora_jax.AutoModelForCausalLM.from_pretrained
    mesh = {"fsdp": len(jax.devices())}
    load(folder / "model", mesh=mesh, progress=False)
    before = read_bytes()
    model = load(folder / "model", mesh=mesh, progress=False)  # now nothing is compiled, or imported
    read = read_bytes() - before
    lora_jax.get_peft_model(model, r=4, verbose=False)

    def trainer(rows: Any = ROWS, **more: Any) -> Any:
        args = lora_jax.SFTConfig(output_dir=str(folder / "refused"), max_steps=1, disable_tqdm=True, **more)
        return lora_jax.SFTTrainer(model, args, train_dataset=rows)

    report(
        gathered=[len(text) for text in distributed.gather("x" * 3000 * number)],
        read=read,
        share=sum(shard.data.nbytes for leaf in jax.tree.leaves(model.split()[2]) for shard in leaf.addressable_shards),
        settings=message(distributed.agree, "settings", {"lr": 1e-3 * (1 + number), "r": 4}),
        same=message(distributed.agree, "settings", {"lr": 1e-3, "r": None}),
        failing=message(failing, len(jax.devices()) // 2 - 1),
        folder=message(distributed.check_shared_folder, folder / f"only-{number}"),
        mesh=message(load, folder / "model", mesh={"data": 3}, progress=False),
        meshes=message(load, folder / "model", mesh=mesh if number else "data=-1", progress=False),
        heads=message(load, folder / "model", mesh={"tensor": 2, "context": 2, "data": -1}, progress=False),
        config=message(trainer, learning_rate=1e-3 if number else 1e-4),
        data=message(lambda: trainer(ROWS[number:]).train()),
    )


def reading(folder: Path, mesh: Any) -> None:
    """What is read of a checkpoint's weights, and their sum."""
    load = lora_jax.AutoModelForCausalLM.from_pretrained
    load(folder, mesh=mesh, progress=False)
    before = read_bytes()
    model = load(folder, mesh=mesh, progress=False)
    read = read_bytes() - before
    sums = jax.jit(lambda leaves: [jax.numpy.sum(jax.numpy.float32(leaf)) for leaf in leaves])
    report(read=read, sums=[float(one) for one in sums(jax.tree.leaves(model.split()[2]))])


def tokenising() -> None:
    """What rows this process tokenises itself, what all of them give, and what is said of them."""
    rows, own = [dict(row, number=number) for number, row in enumerate(ROWS)], []

    class Counting(data._RowTokenizer):
        def __call__(self, row: Any) -> Any:
            own.append(row["number"])
            return super().__call__(row)

    with mock.patch.object(data, "_RowTokenizer", Counting):
        examples, said = tokenised(rows, share_out=True)
    bad = [*rows[:30], {"input_ids": [1, 2], "labels": [5, 2], "number": 30}, *rows[30:]]
    report(own=own, examples=examples, said=said, bad=message(tokenised, bad, share_out=True))


def tokenised(rows: Any, **how: Any) -> tuple[list, list[str]]:
    """[input_ids, labels] of every example, cut to 12 tokens, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = data.tokenize_rows(rows, None, max_length=12, progress=False, **how)
    return [[e.input_ids.tolist(), e.labels.tolist()] for e in examples], [str(one.message) for one in caught]


class Act:
    """A callback by which one process gets a signal after a step; SIGKILL when checkpoint-2 is there."""

    def __init__(self, step: int, number: int, act: str) -> None:
        self.step, self.number, self.act = step, number, act

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step and jax.process_index() == self.number:
            while self.act == "die" and not (Path(args.output_dir) / "checkpoint-2").exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL if self.act == "die" else signal.SIGTERM)


def training(folder: Path, act: Any = None, **how: Any) -> None:
    """A run, and its evaluation."""
    trainer = train(folder, callbacks=[] if act is None else [Act(*act)], **how)
    report(evaluation=trainer.evaluate()["eval_loss"], steps=trainer.state.global_step)


def both(folder: Path, **how: Any) -> None:
    (folder / f"only-{jax.process_index()}").mkdir()
    agreements(folder)
    tokenising()
    training(folder, **how)


def waiting(folder: Path) -> None:
    """Waits for the other, which is killed, outside of any collective."""
    distributed.gather(0)
    report(number=jax.process_index())
    time.sleep(100)


def hello(folder: Path) -> None:
    report(gathered=distributed.gather(jax.process_index()), devices=len(jax.devices()))


SECTIONS = {"hello": hello, "both": both, "training": training, "reading": reading, "waiting": waiting}

if __name__ == "__main__":
    coordinator, count, number, section, where, how = sys.argv[1:]
    if coordinator == "launcher":
        distributed.initialize(timeout=60)
    else:
        distributed.initialize(coordinator, int(count), int(number), timeout=60)
    SECTIONS[section](Path(where), **json.loads(how))
