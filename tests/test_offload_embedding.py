"""An embedding table in the host's memory: the same numbers, and a program without the table."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import LoraConfig, SFTConfig, from_pretrained, make_train_step, plan
from lora_jax.cards import card_of
from lora_jax.hf_checkpoint import read_json
from lora_jax.optim import make_optimizer
from lora_jax.remat import RematPlan
from tests import tiny
from tests.offloading import adapted, used

TABLE = tiny.VOCAB * 64 * 4  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, offload: bool, **lora: Any):
    model, tokenizer = from_pretrained(folder, offload_embedding=offload, progress=False)
    adapted(model, **lora)
    return model, tokenizer


def batches(model, rows: int = 4) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, (2, rows // 2, 16)).astype(np.int32)
    return model.with_embeddings({"input_ids": ids, "labels": ids})


def compiled_step(model, batch):
    optimizer, _ = make_optimizer(SFTConfig(output_dir="unused"), 10)
    _, lora, frozen = model.split()
    arguments = (lora, optimizer.init(lora), frozen, batch)
    return make_train_step(model, optimizer).lower(*arguments).compile(), arguments


@pytest.mark.rotate
@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["blocks", "adapter", "trained"],
)
def test_a_step_takes_rows_for_the_table_and_gives_the_same(folder, lora):
    here, there = load(folder, True, **lora)[0], load(folder, False, **lora)[0]
    step, arguments = compiled_step(here, batches(here))
    plain, usual = compiled_step(there, batches(there))
    trained = "modules_to_save" in lora  # then the copy is looked up, on the device
    assert ("inputs_embeds" in arguments[3]) is not trained
    rows = 0 if trained else arguments[3]["inputs_embeds"].nbytes
    sizes = [program.memory_analysis().argument_size_in_bytes for program in (step, plain)]
    saved = (0 if trained else TABLE) - rows
    assert abs(sizes[1] - sizes[0] - saved) < 512  # the compiler's own tables
    # The rows are copied, whoever copies them: bit for bit.
    jax.tree.map(np.testing.assert_array_equal, step(*arguments), plain(*usual))


def test_the_planner_counts_what_the_program_holds(folder):
    model = load(folder, True)[0]
    step, arguments = compiled_step(model, batches(model))
    work = plan.of_step(model, *arguments)
    said = plan.of_config(
        read_json(folder / "config.json"), LoraConfig(r=2), 2, 16, accumulation=2, offload_embedding=True
    )
    assert said == work
    need = plan.memory(work, RematPlan.of("full"), card_of("H100"))
    held = need.weights + need.adapters + need.optimizer + need.inputs
    ids = 2 * arguments[3]["input_ids"].nbytes
    # Apart from scalars and the compiler's own tables.
    assert abs(step.memory_analysis().argument_size_in_bytes - ids - held) < 1024
    assert need.inputs == arguments[3]["inputs_embeds"].nbytes


@pytest.mark.turns("weights in the host's memory")
def test_the_trainer_evaluation_and_generation_are_the_same(folder, tmp_path):
    results = []
    for offload in (True, False):
        model, tokenizer = load(folder, offload)
        results.append(used(model, tokenizer, tmp_path / str(offload), "model.embed_tokens.weight"))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_table_is_that_of_the_checkpoint(folder):
    model, there = load(folder, True)[0], load(folder, False)[0]
    table = model.module.embed_tokens.weight.get_value()
    assert isinstance(table, np.ndarray)
    np.testing.assert_array_equal(table, there.module.embed_tokens.weight.get_value())
    there.offload_embedding()  # later is as good
    np.testing.assert_array_equal(table, there.module.embed_tokens.weight.get_value())


def test_what_cannot_be_is_refused(folder, tmp_path):
    tied = tiny.write_folder(tmp_path, tiny.config(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"offload_embedding=True: the head of .* is its embedding table"):
        from_pretrained(tied, offload_embedding=True, progress=False)
    with pytest.raises(ValueError, match=r"offload_embedding: the head of .* is its embedding table"):
        from_pretrained(tied, progress=False)[0].offload_embedding()
    model = load(folder, True)[0]
    ids = np.zeros((1, 1, 8), np.int32)
    with pytest.raises(ValueError, match=r"no inputs_embeds: pass model.with_embeddings\(batch\)"):
        compiled_step(model, {"input_ids": ids, "labels": ids})
    with pytest.raises(IndexError, match="out of bounds"):
        model.with_embeddings({"input_ids": ids + tiny.VOCAB})
