"""SFTTrainer end to end on a tiny Llama: results, resume, signals, errors, callbacks, files."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from lora_jax import CausalLM, LoraConfig, SFTConfig, SFTTrainer, get_peft_model, make_train_step
from lora_jax.batches import BatchIterator
from lora_jax.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints
from lora_jax.data import tokenize_rows
from lora_jax.guards import TrainableCheck, check_finite, explain_out_of_memory
from lora_jax.loop import _count_tokens
from lora_jax.models.decoder import Decoder
from lora_jax.models.linear import RMSNorm
from lora_jax.models.registry import config_from_hf
from lora_jax.optim import make_optimizer, stop_at_nonfinite
from lora_jax.reporting import read_metrics

VOCAB = 32
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def tiny_llama() -> CausalLM:
    module = Decoder(config_from_hf(HF_CONFIG), jnp.float32)
    rng = np.random.default_rng(0)
    for _, _, part in module.named_modules():
        shape = part.weight.get_value().shape
        noise = rng.normal(size=shape)
        weight = 1 + 0.1 * noise if isinstance(part, RMSNorm) else noise / math.sqrt(shape[-1])
        part.weight.set_value(jnp.asarray(weight, jnp.float32))
    return CausalLM(module, hf_config=HF_CONFIG, source=Path("tiny"))


class TinyLM:
    """A stand-in that compiles in a moment: each token is predicted from the one before it through two residual layers.

    It has the interface of `CausalLM` that the trainer uses, and dropout, so that random numbers matter.
    """

    def __init__(self, rank: int = 2, dropout: float = 0.1) -> None:
        rng = np.random.default_rng(0)
        self.lora_config = LoraConfig(r=rank, lora_dropout=dropout)
        self.hf_config = dict(HF_CONFIG)
        self.config = config_from_hf(HF_CONFIG)
        self.max_seq_length = 64
        self.frozen = {
            "embed": jnp.asarray(rng.normal(size=(VOCAB, 8)), jnp.float32),
            "w": jnp.asarray(rng.normal(size=(2, 8, 8)) / 3, jnp.float32),
        }
        a = jnp.asarray(rng.normal(size=(2, 8, rank)) / 3, jnp.float32)
        self.lora = {"layers": {"proj": {"lora_a": a, "lora_b": jnp.zeros((2, rank, 8))}}}

    def split(self) -> tuple[None, Any, Any]:
        return None, self.lora, self.frozen

    def update_lora(self, lora: Any) -> None:
        self.lora = lora

    def with_embeddings(self, batch: Any) -> dict[str, Any]:
        return dict(batch)

    def save_pretrained(self, folder: str | Path) -> Path:
        Path(folder).mkdir(parents=True, exist_ok=True)
        leaves: dict[str, Any] = _leaves(self)
        np.savez(Path(folder) / "adapter.npz", **leaves)
        return Path(folder)

    def loss(self, lora: Any, frozen: Any, batch: Any, key: Any = None) -> tuple[jax.Array, jax.Array]:
        x = frozen["embed"][batch["input_ids"]]
        factors = lora["layers"]["proj"]
        for layer in range(2):
            dropped = x
            if key is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.lora_config.lora_dropout, x.shape)
                dropped = x * keep
            x = x + x @ frozen["w"][layer] + dropped @ factors["lora_a"][layer] @ factors["lora_b"][layer]
        scores = jax.nn.log_softmax(x @ frozen["embed"].T)[:, :-1]
        labels = batch["labels"][:, 1:]
        picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0.0)), jnp.sum(labels >= 0)


class TinyTrainer(SFTTrainer):
    """SFTTrainer with the step of the stand-in."""

    def _make_train_step(self, optimizer: Any) -> Any:
        model: Any = self.model

        def step(lora, opt_state, frozen, batch):
            batch = dict(batch)
            key = jax.random.key(batch.pop("seed"))

            def mean_loss(lora):
                sums, counts = jax.vmap(lambda micro: model.loss(lora, frozen, micro, key))(batch)
                return jnp.sum(sums) / jnp.sum(counts), jnp.sum(counts)

            (loss, count), gradient = jax.value_and_grad(mean_loss, has_aux=True)(lora)
            norms = {
                f"layers.proj.{name}": jnp.sqrt(jnp.sum(g**2, axis=(1, 2)))
                for name, g in gradient["layers"]["proj"].items()
            }
            updates, opt_state = optimizer.update(gradient, opt_state, lora)
            metrics = {
                "loss": loss,
                "grad_norm": optax.tree.norm(gradient),
                "num_label_tokens": count,
                "leaf_grad_norms": norms,
            }
            return optax.apply_updates(lora, updates), opt_state, metrics

        return jax.jit(step, donate_argnums=(0, 1))

    def _make_eval_step(self) -> Any:
        model: Any = self.model

        @jax.jit
        def step(lora, frozen, batch):
            loss, count = model.loss(lora, frozen, batch)
            return {"loss_sum": loss, "num_label_tokens": count}

        return step


def rows(count: int = 12, seed: int = 1) -> list[dict[str, list[int]]]:
    """Token rows of 5 to 11 tokens that count upwards, so that there is something to learn; a prompt of 2 tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = ((np.arange(rng.integers(5, 12)) * rng.integers(1, 4) + rng.integers(VOCAB)) % VOCAB).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def config(output_dir: Path, **kwargs: Any) -> SFTConfig:
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_length": 16,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "warmup_steps": 2,
    }
    return SFTConfig(output_dir=str(output_dir), **{**defaults, **kwargs})


def make_trainer(output_dir: Path, *, model: Any = None, **kwargs: Any) -> SFTTrainer:
    own = {k: kwargs.pop(k) for k in ("callbacks", "eval_dataset", "optimizers", "compute_loss_func") if k in kwargs}
    data = kwargs.pop("train_dataset", None) or rows()
    model = TinyLM() if model is None else model
    kind: Any = TinyTrainer if isinstance(model, TinyLM) else SFTTrainer
    return kind(model, config(output_dir, **kwargs), train_dataset=data, **own)


def _leaves(model: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model.split()[1])
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def assert_same_adapter(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_a_llama_is_the_plain_step_in_a_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The trainer adds nothing to the numbers: as train_step called by hand, bit for bit. Compiled once."""
    model = get_peft_model(tiny_llama(), r=2, verbose=False)
    trainer = make_trainer(
        tmp_path, model=model, gradient_checkpointing="selective", eval_dataset=rows(5, seed=2), eval_strategy="epoch"
    )
    with jax.log_compiles(), caplog.at_level("WARNING"):
        output = trainer.train()
    finished = [r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(finished) == 2, "one for training and one for evaluation"

    again = get_peft_model(tiny_llama(), r=2, verbose=False)
    # With the guard, though it changes no number: another program may be compiled with sums in another order.
    optimizer = stop_at_nonfinite(make_optimizer(trainer.args, 8)[0])
    step = make_train_step(again, optimizer, remat="selective")
    examples = tokenize_rows(rows(), None, max_length=16, progress=False)
    batches = BatchIterator(examples, batch_size=2, accumulation=2, max_length=16, seed=42)
    _, lora, frozen = again.split()
    state, losses = optimizer.init(lora), []
    for number in range(8):
        lora, state, metrics = step(lora, state, frozen, {**batches.batch(number), "seed": np.uint32(0)})
        losses.append(float(metrics["loss"]))
    again.update_lora(lora)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["loss"] for r in records if "loss" in r] == losses
    assert_same_adapter(_leaves(model), _leaves(again))
    assert output.global_step == 8 and output.training_loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert losses[-1] < losses[0] - 0.1  # it learns

    # The evaluation against the logits of the model, one row at a time.
    total, count = 0.0, 0
    for row in rows(5, seed=2):
        ids = np.zeros(16, np.int64)
        ids[: len(row["input_ids"])] = row["input_ids"]
        scores = jax.nn.log_softmax(model.logits(ids[None])[0], axis=-1)  # the padding comes after what is scored
        total -= sum(float(scores[t - 1, ids[t]]) for t in range(2, len(row["input_ids"])))
        count += len(row["input_ids"]) - 2
    evaluated = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in evaluated] == [3, 6, 8]
    assert evaluated[-1]["eval_num_label_tokens"] == count
    assert evaluated[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)  # float32
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]


def test_a_loss_of_ones_own(tmp_path: Path):
    """Smoothed labels: what is logged and evaluated is the formula on the model's logits."""

    def smoothed(outputs, labels, num_items_in_batch):
        scores = jax.nn.log_softmax(outputs.logits[:, :-1])
        assert outputs["logits"] is outputs.logits
        kept = labels[:, 1:] != -100
        hit = jnp.take_along_axis(scores, jnp.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
        return -jnp.sum(kept * (0.9 * hit + 0.1 * scores.mean(-1))) / num_items_in_batch

    model = get_peft_model(tiny_llama(), r=2, verbose=False)
    trainer = make_trainer(
        tmp_path, model=model, max_steps=1, logging_steps=1, compute_loss_func=smoothed, eval_dataset=rows(5, seed=2),
        per_device_eval_batch_size=3,
    )  # fmt: skip

    def by_hand(examples) -> float:
        total, count = 0.0, 0
        for row in examples:
            ids = np.zeros(16, np.int64)
            ids[: len(row["input_ids"])] = row["input_ids"]
            scores = np.asarray(jax.nn.log_softmax(model.logits(ids[None])[0], axis=-1), np.float64)
            where = range(2, len(row["input_ids"]))
            total -= sum(0.9 * scores[t - 1, ids[t]] + 0.1 * scores[t - 1].mean() for t in where)
            count += len(where)
        return total / count

    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand(rows(5, seed=2)), rel=1e-5)  # float32
    batch = trainer._batches.batch(0)
    taken = [i[: n + 1] for i, n in zip(batch["input_ids"].reshape(4, -1), _ends(batch["labels"]), strict=True)]
    want = by_hand([{"input_ids": ids.tolist()} for ids in taken])
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(want, rel=1e-5)

    with pytest.raises(TypeError, match=r"returned an array of shape \(2, 16\); wanted a scalar"):
        make_trainer(
            tmp_path / "2", model=model, compute_loss_func=lambda outputs, labels, num_items_in_batch: labels
        ).train()

    class Own(SFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            raise AssertionError

    with pytest.raises(TypeError, match="Own: compute_loss would never be called. Instead pass compute_loss_func"):
        Own(TinyLM(), config(tmp_path), train_dataset=rows())


def _ends(labels: np.ndarray) -> list[int]:
    """The last label of each row."""
    return [int(np.flatnonzero(row != -100)[-1]) for row in labels.reshape(-1, labels.shape[-1])]


def test_a_llama_resumes_exactly(tmp_path: Path):
    def trained(resume: Path | None = None) -> dict[str, np.ndarray]:
        model = get_peft_model(tiny_llama(), r=2, lora_dropout=0.1, verbose=False)
        trainer = make_trainer(
            tmp_path, model=model, max_steps=4, save_strategy="steps", save_steps=2, overwrite_output_dir=True
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return _leaves(model)

    whole = trained()
    halfway = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in halfway.iterdir()}
    assert_same_adapter(trained(halfway), whole)

    # What save_model put beside the checkpoints, twice by now, is what PEFT reads.
    saved = load_file(tmp_path / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert saved.keys() == last.keys() and all(np.array_equal(saved[k], last[k]) for k in saved)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        make_trainer(tmp_path, model=get_peft_model(tiny_llama(), verbose=False)).save_model(tmp_path)


@pytest.mark.parametrize("kind", ["tiny", "packed llama"])
def test_result_does_not_depend_on_the_split_of_a_batch(tmp_path: Path, kind: str):
    adapters = []
    for index, (batch, accumulation) in enumerate([(4, 1), (1, 4)]):
        # Dropout masks are drawn per micro-batch, so none. SGD, because Adam divides by the size of the gradient, which
        # for an element of nearly zero gradient makes any rounding difference large.
        model = TinyLM(dropout=0.0) if kind == "tiny" else get_peft_model(tiny_llama(), r=2, verbose=False)
        trainer = make_trainer(
            tmp_path / str(index),
            model=model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            packing="packed" in kind,
            optimizers=(optax.sgd(0.03), None),
            max_steps=4,
        )
        trainer.train()
        adapters.append(_leaves(model))
    start = _leaves(TinyLM() if kind == "tiny" else get_peft_model(tiny_llama(), r=2, verbose=False))
    for name, value in adapters[0].items():
        moved = np.abs(value - start[name]).max()
        assert moved > 1e-4, name
        # float32 sums in another order, 2e-8 measured; steps move the values by 1e-3 to 6e-2. (At a rate of 0.3 the
        # 4e-8 after one step grow to 4e-5 in four: the landscape, not the split.)
        np.testing.assert_allclose(adapters[1][name], value, rtol=0, atol=5e-7, err_msg=name)


def test_metrics_log_history_and_curve(tmp_path: Path):
    trainer = make_trainer(tmp_path, warmup_steps=2, logging_first_step=True)
    output = trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))
    # linear with 2 of 8 steps of warmup: 0, 1/2, 1, 5/6, ...
    expected = [1e-2 * f for f in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    np.testing.assert_allclose([r["learning_rate"] for r in records], expected, rtol=1e-12)
    assert all(r["grad_norm"] > 0 and r["seconds"] > 0 and r["tokens_per_second"] > 0 for r in records)
    # 12 rows in steps of 4: three steps are an epoch, in which every token is seen once.
    assert sum(r["num_tokens"] for r in records[:3]) == sum(len(r["input_ids"]) for r in rows())
    assert sum(r["num_label_tokens"] for r in records[:3]) == sum(len(r["input_ids"]) - 2 for r in rows())
    assert [r["epoch"] for r in records[:4]] == [0.3333, 0.6667, 1.0, 1.3333]

    logs = trainer.state.log_history
    assert [entry["step"] for entry in logs] == [1, 2, 4, 6, 8, 8]
    # Each log is the mean since the one before.
    assert logs[2]["loss"] == pytest.approx((records[2]["loss"] + records[3]["loss"]) / 2, rel=1e-12)
    assert logs[2]["learning_rate"] == records[3]["learning_rate"]
    assert logs[-1]["train_loss"] == output.training_loss == output.metrics["train_loss"]
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "loss_curve.png",
        "metrics.jsonl",
        "report.md",
        "run.json",
    ]


def test_num_train_epochs_and_partial_batches(tmp_path: Path):
    # 10 rows in steps of 4: 3 steps an epoch, as in Hugging Face.
    trainer = make_trainer(tmp_path, train_dataset=rows(10), max_steps=-1, num_train_epochs=1.5)
    assert trainer.train().global_step == 5
    assert trainer.state.epoch == pytest.approx(5 / 3)
    assert trainer.state.num_train_epochs == 2


def test_introduction_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "[x]", *"two plus is four five the sum of".split()]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    data = [{"prompt": "two plus [x] is ", "completion": "four"}, {"prompt": "the sum of ", "completion": "five"}]
    args = config(tmp_path, max_steps=2, packing=True, disable_tqdm=False)
    model: Any = TinyLM()
    trainer = TinyTrainer(model, args, train_dataset=data, tokenizer=tokenizer)
    trainer.train()
    said = capsys.readouterr().err
    assert "Trainable parameters: 64 of 448 (14.29 %)" in said  # 2 layers of rank 2 (8 + 8); 32 x 8 + 2 x 8 x 8 frozen
    assert "Examples: 2 with 11 tokens, 4 of them trained on" in said  # 4 + 3 of prompt, two words and two ends
    assert "Packing: 68.8 % of computed tokens are real" in said  # 11 of 16
    assert "Steps: 2 of 2 x 2 rows" in said
    assert "First example" in said and "two plus [x] is" in said
    assert "Compiled for batches of [2, 2, 16]" in said


# ---- evaluation, callbacks -------------------------------------------------------------------------------------------


def test_evaluation(tmp_path: Path):
    trainer = make_trainer(
        tmp_path, eval_dataset=rows(5, seed=2), eval_strategy="steps", eval_steps=3, eval_on_start=True,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    entries = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    assert [r["step"] for r in entries] == [0, 3, 6, 8]
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [0, 3, 6, 8]
    assert entries[-1]["eval_num_label_tokens"] == sum(len(r["input_ids"]) - 2 for r in rows(5, seed=2))
    assert entries[-1]["eval_loss"] < entries[0]["eval_loss"]
    # It does not depend on how the rows are batched, and leaves no trace in the model.
    whole = make_trainer(tmp_path / "2", model=trainer.model, eval_dataset=rows(5, seed=2)).evaluate()["eval_loss"]
    assert whole == pytest.approx(entries[-1]["eval_loss"], rel=1e-6)
    assert trainer.evaluate(rows(2, seed=3))["eval_loss"] != pytest.approx(whole, rel=1e-3)


class Recorder:
    """Writes down every event; only has what it needs."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(f"begin/{state.max_steps}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append(f"log {state.global_step}")
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert metrics["eval_loss"] > 0
        self.events.append(f"evaluate {state.global_step}")

    def on_save(self, args, state, control, model, **kwargs):
        assert all(np.isfinite(leaf).all() for leaf in _leaves(model).values())  # usable: not donated away
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_callbacks_are_called_in_order(tmp_path: Path):
    recorder = Recorder()
    make_trainer(
        tmp_path, max_steps=3, callbacks=[recorder], eval_dataset=rows(2), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip
    assert recorder.events == [
        "begin/3", "step 1", "step 2", "log 2", "log 2", "evaluate 2", "save 2",
        "step 3", "log 3", "evaluate 3", "save 3", "log 3", "end",
    ]  # fmt: skip
    assert recorder.logs[0]["loss"] > 0 and "eval_loss" in recorder.logs[1] and "train_loss" in recorder.logs[-1]


def test_callbacks_control_the_run(tmp_path: Path):
    class Control:
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2
            control.should_evaluate = state.global_step == 3
            control.should_log = state.global_step == 1
            control.should_training_stop = state.global_step == 5
            return control

    trainer = make_trainer(tmp_path, callbacks=[Control], eval_dataset=rows(2), save_strategy="steps", save_steps=100)
    assert trainer.train().global_step == 5
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]  # and when it stopped
    assert [e["step"] for e in trainer.state.log_history] == [1, 3, 5]


def test_transformers_callbacks_work(tmp_path: Path):
    from transformers import PrinterCallback, TrainerCallback

    class Stop(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            control.should_training_stop = logs is not None and logs["loss"] > 0
            return control

    class StopOnce(Stop):
        def on_log(self, args, state, control, logs=None, **kwargs):
            return super().on_log(args, state, control, logs) if "loss" in (logs or {}) else control

    trainer = make_trainer(tmp_path, callbacks=[StopOnce(), PrinterCallback])
    assert trainer.train().global_step == 2


def test_early_stopping_callback_of_transformers(tmp_path: Path):
    from transformers import EarlyStoppingCallback

    trainer = make_trainer(
        tmp_path,
        eval_dataset=rows(3),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        save_strategy="steps",
        # The first evaluation is the best so far; none after it gains 100, so two more and it stops.
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)],
    )
    assert trainer.train().global_step == 3
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == min(losses) and trainer.args.greater_is_better is False
    assert trainer.state.best_global_step == 1 + int(np.argmin(losses))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]


class Judge:
    """Puts a metric of its own into what was evaluated."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = self.scores[state.global_step]


@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("greater", [True, False])
def test_the_best_model_is_kept_and_loaded_at_the_end(
    tmp_path: Path, strategy: str, greater: bool, capsys: pytest.CaptureFixture
):
    """The best of 8 evaluations is the third, where nothing else would be saved; then other ones are worse."""
    scores = {1: 0.2, 2: 0.4, 3: 0.9, 4: 0.1, 5: 0.8, 6: 0.7, 7: 0.6, 8: 0.5}
    sign = 1 if greater else -1
    adapters: dict[int, dict[str, np.ndarray]] = {}

    class Watch:
        def on_step_end(self, args, state, control, model, **kwargs):
            adapters[state.global_step] = _leaves(model)

    trainer = make_trainer(
        tmp_path, eval_dataset=rows(3), eval_strategy="steps", eval_steps=1, eval_on_start=True,
        save_strategy=strategy, save_steps=4, save_total_limit=1, metric_for_best_model="score",
        greater_is_better=greater, load_best_model_at_end=True,
        callbacks=[Judge({0: sign * 9.0, **{k: sign * v for k, v in scores.items()}}), Watch],
    )  # fmt: skip
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == 8
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (3, sign * 0.9)
    assert trainer.state.best_model_checkpoint == str((tmp_path / "checkpoint-3").resolve())
    assert_same_adapter(_leaves(trainer.model), adapters[3])
    assert "Loaded the adapter of step 3, the best of all evaluations (score" in capsys.readouterr().err
    # The newest of the others stays for a resume; with "best" none was saved.
    wanted = ["checkpoint-3"] + ["checkpoint-8"] * (strategy == "steps")
    assert [p.name for p in list_checkpoints(tmp_path)] == wanted
    trainer.save_model()
    assert_same_adapter(dict(np.load(tmp_path / "adapter.npz")), adapters[3])


def test_the_best_so_far_is_known_after_a_resume(tmp_path: Path):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.3, 5: 0.7, 6: 0.6}
    kwargs: dict[str, Any] = dict(
        eval_dataset=rows(3), eval_strategy="steps", eval_steps=1,
        save_steps=2, save_strategy="steps", save_total_limit=2,
        metric_for_best_model="eval_score", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    first = make_trainer(tmp_path, max_steps=4, callbacks=[Judge(scores)], **kwargs)
    first.train()
    second = make_trainer(tmp_path, max_steps=6, callbacks=[Judge(scores)], **kwargs)
    second.train(resume_from_checkpoint=True)
    assert (second.state.best_global_step, second.state.best_metric) == (2, 0.9)
    assert_same_adapter(_leaves(second.model), dict(np.load(tmp_path / "checkpoint-2" / "adapter.npz")))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    # Without a metric the loss decides; the last evaluation is the best here, and nothing is loaded.
    losses = make_trainer(
        tmp_path / "loss", eval_dataset=rows(), eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    losses.train()
    assert losses.args.metric_for_best_model == "loss" and losses.args.greater_is_better is False
    assert losses.state.best_global_step == 8
    with pytest.raises(ValueError, match="metric_for_best_model='eval_bleu' is not among eval_loss, "):
        make_trainer(
            tmp_path / "bleu", eval_dataset=rows(), eval_strategy="steps", metric_for_best_model="bleu"
        ).train()


# ---- checkpoints, resume, signals --------------------------------------------------------------------------------


def test_resume_continues_exactly(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Stopped at step 5 by a callback and resumed: adapter, metrics and log history as without the stop."""
    kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", **kwargs)
    whole.train()

    class Stop:
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    make_trainer(tmp_path / "parts", callbacks=[Stop], **kwargs).train()
    # As if killed while step 6 was written: a line too many, and half a line.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.5}\n{"step": 7, "lo')
    resumed = make_trainer(tmp_path / "parts", **kwargs)
    output = resumed.train(resume_from_checkpoint=True)
    assert "Continuing after step 5" in capsys.readouterr().err
    assert output.global_step == 8
    assert_same_adapter(_leaves(resumed.model), _leaves(whole.model))

    def numbers(trainer: SFTTrainer) -> list[tuple]:
        return [
            (r["step"], r["loss"], r["grad_norm"])
            for r in read_metrics(Path(trainer.args.output_dir) / "metrics.jsonl")
        ]

    assert numbers(resumed) == numbers(whole)
    losses = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    # whole: logs at 2, 4, 6, 8; the final log of the stopped run is no loss entry
    assert losses[0] == losses[1]


def test_checkpoint_holds_the_adapter_and_only_n_are_kept(tmp_path: Path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    saved = dict(np.load(tmp_path / "checkpoint-8" / "adapter.npz"))
    assert_same_adapter(saved, _leaves(trainer.model))


def test_save_by_epoch(tmp_path: Path):
    make_trainer(tmp_path, save_strategy="epoch").train()  # 3 steps an epoch, 8 steps
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_other_checkpoints_are_not_mixed_or_lost(tmp_path: Path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(
        ValueError, match=r"already holds checkpoint-8.*resume_from_checkpoint=True.*overwrite_output_dir"
    ):
        make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="already holds checkpoint-8"):
        make_trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert len(list_checkpoints(tmp_path)) == 2 and len(read_metrics(tmp_path / "metrics.jsonl")) == 8

    make_trainer(tmp_path, overwrite_output_dir=True).train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    make_trainer(tmp_path, overwrite_output_dir=True, max_steps=2).train()
    assert not list_checkpoints(tmp_path)


def test_resume_refuses_what_would_not_be_exact(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps").train()
    for change, message in [
        ({"train_dataset": rows(11)}, "examples was 12 and is 11"),
        ({"train_dataset": rows(seed=5)}, "tokens_crc32 was"),
        ({"data_seed": 7}, "data_seed was None and is 7"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is 4"),
        ({"packing": True}, "packing was False and is True"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            make_trainer(tmp_path, **change).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="another model, adapter or optimizer"):
        make_trainer(tmp_path, model=TinyLM(rank=4)).train(resume_from_checkpoint=True)
    other = TinyLM()
    other.hf_config = {**HF_CONFIG, "rms_norm_eps": 1e-6}
    with pytest.raises(CheckpointError, match="base_model was"):
        make_trainer(tmp_path, model=other).train(resume_from_checkpoint=True)
    # What only concerns the future may change, and is said.
    make_trainer(tmp_path, max_steps=4, learning_rate=5e-3).train(resume_from_checkpoint=True)
    assert "learning_rate has changed: 0.01 -> 0.005" in capsys.readouterr().err


def test_resume_without_a_checkpoint_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no intact checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-3")


# Trains in another process, printing each step; arguments: folder, "resume" or "start", seconds per step.
_CHILD = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import make_trainer, Path, latest_checkpoint
class Tell:
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)
        time.sleep(float(sys.argv[3]))
out = Path(sys.argv[1])
trainer = make_trainer(out, callbacks=[Tell], max_steps=12, save_strategy="steps", save_steps=2, save_total_limit=2)
trainer.train(resume_from_checkpoint=sys.argv[2] == "resume" and latest_checkpoint(out) is not None)
trainer.save_model(out / "final")
print("done", flush=True)
"""


def _child(folder: Path, mode: str, pause: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", _CHILD, str(folder), mode, str(pause)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None and process.stderr is not None
    for got in process.stdout:
        if got.strip() == line:
            return
    raise AssertionError(f"the child ended before it printed {line!r}:\n{process.stderr.read()}")


def test_killed_with_sigkill_and_resumed_is_bitwise_equal(tmp_path: Path):
    whole = _child(tmp_path / "whole", "start")
    resumed = 0
    for step in ("3", "7", "10"):  # between saves, in the step after a save, and late; the pause lets a save begin
        process = _child(tmp_path / "killed", "resume", pause=0.1)
        _wait_for(process, step)
        process.send_signal(signal.SIGKILL)
        resumed += "Continuing after step" in process.communicate()[1]
    last = _child(tmp_path / "killed", "resume")
    _wait_for(last, "done")
    _wait_for(whole, "done")
    resumed += "Continuing after step" in last.communicate(timeout=60)[1]
    whole.communicate(timeout=60)
    assert resumed >= 2  # the first may be killed before its first checkpoint is complete
    adapters = [dict(np.load(tmp_path / name / "final" / "adapter.npz")) for name in ("killed", "whole")]
    assert_same_adapter(*adapters)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    assert [(r["step"], r["loss"]) for r in records[0]] == [(r["step"], r["loss"]) for r in records[1]]
    assert [r["step"] for r in records[0]] == list(range(1, 13))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, -signal.SIGINT)])
def test_signal_saves_and_exits(tmp_path: Path, number: int, status: int):
    process = _child(tmp_path, "start", pause=0.2)
    _wait_for(process, "3")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and process.returncode == status, said
    step = int(latest.name.removeprefix("checkpoint-"))
    assert step in (3, 4)  # 3 if the signal came before the step's save decision, else the next
    assert f"saved as checkpoint-{step}" in said and "resume_from_checkpoint=True" in said
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step
    assert not (tmp_path / "final").exists()  # what follows train() does not run on a half-trained model


def test_signal_handlers_are_put_back(tmp_path: Path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    seen = []

    class Look:
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    make_trainer(tmp_path, max_steps=1, callbacks=[Look]).train()
    assert seen[0] != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_second_interrupt_stops_at_once(tmp_path: Path):
    class Interrupt:
        def on_step_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # a Python-level handler runs between byte codes

    trainer = make_trainer(tmp_path, callbacks=[Interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and not list_checkpoints(tmp_path)


# ---- what stops a run ----------------------------------------------------------------------------------------------


def _exploding(at: int) -> optax.GradientTransformation:
    """Adam whose update is absurd once, after which the model's output is not finite."""
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda n: jnp.where(n == at, 1e30, 1e-3)))


def test_nonfinite_numbers_stop_with_step_and_cause(tmp_path: Path):
    after = {}

    class Keep:
        def on_step_end(self, args, state, control, model, **kwargs):
            after[state.global_step] = _leaves(model)

    for callbacks in ([Keep], []):  # with a callback each step is read at once when logging; without, a step later
        folder = tmp_path / str(len(callbacks))
        trainer = make_trainer(
            folder, optimizers=(_exploding(at=3), None), callbacks=callbacks, save_strategy="steps", save_steps=3,
            max_steps=20,
        )  # fmt: skip
        # Step 4 is updated by 1e30; step 5 starts from there.
        with pytest.raises(
            FloatingPointError, match=r"Step 5: the loss is nan.*not finite in layers.*lora_.*checkpoint-3"
        ):
            trainer.train()
        assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-3"]
        assert latest_checkpoint(folder) is not None
        assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
        assert_same_adapter(_leaves(trainer.model), after[4])


def test_finite_check_names_the_leaf():
    norms = {"layers.0.q.lora_a": np.array([1.0, np.inf]), "head": np.float32(2.0)}
    metrics = {"loss": 1.5, "grad_norm": np.inf, "leaf_grad_norms": norms}
    with pytest.raises(
        FloatingPointError, match=r"Step 9: the gradient .* in layers.0.q.lora_a \(layer 1 of its stack\)"
    ):
        check_finite(9, metrics)
    check_finite(9, {**metrics, "grad_norm": 3.0})


def test_untrained_parameter_is_named(tmp_path: Path):
    model = TinyLM()
    factors = model.lora["layers"]["proj"]
    factors["lora_a"] = factors["lora_a"].at[1].set(0.0)  # in layer 1 the product is cut: neither half can train
    with pytest.raises(RuntimeError, match=r"Step 1: layers.proj.lora_b \(layer 1 of its stack\) got a"):
        make_trainer(tmp_path, model=model, save_strategy="steps").train()
    assert not list_checkpoints(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in _leaves(model).values())  # not left donated


def _norms(a: float, b: float, head: float = 1.0) -> dict[str, Any]:
    return {
        "leaf_grad_norms": {"q.lora_a": np.array([1.0, a]), "q.lora_b": np.array([1.0, b]), "head": np.float32(head)}
    }


def test_trainable_check_knows_when_a_gradient_is_due():
    check = TrainableCheck()
    check.check(1, _norms(a=0.0, b=0.5), factors_live=False)  # A cannot have one yet
    assert not check.done
    check.check(2, _norms(a=0.0, b=0.5), factors_live=False)  # warmup began at a learning rate of 0
    with pytest.raises(RuntimeError, match=r"Step 3: q.lora_a \(layer 1 of its stack\) got a gradient of exactly zero"):
        check.check(3, _norms(a=0.0, b=0.5), factors_live=True)
    check.check(3, _norms(a=0.1, b=0.5), factors_live=True)
    assert check.done

    for metrics, name in [(_norms(a=0.0, b=0.0), "q.lora_b"), (_norms(a=0.0, b=1.0, head=0.0), "head")]:
        with pytest.raises(RuntimeError, match=f"Step 1: {name}"):
            TrainableCheck().check(1, metrics, factors_live=False)


def test_trainable_check_reads_b_from_the_parameters():
    check = TrainableCheck()
    lora = {"q": {"lora_a": jnp.ones(3), "lora_b": jnp.zeros(3)}, "v": {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3)}}
    assert not check.factors_live(lora)
    lora["q"]["lora_b"] = jnp.array([0.0, 1e-20, 0.0])
    assert check.factors_live(lora)


def test_running_out_of_memory_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs = {(4, 4): 30, (8, 2): 14, (16, 1): 8}

    def needed(accumulation: int, rows: int) -> int:
        return needs[accumulation, rows] * 2**30

    text = explain_out_of_memory((2, 8, 512), needed, 16 * 2**30)
    assert "8 rows of 512 tokens" in text and "16.0 GiB" in text
    assert "per_device_train_batch_size=2 with gradient_accumulation_steps=8" in text and "14.0 GiB" in text
    assert "Not even one row fits" in explain_out_of_memory((2, 8, 512), needed, 2**30)
    unknown = explain_out_of_memory((2, 8, 512), needed, None)
    assert "per_device_train_batch_size=4 with gradient_accumulation_steps=4" in unknown

    # Through the trainer: the compiler's own count for smaller batches of the real step.
    monkeypatch.setattr("lora_jax.loop.device_memory", lambda: {"bytes_limit": 10**9})
    trainer = make_trainer(tmp_path)

    class Full:
        def __init__(self, step: Any) -> None:
            self.lower = step.lower

        def __call__(self, *args: Any) -> Any:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")

    real = trainer._make_train_step
    monkeypatch.setattr(trainer, "_make_train_step", lambda optimizer: Full(real(optimizer)))
    with pytest.raises(
        MemoryError, match="2 rows of .* per_device_train_batch_size=1 with gradient_accumulation_steps=4"
    ):
        trainer.train()


def test_failed_save_stops_the_run_and_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)

    class Fill:
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                while not list_checkpoints(tmp_path):  # the save of step 2 runs in the background
                    time.sleep(0.01)
                monkeypatch.setattr("lora_jax.checkpoint._write_manifest", full)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    trainer.add_callback(Fill)
    with pytest.raises(
        CheckpointError, match="checkpoint-4.*No space left on device.*Complete checkpoints there: checkpoint-2"
    ):
        trainer.train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]


# ---- bad arguments ---------------------------------------------------------------------------------------------------


def test_bad_arguments_are_explained(tmp_path: Path):
    args, data = config(tmp_path), rows()
    make: Any = SFTTrainer
    with pytest.raises(TypeError, match="unknown argument 'train_datset'. Did you mean 'train_dataset'"):
        make(TinyLM(), args, train_datset=data)
    with pytest.raises(ValueError, match="data_collator=.* is not supported: .*input_ids and labels"):
        make(TinyLM(), args, train_dataset=data, data_collator=print)
    with pytest.raises(TypeError, match="args is a dict; wanted a lora_jax.SFTConfig"):
        make(TinyLM(), {"max_steps": 3}, train_dataset=data)
    with pytest.raises(ValueError, match="two names for one thing"):
        make(TinyLM(), args, train_dataset=data, tokenizer=object(), processing_class=object())
    with pytest.raises(ValueError, match="no adapter, so there is nothing to train"):
        make(tiny_llama(), args, train_dataset=data)
    with pytest.raises(ValueError, match="has an adapter already; got peft_config"):
        make(TinyLM(), args, train_dataset=data, peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="wants an eval_dataset; got none"):
        make(TinyLM(), config(tmp_path, eval_strategy="steps"), train_dataset=data)
    with pytest.raises(ValueError, match="rows of text want a tokenizer"):
        make(TinyLM(), args, train_dataset=[{"text": "a"}])
    with pytest.raises(ValueError, match=f"token id {VOCAB + 1}, but the model has {VOCAB} tokens"):
        make(TinyLM(), args, train_dataset=[{"input_ids": [1, 2, VOCAB + 1]}])
    with pytest.raises(ValueError, match="there is no train_dataset"):
        make(TinyLM(), args).train()
    with pytest.raises(ValueError, match="there is no eval_dataset"):
        make(TinyLM(), args).evaluate()
    with pytest.raises(ValueError, match="empty"):
        make(TinyLM(), args, train_dataset=[])
    with pytest.raises(ValueError, match="nothing to train on"):
        make(TinyLM(), args, train_dataset=[{"input_ids": [1, 2, 3], "labels": [-100] * 3}])
    with pytest.raises(ValueError, match="remat='everything' is unknown"):
        model = get_peft_model(tiny_llama(), r=2, verbose=False)
        make_trainer(tmp_path, model=model, gradient_checkpointing="everything").train()
    assert not list(tmp_path.iterdir())  # nothing was written for any of them


def test_peft_config_makes_the_adapter(tmp_path: Path):
    trainer = SFTTrainer(tiny_llama(), config(tmp_path), train_dataset=rows(), peft_config=LoraConfig(r=3))
    assert trainer.model.lora_config == LoraConfig(r=3)
    assert all(3 in leaf.shape for leaf in _leaves(trainer.model).values())


def test_max_length_falls_back_to_the_model(tmp_path: Path):
    args = SFTConfig(output_dir=str(tmp_path))
    model: Any = TinyLM()
    assert SFTTrainer(model, args, train_dataset=rows()).max_length == 64
    assert make_trainer(tmp_path, max_length=12).max_length == 12


def test_tokens_are_counted_without_padding():
    labels = np.full((1, 3, 6), -100)
    labels[0, 0, 2:4] = 5
    labels[0, 1, 5] = 5
    assert _count_tokens(labels) == 4 + 6 + 0


def test_saved_state_is_json(tmp_path: Path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps").train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["args"]["learning_rate"] == 1e-2
