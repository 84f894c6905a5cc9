"""The planner: its bytes are those of arrays and programs, its choice fits, its errors say what would."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import LoraConfig, SFTConfig, SFTTrainer, cli, get_peft_model, plan
from lora_jax import step as step_module
from lora_jax.cards import CARDS, GIB, card_of, parse_bytes
from lora_jax.kernels import dispatch
from lora_jax.models.decoder import Decoder
from lora_jax.models.linear import Linear
from lora_jax.models.moe import Router
from lora_jax.models.registry import config_from_hf
from lora_jax.optim import make_optimizer
from lora_jax.plan import Workload, memory, seconds
from lora_jax.remat import NAMES, PRESETS, QUANTIZABLE, RematPlan
from lora_jax.step import PlannedStep, make_train_step, sum_of_losses
from lora_jax.tools.bench_step import SHAPES
from tests import tiny
from tests.jaxprs import equations

H100 = card_of("H100")
LLAMA_8B = {"architectures": ["LlamaForCausalLM"], **SHAPES["llama3.1-8b"]}


def eight_b(batch=2, length=2048, **changes) -> Workload:
    return plan.of_config(LLAMA_8B, LoraConfig(), batch, length, **changes)


# ---- cards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("h100", "H100", 80),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 80),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB", 40),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("rtx4090", "RTX 4090", 24),
        ("4060 ti", "RTX 4060 Ti", 16),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("NVIDIA L40S", "L40S", 48),
        ("NVIDIA L4", "L4", 24),
        ("24GB", "24 GB (as fast as RTX 4090)", 24),
        ("20 GiB", "20 GB (as fast as RTX 4090)", 20),
    ],
)
def test_cards_by_name_and_size(text, name, gib):
    card = card_of(text)
    assert (card.name, card.memory) == (name, gib * GIB)


def test_an_unknown_card():
    with pytest.raises(ValueError, match="gpu: 'TPU v5' is no size such as 24GB and none of the cards .* RTX 4090"):
        card_of("TPU v5")


@pytest.mark.parametrize(("text", "want"), [("24GB", 24 << 30), ("1.5 gib", 3 << 29), ("800MiB", 800 << 20), (7, 7)])
def test_amounts_of_memory(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["much", "-3GB", "3 bananas", True])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="wanted bytes, or a number with a unit"):
        parse_bytes(text)


# ---- bytes of arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nf4", "kind"),
    [
        (None, {}),
        ("nf4-double", {}),
        ("nf4-double", {"use_dora": True}),
        ("nf4-double", {"init_lora_weights": "pissa"}),
    ],
    ids=["16 bits", "NF4", "DoRA", "PiSSA"],
)
def test_weights_adapters_and_optimizer_are_counted_exactly(nf4, kind, tmp_path):
    hf = tiny.config(num_hidden_layers=3, torch_dtype="bfloat16")
    folder = tiny.write_folder(tmp_path / "model", hf, tokenizer=False)
    config = LoraConfig(r=5, target_modules=("q_proj", "down_proj"), modules_to_save=("lm_head",), **kind)
    model = get_peft_model(tiny.open_model(folder, nf4, jnp.bfloat16), config, verbose=False)
    optimizer, _ = make_optimizer(SFTConfig(), 10)
    _, lora, frozen = model.split()
    state = optimizer.init(lora)
    batch = {"input_ids": jnp.zeros((2, 3, 64), jnp.int32)}
    real = plan.of_step(model, lora, state, frozen, batch)
    planned = plan.of_config(hf, config, 3, 64, accumulation=2, load_in_4bit=nf4 is not None)
    assert real == planned
    assert real.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert real.adapters == sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    assert real.optimizer == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert (real.batch, real.length, real.accumulation, real.itemsize, real.nf4) == (3, 64, 2, 2, nf4 is not None)


def test_bytes_of_named_tensors_are_those_of_the_program(tmp_path):
    """As the kernels for GPUs name them; nothing runs here."""
    hf = tiny.config(hidden_size=128, intermediate_size=192, torch_dtype="bfloat16")
    folder = tiny.write_folder(tmp_path / "model", hf, tokenizer=False)
    model = get_peft_model(tiny.open_model(folder, "nf4-double", jnp.bfloat16), r=12, verbose=False)
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(2, 64))
    batch = {"input_ids": ids, "labels": ids}

    def loss(lora):
        return sum_of_losses(graph, lora, frozen, batch)[0]

    with dispatch.using(flash_attention="triton", lora_matmuls="triton", lora_mlp="triton", lora_matmul="triton"):
        program = jax.make_jaxpr(jax.grad(loss))(lora).jaxpr
    found = dict.fromkeys(NAMES, 0)
    for eqn in equations(program):
        if eqn.primitive.name == "name":
            aval: Any = eqn.outvars[0].aval
            found[eqn.params["name"]] += aval.size * aval.dtype.itemsize
    want = plan.of_config(hf, LoraConfig(r=12), 2, 64).named_bytes(0)
    assert found == want


@pytest.mark.parametrize("name", ["dense", "experts", "latent attention, shared experts"])
def test_bytes_of_tensors_in_8_bits_are_those_of_the_program(name):
    """Nothing is loaded."""
    hf = tiny.config(**OTHERS.get(name, {}))
    work = plan.of_config(hf, LoraConfig(target_modules="all-linear"), 2, 24, dtype="bfloat16")
    actions = dict.fromkeys(QUANTIZABLE, "save_quantized")
    graph, frozen = nnx.split(Decoder(config_from_hf(hf), jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def loss(embeddings, frozen, ids):
        frozen["embed_tokens"]["weight"] = frozen["embed_tokens"]["weight"].replace(embeddings)
        return sum_of_losses(
            graph, nnx.State({}), frozen, {"input_ids": ids, "labels": ids}, remat=RematPlan(((None, actions),))
        )[0]

    found = dict.fromkeys(NAMES, 0)
    embeddings = frozen["embed_tokens"]["weight"].get_value()
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(embeddings, frozen, ids).jaxpr):
        if eqn.primitive.name == "encode_kept":
            avals: list[Any] = [var.aval for var in eqn.outvars[1:]]
            found[eqn.params["name"]] += sum(aval.size * aval.dtype.itemsize for aval in avals)
    want = dict.fromkeys(NAMES, 0)
    for stack in Decoder(work.config, jnp.bfloat16).layers:  # each is traced once
        for tensor, size in work.kept_bytes(stack.first, actions).items():
            want[tensor] += size
    # Blocks of a shared expert, which is wider, are counted as those of the others: 1 scale of 40 codes or of 80.
    assert found == pytest.approx(want, rel=0.01 if "shared" in name else 0)


OTHERS = {
    "fused": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
    "experts": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2},
    "latent attention, shared experts": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "kv_lora_rank": 24,
        "moe_intermediate_size": 40,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 12,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_layers(name):
    """Named tensors and weights of layers that are no Llama's; nothing is loaded."""
    hf = tiny.config(**OTHERS[name])
    work = plan.of_config(hf, LoraConfig(target_modules="all-linear"), 2, 24)
    module = Decoder(config_from_hf(hf), jnp.float32)
    graph, frozen = nnx.split(module)
    ids = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def forward(frozen, ids):
        return sum_of_losses(graph, nnx.State({}), frozen, {"input_ids": ids, "labels": ids})[0]

    found = dict.fromkeys(NAMES, 0)
    for eqn in equations(jax.make_jaxpr(forward)(frozen, ids).jaxpr):
        if eqn.primitive.name == "name":
            aval: Any = eqn.outvars[0].aval
            found[eqn.params["name"]] += aval.size * aval.dtype.itemsize
    want = dict.fromkeys(NAMES, 0)
    for stack in module.layers:  # each is traced once
        for tensor, size in work.named_bytes(stack.first).items():
            want[tensor] += size
    absent = {"attention_lse", "thin"}  # named by the kernels for GPUs
    assert {n: size for n, size in found.items() if n not in absent} == {
        n: size for n, size in want.items() if n not in absent
    }
    for layer, stack in enumerate(module.layers):
        weights = plan.layer_widths(work.config, stack.first)
        linear, mlp = stack_parameters(stack), 3 * weights.hidden * weights.mlp * weights.experts
        assert linear["attention"] == weights.qkv + weights.hidden * weights.attention, layer
        assert linear["mlp"] == pytest.approx(mlp, rel=0.35)  # shared experts are not stored several times
    choice = plan.choose(work, H100, GIB)
    assert memory(work, choice, H100).total <= GIB


def stack_parameters(stack) -> dict[str, int]:
    """Weights of the linear layers of one layer, without routers."""
    found = {"attention": 0, "mlp": 0}
    for path, module in nnx.iter_modules(stack):
        if isinstance(module, Linear) and not isinstance(module, Router):
            shape = module.weight.get_value().shape[1:]
            found["attention" if "self_attn" in path else "mlp"] += math.prod(shape)
    return found


def test_what_a_plan_changes_in_memory():
    work = eight_b()
    full, selective, offload, everything = (
        memory(work, PRESETS[name], H100) for name in ("full", "selective", "offload", "none")
    )
    layer_input = 2 * 2048 * 4096 * 2
    assert full.kept["input"] == 32 * layer_input
    assert (offload.host, offload.kept.get("input")) == (32 * layer_input, None)
    saved = full.total - full.backward - (offload.total - offload.backward)
    assert saved == 32 * layer_input
    assert 0 < offload.backward - full.backward < saved / 2  # offloading needs a loop over layers, which needs more
    assert selective.kept["gate"] == 32 * 2 * 2048 * 14336 * 2
    assert offload.total < full.total < selective.total < everything.total
    some = memory(work, RematPlan(((8, {"gate": "save"}), (None, {}))), H100)
    assert some.kept["gate"] == selective.kept["gate"] // 4
    assert memory(eight_b(accumulation=4), PRESETS["full"], H100).total - full.total == work.adapters


def test_optimizers_with_a_small_state():
    states = {optim: eight_b(optim=optim).optimizer for optim in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")}
    assert states["adamw_torch"] == pytest.approx(2 * eight_b().adapters, rel=1e-4)  # two moments in float32
    assert 0.25 < states["adamw_8bit"] / states["adamw_torch"] < 0.27  # a byte an element, and scales
    assert states["paged_adamw_8bit"] == 0


# ---- seconds ------------------------------------------------------------------------------------------------------


def test_seconds_are_near_those_measured_on_an_h100():
    """327 and 248 ms for 2 x 2048 tokens; the rates were chosen by these two numbers, so they are held to 5 %."""
    for preset, measured in (("full", 0.327), ("selective", 0.248)):
        assert sum(seconds(eight_b(), PRESETS[preset], H100).values()) == pytest.approx(measured, rel=0.05)


def test_operations_of_the_model():
    """Llama-3.1-8B: 6.98e9 weights in its layers and 0.53e9 in its head; attention by its definition."""
    tokens, layers = 4096, 32
    weights = layers * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    attention = 3.5 * layers * 2 * 4 * (2048 * 2048 / 2) * 32 * 128
    assert plan.model_flops(eight_b()) == pytest.approx(4 * tokens * weights + attention)
    assert plan.model_flops(eight_b(accumulation=4)) == pytest.approx(4 * plan.model_flops(eight_b()))


def test_what_makes_a_step_longer():
    def total(work, remat="full", card=H100):
        return sum(seconds(work, RematPlan.of(remat), card).values())

    assert total(eight_b(), "none") < total(eight_b(), "selective") < total(eight_b())
    # Copies of a layer's input take a quarter of the time that the layer takes, and go on beside it.
    assert total(eight_b(), "offload") == total(eight_b())
    slow = dataclasses.replace(H100, host_bandwidth=5 / 0.84)
    assert total(eight_b(), "offload", slow) - total(eight_b(), card=slow) == pytest.approx(
        32 * (4096 * 4096 * 2 / 5e9 - seconds(eight_b(), PRESETS["full"], H100)["forward"] / 32), rel=0.2
    )
    many = {"q": "offload", "k": "offload", "v": "offload", "attention": "offload", "residual": "offload"}
    assert total(eight_b(), RematPlan(((None, many),))) > total(
        eight_b(), RematPlan(((None, dict.fromkeys(many, "save")),))
    )
    looped = dataclasses.replace(eight_b(), scan_layers=True)
    assert total(looped, "offload") > total(looped) > total(eight_b())
    assert total(eight_b(accumulation=4)) == pytest.approx(4 * total(eight_b()), rel=0.01)  # but for the optimizer
    assert total(eight_b(4)) < 2 * total(eight_b())  # weights are decoded once
    assert total(eight_b(1, 8192)) > total(eight_b(4, 2048))  # attention
    assert total(eight_b(load_in_4bit=False)) < total(eight_b())
    assert total(eight_b(), card=card_of("RTX 3090")) > 5 * total(eight_b())
    windowed = dataclasses.replace(eight_b(1, 8192).config, windows=(1024,) * 32)
    assert total(dataclasses.replace(eight_b(1, 8192), config=windowed)) < total(eight_b(1, 8192))


# ---- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.rotate
@pytest.mark.parametrize("first", [75, 78, 81])
def test_more_memory_never_makes_the_choice_slower(first):
    work, last = eight_b(), math.inf
    kinds = set()
    for tenths in range(first, 200, 9):
        budget = int(tenths / 10 * GIB)
        chosen = plan.choose(work, H100, budget)
        assert memory(work, chosen, H100).total <= budget
        now = sum(seconds(work, chosen, H100).values())
        assert now <= last * (1 + 1e-9)
        assert len(chosen.groups) <= 4
        kinds.add(str(chosen))
        last = now
    assert len(kinds) > 8  # by so many layers at a time
    assert plan.choose(work, H100, 18 * GIB) == PRESETS["selective"]
    assert plan.choose(work, H100, 80 * GIB) == PRESETS["none"]
    # In between, the choice is faster than the best preset that fits.
    assert sum(seconds(work, plan.choose(work, H100, 16 * GIB), H100).values()) < 0.9 * sum(
        seconds(work, PRESETS["full"], H100).values()
    )


@pytest.mark.rotate
@pytest.mark.parametrize("first", [8, 9, 10])
def test_tensors_are_kept_in_8_bits_only_if_that_is_allowed(first):
    work, last = eight_b(), math.inf
    faster = 0
    for budget in range(first * GIB, 26 * GIB, 3 * GIB):
        chosen = plan.choose(work, H100, budget)
        assert "save_quantized" not in str(chosen)
        allowed = plan.choose(work, H100, budget, quantized_activations=True)
        assert memory(work, allowed, H100).total <= budget
        exact, now = (sum(seconds(work, one, H100).values()) for one in (chosen, allowed))
        assert now <= exact
        assert now <= last * (1 + 1e-9)
        assert (allowed == chosen) == (now == exact)
        faster += now < 0.98 * exact
        last = now
    assert faster >= 1
    assert plan.choose(work, H100, 80 * GIB, quantized_activations=True) == PRESETS["none"]
    # Where layers' inputs are too many for the device and the host, half of their bytes may do.
    alone = dataclasses.replace(H100, host_memory=0)
    full, half = (
        memory(work, one, H100).total
        for one in (PRESETS["full"], RematPlan(((None, {"input": "save_quantized", "thin": "save"}),)))
    )
    assert full - half == 32 * 4096 * 4096 * (2 - 1 - 2 / 32)  # layers, tokens, features, bytes
    chosen = plan.choose(work, alone, (full + half) // 2, quantized_activations=True)
    assert "save_quantized input" in str(chosen)
    assert not chosen.offloads


def test_a_loop_that_is_asked_for_is_planned():
    work = eight_b()
    loop = dataclasses.replace(work, scan_layers=True)
    for preset in ("full", "selective"):
        assert memory(loop, PRESETS[preset], H100).total > memory(work, PRESETS[preset], H100).total
        times = [seconds(w, PRESETS[preset], H100) for w in (loop, work)]
        assert times[0]["copies"] > times[1]["copies"] == 0
    assert plan.choose(loop, H100, 80 * GIB) == PRESETS["selective"]


def test_long_rows_are_taken_in_parts_where_memory_is_short():
    work = eight_b(1, 32768)
    assert plan.choose(work, H100, 70 * GIB).mlp_rows is None
    short = plan.choose(work, H100, 10 * GIB)
    assert short.mlp_rows == 8192
    whole = RematPlan(short.groups)
    # 2.1 GiB less of [M, F] arrays, of which cuDNN's backward takes 0.3, and the loop over parts 0.75.
    assert memory(work, whole, H100).total - memory(work, short, H100).total > 1.0 * GIB
    # With all inputs on the host and nothing else kept a compiled program held 8.82 GiB on an H100.
    least = RematPlan.of([{"layers": "rest", "input": "offload", "thin": "save"}, {"mlp_rows": 8192}])
    full = plan.of_config(LLAMA_8B, LoraConfig(r=16), 1, 32768, optim="adamw_8bit", offload_embedding=True)
    assert memory(full, least, H100).total / GIB == pytest.approx(8.82, rel=0.08)
    assert sum(seconds(work, short, H100).values()) > sum(seconds(work, whole, H100).values())
    assert plan.choose(eight_b(), H100, 12 * GIB).mlp_rows is None


def test_attention_that_takes_less_memory_is_named_where_cudnns_does_not_fit():
    shape = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80)
    config = {**LLAMA_8B, **shape}
    work = plan.of_config(config, LoraConfig(r=32), 1, 89408, optim="adamw_8bit", offload_embedding=True)
    card, budget = dataclasses.replace(H100, host_memory=107 * 10**9), 71 * GIB
    chosen = plan.choose(work, card, budget)
    assert chosen.flash_attention == "mosaic" and chosen.mlp_rows is not None
    by_cudnn = RematPlan(chosen.groups, chosen.mlp_rows)
    assert memory(work, by_cudnn, card).total > budget >= memory(work, chosen, card).total
    assert sum(seconds(work, by_cudnn, card).values()) < sum(seconds(work, chosen, card).values())
    # Where there is more, a shorter row, a card that is no Hopper, a name that the user gave: nothing is named.
    assert plan.choose(work, card, 120 * GIB).flash_attention is None
    assert plan.choose(dataclasses.replace(work, length=8192), card, budget).flash_attention is None
    with pytest.raises(MemoryError):
        plan.choose(work, dataclasses.replace(card, name="A100 80GB"), budget)
    with dispatch.using(flash_attention="cudnn"), pytest.raises(MemoryError):
        plan.choose(work, card, budget)


def test_what_goes_to_the_host_leaves_the_device_to_what_is_worth_more():
    work = eight_b()
    full, offload = (memory(work, PRESETS[name], H100).total for name in ("full", "offload"))
    for budget in (offload, (full + offload) // 2, 10 * GIB):
        chosen = plan.choose(work, H100, budget)
        assert memory(work, chosen, H100).total <= budget
        assert sum(seconds(work, chosen, H100).values()) <= sum(seconds(work, PRESETS["offload"], H100).values())
        # Two of a layer's tensors at most: the compiler has no more copies under way.
        assert all(1 <= list(actions.values()).count("offload") <= 2 for _, actions in chosen.resolve(32))
    # In a loop copies cost time, so no more layers than necessary take part.
    loop = dataclasses.replace(work, scan_layers=True)
    full, offload = (memory(loop, PRESETS[name], H100).total for name in ("full", "offload"))
    chosen = plan.choose(loop, H100, full - (full - offload) // 8)
    counts = [count for count, actions in chosen.resolve(32) if "offload" in actions.values()]
    assert 0 < sum(counts) < 16


def test_inputs_that_are_too_many_for_the_host_stay_in_part():
    """A row of 342,733 tokens: 90 GB of inputs."""
    work = eight_b(1, 342_733, offload_embedding=True)
    chosen = plan.choose(work, H100, 77 * GIB)
    need = memory(work, chosen, H100)
    assert need.total <= 77 * GIB
    assert 40e9 < need.host <= 64e9
    assert need.kept["input"] > 20e9
    small = dataclasses.replace(H100, host_memory=10**9)
    with pytest.raises(MemoryError, match=r"need 90 GB of the host's memory, and 1 GB may be taken: XLA_PJRT_GPU_HOST"):
        plan.choose(work, small, 50 * GIB)


def test_what_does_not_fit_says_what_would():
    work = eight_b(batch=48)
    need = memory(work, PRESETS["offload"], H100).total
    with pytest.raises(MemoryError, match=r"48 rows of 2048 tokens need about .* 11.0 GiB are there") as error:
        plan.choose(work, H100, 11 * GIB)
    assert need > 11 * GIB
    rows = int(str(error.value).partition(" rows of this length fit")[0].rpartition(" ")[2])
    plan.choose(eight_b(batch=rows), H100, 11 * GIB)
    with pytest.raises(MemoryError):
        plan.choose(eight_b(batch=rows + 1), H100, 11 * GIB)
    with pytest.raises(MemoryError, match="One row of [0-9]+ tokens fits") as error:
        plan.choose(eight_b(1, 65536), H100, 8 * GIB)
    length = int(str(error.value).partition(" tokens fits")[0].rpartition(" ")[2])
    plan.choose(eight_b(1, length), H100, 8 * GIB)
    with pytest.raises(MemoryError):
        plan.choose(eight_b(1, length + 64), H100, 8 * GIB)
    with pytest.raises(MemoryError, match="take a smaller model or a larger GPU"):
        plan.choose(work, H100, 5 * GIB)
    with pytest.raises(MemoryError, match="load_in_4bit=True needs about a quarter"):
        plan.choose(eight_b(load_in_4bit=False), H100, 12 * GIB)
    assert 'With remat="auto" they fit' in plan.explain(eight_b(), H100, 12 * GIB, PRESETS["selective"])
    tight = int(6.7 * GIB)
    with pytest.raises(MemoryError, match="With offload_embedding=True they fit"):
        plan.choose(eight_b(), H100, tight)
    moved = plan.choose(eight_b(offload_embedding=True), H100, tight)
    assert memory(eight_b(offload_embedding=True), moved, H100).total <= tight


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_gets_a_plan_for_a_small_model(card):
    small = plan.of_config({"architectures": ["LlamaForCausalLM"], **SHAPES["llama3.2-1b"]}, LoraConfig(), 1, 512)
    assert memory(small, plan.choose(small, card, card.memory), card).total <= card.memory


# ---- the step -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model", tiny.config(num_hidden_layers=3))
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, verbose=False), scale=0.05)


def test_a_planned_step_is_the_step_of_its_plan(model):
    optimizer = optax.sgd(1.0)
    ids = jnp.asarray(tiny.ids(2, 24))[None]
    results = []
    planned = make_train_step(model, optimizer, remat="auto", memory_budget="1GB")
    for make in (lambda: planned, lambda: make_train_step(model, optimizer, remat=planned.plans[ids.shape])):
        _, lora, frozen = model.split()
        lora = jax.tree.map(jnp.copy, lora)
        results.append(make()(lora, optimizer.init(lora), frozen, {"input_ids": ids, "labels": ids}))
    assert list(planned.plans) == [ids.shape]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.array_equal(x, y)


def planned_step(model, optimizer):
    """(arguments of a step, function that says what a plan of it needs, bytes that the best needs, those of "full")."""
    ids = jnp.asarray(tiny.ids(2, 24))[None]
    _, lora, frozen = model.split()
    arguments = (lora, optimizer.init(lora), frozen, {"input_ids": ids, "labels": ids})
    work, card = plan.of_step(model, *arguments), step_module.this_card()

    def need(one):
        return memory(work, one, card).total

    most, least = need(plan.choose(work, card, GIB)), need(PRESETS["full"])
    assert most > least
    return arguments, need, most, least


def test_a_planned_step_steps_down_where_the_compiler_needs_more(model, monkeypatch):
    """The compiler's count for the first plan is made too high by most of what that plan keeps beyond the least."""
    optimizer = optax.sgd(1.0)
    arguments, need, most, least = planned_step(model, optimizer)
    counts = iter([int(most + 0.8 * (most - least)), most])
    monkeypatch.setattr(step_module, "bytes_held", lambda compiled: next(counts))
    step = PlannedStep(model, optimizer, int(most / 0.995) + 1)  # 0.5 % is left free
    step.compile(*arguments)
    (chosen,) = step.plans.values()
    assert need(chosen) <= least + 0.21 * (most - least)
    counts = iter([2 * most])
    with pytest.raises(MemoryError, match="The compiler counted .* too much for remat="):
        PlannedStep(model, optimizer, most).compile(*arguments)


def test_a_planned_step_steps_down_where_free_memory_lies_in_pieces(model, monkeypatch):
    optimizer = optax.sgd(1.0)
    arguments, need, most, least = planned_step(model, optimizer)
    missing = iter([int(0.8 * (most - least)), 0])
    monkeypatch.setattr(step_module, "largest_piece", lambda arguments, wanted: wanted - next(missing))
    step = PlannedStep(model, optimizer, GIB)
    step.compile(*arguments)
    (chosen,) = step.plans.values()
    assert need(chosen) <= least + 0.21 * (most - least)
    missing = iter([most])
    with pytest.raises(MemoryError, match=r"lies in pieces that are .* too small for remat=.*: delete other arrays"):
        PlannedStep(model, optimizer, GIB).compile(*arguments)


@pytest.mark.parametrize(("free", "found"), [(10 << 30, 8 << 30), (5 << 30, 5 << 30), (0, 0)])
def test_the_largest_piece_is_found_by_trying(free, found, monkeypatch):
    arguments = (jnp.zeros(3), np.zeros(3))
    assert step_module.largest_piece(arguments, 8 << 30) == 8 << 30  # on a CPU it is not tried
    tried = []
    monkeypatch.setattr(step_module, "_is_free", lambda size: tried.append(size) or size <= free)
    monkeypatch.setattr(type(jax.devices()[0]), "platform", "gpu", raising=False)
    got = step_module.largest_piece(arguments, 8 << 30)
    assert found - (8 << 30) // 64 <= got <= found
    assert len(tried) <= 8
    assert step_module.largest_piece((*arguments, jax.ShapeDtypeStruct((3,), jnp.float32)), 8 << 30) == 8 << 30


def test_auto_needs_to_know_the_memory(model):
    if jax.local_devices()[0].memory_stats():
        pytest.skip("this device says how much memory it has")
    with pytest.raises(ValueError, match='memory_budget="8GB"'):
        make_train_step(model, optax.sgd(1.0), remat="auto")
    with pytest.raises(ValueError, match='is for remat="auto"'):
        make_train_step(model, optax.sgd(1.0), remat="full", memory_budget="8GB")
    with pytest.raises(ValueError, match="memory_budget='8GB' does nothing"):
        SFTConfig(memory_budget="8GB")
    with pytest.raises(ValueError, match='quantized_activations is for remat="auto"'):
        make_train_step(model, optax.sgd(1.0), remat="full", quantized_activations=True)
    with pytest.raises(ValueError, match="give a plan with save_quantized"):
        SFTConfig(quantized_activations=True)


def test_the_trainer_plans(model, tmp_path, capsys):
    rows = [{"input_ids": tiny.ids(1, 20, seed=i)[0].tolist()} for i in range(2)]
    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing="auto",
        memory_budget="1GB",
        save_strategy="no",
    )
    output = SFTTrainer(model, args, train_dataset=rows).train()
    assert output.global_step == 1
    assert "Rematerialisation chosen for them: all layers: save input" in capsys.readouterr().err


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def config_only(tmp_path) -> Path:
    """A folder that holds a config.json and nothing else."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-jax", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    return 0


def test_plan_prints_memory_time_and_limits(config_only, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "plan", config_only, "--gpu", "12GB", "--batch", 2, "--seq", 2048, "--rank", 16) == 0
    shown = capsys.readouterr().out
    work, card = eight_b(), card_of("12GB")
    chosen = plan.choose(work, card, int(plan.MEMORY_FRACTION * card.memory))
    assert f"remat=auto: {chosen}" in shown
    assert f"{memory(work, chosen, card).total / GIB:.2f}" in shown
    for word in ("weights", "adapters", "optimizer", "input", "gate", "peak", "tokens/s", "none", "offload"):
        assert word in shown
    assert "rows of 2048 tokens fit, or 2 of" in shown
    assert "XLA_CLIENT_MEM_FRACTION" in shown
    assert run(monkeypatch, "plan", config_only, "--gpu", "H100", "--remat", "full", "--16bit") == 0
    assert f"{memory(eight_b(load_in_4bit=False), PRESETS['full'], H100).total / GIB:.2f}" in capsys.readouterr().out


def test_plan_with_tensors_in_8_bits(config_only, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ("plan", config_only, "--gpu", "12GB", "--batch", 2, "--seq", 2048)
    assert run(monkeypatch, *arguments) == 0
    assert "save_quantized" not in capsys.readouterr().out  # never without having been asked for
    assert run(monkeypatch, *arguments, "--quantized-activations") == 0
    work, card = eight_b(), card_of("12GB")
    chosen = plan.choose(work, card, int(plan.MEMORY_FRACTION * card.memory), quantized_activations=True)
    assert f"remat=auto: {chosen}" in capsys.readouterr().out and "save_quantized" in str(chosen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "12GB", "--batch", "64"), "rows of this length fit"),
        (("--gpu", "12GB", "--remat", "selective"), 'With remat="auto" they fit'),
        (("--gpu", "6GB"), "With offload_embedding=True and offload_head=True they fit."),
        (("--gpu", "5GB"), "With offload_layers=True"),
        (("--gpu", "3GB"), "take a smaller model or a larger GPU"),
        (("--gpu", "TPU"), "none of the cards"),
        (("--gpu", "24GB", "--remat", "most"), "remat='most' is unknown"),
        (("--gpu", "24GB", "--remat", "full", "--quantized-activations"), "is for --remat auto on one GPU"),
        (("--gpu", "24GB", "--target-modules", "q_prj"), "Did you mean 'q_proj'?"),
        (("--gpu", "H10"), "Did you mean 'H100'?"),
        (("--gpu", "24GB", "--optim", "sgd"), "adamw_8bit"),
    ],
)
def test_plan_refuses(arguments, said, config_only, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "plan", config_only, *arguments) == 2
    assert said in capsys.readouterr().err


def test_train_refuses_what_cannot_fit_before_it_loads(config_only, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "one"}\n')
    settings = tmp_path / "run.yaml"
    settings.write_text("gradient_checkpointing: auto\nmemory_budget: 2GB\n")
    assert run(monkeypatch, "train", config_only, "--data", data, "--config", settings, "-o", tmp_path / "run") == 2
    assert "take a smaller model or a larger GPU" in capsys.readouterr().err  # the folder holds no weights to load


# ---- against the compiler -----------------------------------------------------------------------------------------


# Where attention and its log-sum-exp are saved, its kernel stands in the forward pass alone: once for each of 32
# layers, or of 16 layers of which 10 compute it again.
@pytest.mark.turns("whole steps compiled for GPUs")
@pytest.mark.rotate
@pytest.mark.parametrize(
    ("capability", "case", "attention_forward"),
    [("sm_90", "8b-selective", 32), ("sm_89", "1b-mixed", 26), ("sm_90", "1b-dora", 32), ("sm_90", "1b-pissa", 32)],
)
def test_estimates_are_within_8_percent_of_the_compiler(compile_for_gpus, capability, case, attention_forward):
    """A whole step compiled for a GPU that need not be there; tests/plan_for_gpu.py has more of them."""
    (result,) = compile_for_gpus("plan_for_gpu.py", capability, case)
    assert result["estimate"] == pytest.approx(result["compiled"], rel=0.08), result
    assert result["attention_forward"] == attention_forward
