"""Layers' weights in the host's memory: the same numbers bit for bit, a program without the weights, the same exports.

The CPU has "pinned" memory in name only; that a GPU copies while it computes is measured, not tested.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import SFTConfig, from_pretrained, get_peft_model, make_train_step, plan
from lora_jax.cards import GIB, card_of
from lora_jax.export.merge import merged_tensors
from lora_jax.lora import LoraConfig
from lora_jax.models.streamed import is_on_host
from lora_jax.optim import make_optimizer
from lora_jax.tools.bench_step import SHAPES, hf_config
from tests import tiny

MIXTURE = dict(
    architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16
)


def load(folder: Path, **how: Any):
    model, _ = from_pretrained(folder, progress=False, **how)
    return tiny.randomize_adapter(get_peft_model(model, r=2, verbose=False), scale=0.1)


@pytest.fixture(scope="module", params=["dense", "mixture", "odd"])
def models(request, tmp_path_factory: pytest.TempPathFactory):
    """A model as it is and one with its layers on the host; "odd" has blocks of 64 weights that cross rows."""
    changes = {"dense": {"num_hidden_layers": 3}, "mixture": MIXTURE, "odd": {"intermediate_size": 96}}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mixture":
        tiny.write_random(folder, tiny.config(**changes))
        tiny.write_tokenizer(folder)
    else:
        tiny.write_folder(folder, tiny.config(**changes))
    return load(folder), load(folder, offload_layers=True)


def steps(model, remat: str) -> list[np.ndarray]:
    """Losses, gradients' norms and trained leaves after two steps."""
    optimizer, _ = make_optimizer(SFTConfig(output_dir="unused"), 10)
    _, lora, frozen = model.split()
    lora = jax.tree.map(lambda x: x + 0, lora)  # a step donates them
    state = optimizer.init(lora)
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, (2, 2, 16)).astype(np.int32)
    step = make_train_step(model, optimizer, remat=remat, scan_layers=False)
    for _ in range(2):
        lora, state, metrics = step(lora, state, frozen, {"input_ids": ids, "labels": ids})
    return [np.asarray(leaf) for leaf in jax.tree.leaves((metrics, lora))]


@pytest.mark.rotate
@pytest.mark.parametrize("remat", ["none", "full", "selective", "offload"])
def test_steps_are_the_same(models, remat):
    """Bit for bit: the same codes are decoded in the same programs, wherever they come from."""
    usual, streamed = (steps(model, remat) for model in models)
    for a, b in zip(usual, streamed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.rotate
def test_nothing_is_kept_of_copied_weights(models):
    """What backward keeps is smaller than one layer's codes would be: they are copied again."""
    model = models[1]
    _, lora, frozen = model.split()
    ids = np.zeros((1, 16), np.int32)

    def loss(lora):
        from lora_jax.step import sum_of_losses

        return sum_of_losses(model.split()[0], lora, frozen, {"input_ids": ids, "labels": ids}, remat="none")[0]

    kept = jax.tree.leaves(jax.jit(lambda lora: jax.vjp(loss, lora)[1])(lora))
    layer = sum(codes.nbytes for codes in model.streamed_codes()) // model.config.num_layers
    assert not [leaf.shape for leaf in kept if leaf.dtype == np.uint8 and not is_on_host(leaf) and leaf.size >= layer]


def test_weights_are_on_the_host_and_the_planner_knows(models):
    usual, streamed = models
    assert not usual.streams_layers and streamed.streams_layers
    assert all(is_on_host(buffer) for codes in streamed.streamed_codes() for buffer in codes.buffers)
    batch = {"input_ids": np.zeros((1, 1, 16), np.int32)}
    works = []
    for model in models:
        _, lora, frozen = model.split()
        works.append(plan.of_step(model, lora, lora, frozen, batch))
    codes = sum(part.nbytes for part in streamed.streamed_codes())
    assert works[1].streamed == codes == works[0].weights - works[1].weights > 0 == works[0].streamed


@pytest.mark.turns("weights in the host's memory")
@pytest.mark.rotate
def test_generation_merging_and_moving_are_the_same(models):
    usual, streamed = models
    prompt = [[1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(usual.generate(prompt, max_new_tokens=4), streamed.generate(prompt, max_new_tokens=4))
    tensors = merged_tensors(streamed)
    for name, tensor in merged_tensors(usual).items():
        np.testing.assert_array_equal(tensor.read(), tensors[name].read(), err_msg=name)
    moved = load(usual.source)
    moved.offload_layers()
    moved.offload_layers()  # changes nothing
    want = [np.asarray(buffer) for codes in streamed.streamed_codes() for buffer in codes.buffers]
    got = [np.asarray(buffer) for codes in moved.streamed_codes() for buffer in codes.buffers]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_is_refused(models):
    folder = models[0].source
    with pytest.raises(ValueError, match="load_in_4bit=True"):
        from_pretrained(folder, offload_layers=True, load_in_4bit=False, progress=False)
    with pytest.raises(ValueError, match="load_in_4bit=True"):
        load(folder, load_in_4bit=False).offload_layers()
    with pytest.raises(ValueError, match="one device"):
        from_pretrained(folder, offload_layers=True, mesh={"data": 1}, progress=False)
    with pytest.raises(NotImplementedError, match="host's memory"):
        models[1].shard({"data": 1})


def test_70b_is_planned_for_a_card_of_12_gb():
    """Weights of 33 GiB on the host; without that the planner says what would help."""
    card = card_of("H100")
    how: Any = dict(optim="adamw_8bit", offload_embedding=True)
    hf = hf_config(SHAPES["llama3.3-70b"])
    work = plan.of_config(hf, LoraConfig(r=8), 1, 2048, offload_layers=True, **how)
    chosen = plan.choose(work, card, int(10.9 * GIB))
    need = plan.memory(work, chosen, card)
    assert need.total < 10.9 * GIB and 30 * GIB < need.host < 40 * GIB
    usual = plan.of_config(hf, LoraConfig(r=8), 1, 2048, **how)
    assert usual.weights - work.weights == work.streamed > 31 * GIB
    with pytest.raises(MemoryError, match="offload_layers=True"):
        plan.choose(usual, card, int(10.9 * GIB))
