"""A head in the host's memory: the same numbers, and a program that does not hold it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import LoraConfig, SFTConfig, from_pretrained, make_train_step, plan
from lora_jax.cards import card_of
from lora_jax.hf_checkpoint import read_json
from lora_jax.models.streamed import on_device
from lora_jax.optim import make_optimizer
from lora_jax.remat import RematPlan
from lora_jax.tools.bench_step import SHAPES, hf_config
from tests import tiny
from tests.offloading import adapted, used

HEAD = tiny.VOCAB * 64 * 4  # bytes
HEADS = {"blocks": {}, "adapter": {"target_modules": ["q_proj", "lm_head"]}}
HEADS |= {"adapter that starts in the weight": {**HEADS["adapter"], "init_lora_weights": "olora"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, offload: bool, **lora: Any):
    model, tokenizer = from_pretrained(folder, offload_head=offload, progress=False)
    assert model.head_on_host is offload
    adapted(model, **lora)
    return model, tokenizer


def step_of(model):
    optimizer, _ = make_optimizer(SFTConfig(output_dir="unused"), 10)
    _, lora, frozen = model.split()
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, (2, 2, 16)).astype(np.int32)
    arguments = (lora, optimizer.init(lora), frozen, {"input_ids": ids, "labels": ids})
    return make_train_step(model, optimizer).lower(*arguments).compile(), arguments


@pytest.mark.rotate
@pytest.mark.parametrize("lora", HEADS.values(), ids=HEADS)
def test_a_step_gives_the_same(folder, lora):
    here, there = load(folder, True, **lora)[0], load(folder, False, **lora)[0]
    step, arguments = step_of(here)
    plain, usual = step_of(there)
    jax.tree.map(np.testing.assert_array_equal, step(*arguments), plain(*usual))
    assert here.head_on_host


def test_the_planner_counts_what_the_program_holds(folder):
    work = plan.of_step(model := load(folder, True)[0], *step_of(model)[1])
    config, lora = read_json(folder / "config.json"), LoraConfig(r=2)
    assert plan.of_config(config, lora, 2, 16, accumulation=2, offload_head=True) == work
    usual = plan.of_step(model := load(folder, False)[0], *step_of(model)[1])
    assert (work.head_on_host, usual.head_on_host) == (HEAD, 0)
    card, full = card_of("H100"), RematPlan.of("full")
    one, other = (plan.memory(w, full, card) for w in (work, usual))
    assert other.weights - one.weights == one.host - other.host == one.loss - other.loss == HEAD
    assert sum(plan.seconds(work, full, card).values()) > sum(plan.seconds(usual, full, card).values())


def test_the_planner_names_it_where_it_helps():
    """8B in memory that is enough only with table and head on the host."""
    hf = hf_config(SHAPES["llama3.1-8b"])
    card = card_of("12GB")
    work = plan.of_config(hf, LoraConfig(r=16), 1, 16384, optim="adamw_8bit")
    without = plan.of_config(hf, LoraConfig(r=16), 1, 16384, optim="adamw_8bit", offload_embedding=True)
    both = plan.of_config(hf, LoraConfig(r=16), 1, 16384, optim="adamw_8bit", offload_embedding=True, offload_head=True)
    needs = [plan.memory(w, plan.least(w, card), card).total for w in (work, without, both)]
    assert needs[0] > needs[1] > needs[2]
    budget = (needs[1] + needs[2]) // 2
    assert "With offload_embedding=True and offload_head=True they fit." in plan.explain(work, card, budget)
    assert "With offload_embedding=True and offload_head=True they fit." in plan.explain(without, card, budget)


@pytest.mark.turns("weights in the host's memory")
def test_the_trainer_evaluation_generation_and_merging_are_the_same(folder, tmp_path):
    results = []
    for offload in (True, False):
        model, tokenizer = load(folder, offload, **HEADS["adapter"])
        results.append(used(model, tokenizer, tmp_path / str(offload), "lm_head.weight"))
        assert model.head_on_host is offload
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_it_can_be_moved_later_and_is_that_of_the_checkpoint(folder):
    model, there = load(folder, True)[0], load(folder, False)[0]
    weight = there.module.lm_head.weight.get_value()
    there.offload_head()
    for moved in (model, there):
        head = moved.module.lm_head.weight.get_value()
        assert not on_device(head)
        np.testing.assert_array_equal(head, weight)


def test_what_cannot_be_is_refused(folder, tmp_path):
    tied = tiny.write_folder(tmp_path, tiny.config(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"offload_head=True: the head of .* is its embedding table"):
        from_pretrained(tied, offload_head=True, progress=False)
    with pytest.raises(ValueError, match=r"offload_head: the head of .* is its embedding table"):
        from_pretrained(tied, progress=False)[0].offload_head()
    with pytest.raises(ValueError, match=r"the head is trained"):
        load(folder, False, modules_to_save=["lm_head"])[0].offload_head()
    with pytest.raises(ValueError, match=r"offload_head=True is for one device: leave out mesh"):
        from_pretrained(folder, offload_head=True, mesh={"fsdp": 2}, progress=False)
    with pytest.raises(NotImplementedError, match=r"load it without offload_head"):
        from_pretrained(folder, offload_head=True, progress=False)[0].shard({"fsdp": 2})
