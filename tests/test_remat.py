"""Rematerialisation plans: no plan changes the result, and each keeps exactly the tensors that it names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from lora_jax import SFTConfig, get_peft_model
from lora_jax.kernels import dispatch
from lora_jax.kernels.kept import dequantize, quantize
from lora_jax.models import decoder
from lora_jax.remat import NAMES, PRESETS, QUANTIZABLE, RematPlan
from lora_jax.step import make_train_step, sum_of_losses
from tests import tiny
from tests.jaxprs import equations

LAYERS = 4
EVERYTHING, KEPT = {"*": "save"}, dict.fromkeys(NAMES, "save")
MIXED = {
    "two groups": RematPlan(((2, KEPT), (None, {}))),
    "some of each": RematPlan(((2, {"gate": "save", "up": "offload"}), (None, {"input": "offload", "q": "save"}))),
    # A loop of one layer is none, and the compiler fuses it otherwise.
    "groups of one": RematPlan(((1, {"attention": "save"}), (2, EVERYTHING), (None, dict.fromkeys(NAMES, "offload")))),
}
EIGHT_BITS = dict.fromkeys(QUANTIZABLE, "save_quantized")
QUANTIZED = {
    "all": RematPlan(((None, EIGHT_BITS),)),
    "some of each": RematPlan(
        (
            (1, {"k": "save_quantized", "v": "save_quantized"}),
            (2, EVERYTHING),
            (None, {"input": "offload", "gate": "save_quantized", "up": "save"}),
        )
    ),
}


# ---- results ------------------------------------------------------------------------------------------------------


def make_model(folder, nf4=None, layers_to_transform=None):
    """A model of four layers, its adapter with dropout."""
    tiny.write_folder(folder, tiny.config(num_hidden_layers=LAYERS), tokenizer=False)
    model = tiny.open_model(folder, nf4)
    get_peft_model(model, r=4, lora_dropout=0.2, layers_to_transform=layers_to_transform, verbose=False)
    return tiny.randomize_adapter(model, scale=0.05)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("16-bit") / "model")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """In NF4; layer 3 has no adapter, so there are stacks of three layers and of one."""
    model = make_model(tmp_path_factory.mktemp("nf4") / "model", "nf4-double", layers_to_transform=(0, 1, 2))
    assert [stack.count for stack in model.module.layers] == [3, 1]
    return model


def loss_and_gradients(model, remat, dropout=True, scan_layers=True, shape=(2, 23)):
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(*shape))
    batch = {"input_ids": ids, "labels": ids}
    key = jax.random.key(5) if dropout else None

    how = dict(remat=remat, dropout_key=key, scan_layers=scan_layers)

    @jax.jit
    def run(lora, frozen):
        return jax.value_and_grad(lambda lora: sum_of_losses(graph, lora, frozen, batch, **how)[0])(lora)

    return run(lora, frozen)


def assert_equal_results(got, want, exact):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for x, y in zip(got, want, strict=True):
        if exact:
            assert np.array_equal(x, y)
        else:  # float32 sums in another order, over 44 tokens and four layers
            assert np.abs(x - y).max() <= 1e-4 * np.abs(y).max()
            assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.fixture(scope="module")
def exact(adapted):
    """Loss and gradients of it with everything kept."""
    results = loss_and_gradients(adapted, "none")
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(results))
    return results


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.rotate("presets")) for name in PRESETS if name != "none"),
        *(pytest.param(name, marks=pytest.mark.rotate("mixed")) for name in MIXED),
    ],
)
def test_no_plan_changes_loss_or_gradients(adapted, exact, name):
    plan = {**PRESETS, **MIXED}[name]
    assert_equal_results(loss_and_gradients(adapted, plan), exact, exact=name != "groups of one")


@pytest.mark.turns("plans of rematerialisation")
@pytest.mark.rotate
@pytest.mark.parametrize("plan", ["none", "full", "offload", MIXED["groups of one"]], ids=str)
def test_layers_written_out_give_the_same(quantized, plan):
    """One stack of them is cut by the last plan, and one layer has no adapter."""
    want = loss_and_gradients(quantized, "none")
    assert_equal_results(loss_and_gradients(quantized, plan, scan_layers=False), want, exact=False)


@pytest.mark.turns("plans of rematerialisation")
@pytest.mark.rotate
@pytest.mark.parametrize(("rows", "dropout"), [(7, False), (23, False), (7, True)])
def test_feed_forward_layers_in_parts_give_the_same(quantized, rows, dropout):
    """46 tokens: six parts of seven and one of four, or two parts; with dropout they are not in parts."""
    want = loss_and_gradients(quantized, "full", dropout=dropout)
    plan = RematPlan(PRESETS["full"].groups, mlp_rows=rows)
    assert_equal_results(loss_and_gradients(quantized, plan, dropout=dropout), want, exact=dropout)


@pytest.mark.turns("plans of rematerialisation")
def test_a_plan_may_name_the_implementation_of_attention(quantized):
    plan = RematPlan.of([{"layers": "rest", "input": "save"}, {"mlp_rows": 8}, {"flash_attention": "xla"}])
    assert RematPlan.of(plan.to_list()) == plan
    assert str(plan).endswith("8 tokens at a time; attention by xla")
    want = loss_and_gradients(quantized, RematPlan(plan.groups, plan.mlp_rows))
    assert_equal_results(loss_and_gradients(quantized, plan), want, exact=True)
    with pytest.raises(NotImplementedError, match="flash_attention: implementation='cudnn' cannot do this call"):
        loss_and_gradients(quantized, RematPlan(plan.groups, flash_attention="cudnn"))


# What the planner makes of 8B at 342,784 and of 70B at 89,408 tokens in 80 GB, with two layers for all.
LONG_ROWS = {
    "8B": [
        {"layers": 1, "input": "offload", "thin": "save"},
        {"layers": "rest", "input": "offload", "attention": "save", "attention_lse": "save", "thin": "save"},
        {"mlp_rows": 4096},
    ],
    "70B": [
        {"layers": 1, "input": "offload", "thin": "save"},
        {"layers": "rest", "input": "save", "thin": "save"},
        {"mlp_rows": 4096},
    ],
}


@pytest.mark.turns("plans of rematerialisation")
@pytest.mark.rotate
@pytest.mark.parametrize("name", LONG_ROWS)
def test_plans_of_very_long_rows_give_the_same_at_8192_tokens(tmp_path, name):
    one_head = dict(hidden_size=32, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
    tiny.write_folder(tmp_path / "model", tiny.config(**one_head), tokenizer=False)
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(tmp_path / "model"), r=4, verbose=False), scale=0.05)
    row = dict(dropout=False, shape=(1, 8192))
    want = loss_and_gradients(model, "full", **row)
    got = loss_and_gradients(model, RematPlan.of(LONG_ROWS[name]), **row)
    assert abs(float(got[0] / want[0]) - 1) < 1e-6
    assert distance(got[1], want[1]) < 1e-4  # float32 sums over 8,192 tokens in another order


def distance(got, want) -> float:
    """The largest relative error of a leaf, by norms."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in leaves)


# Programs round differently in the last bit, which moves a code to its neighbour here and there.
CODES = 3e-3


@pytest.mark.turns("tensors kept in 8 bits")
def test_tensors_in_8_bits_leave_the_loss_and_hardly_move_gradients(adapted, exact):
    results = {name: loss_and_gradients(adapted, plan) for name, plan in QUANTIZED.items()}
    for loss, gradients in results.values():
        assert loss == exact[0]
        # Elements are off by up to 0.4 % of their block's largest, 0.7 % of their norm; scores are exponents.
        assert 3 * CODES < distance(gradients, exact[1]) < 0.1
    written_out = loss_and_gradients(adapted, QUANTIZED["some of each"], scan_layers=False)
    assert distance(written_out, results["some of each"]) < CODES


@pytest.mark.turns("tensors kept in 8 bits")
def test_backward_of_attention_reads_the_rounded_keys_and_values(adapted, exact, monkeypatch):
    """As a rule by hand does: forward with the exact ones, backward as if it had been with the rounded ones."""
    attention = decoder.flash_attention
    got = loss_and_gradients(
        adapted, RematPlan(((None, {"k": "save_quantized", "v": "save_quantized", "attention": "save"}),))
    )

    def by_hand(q, k, v, **options):
        def run(q, k, v):
            return attention(q, k, v, **options)

        def forward(q, k, v):
            return run(q, k, v), (q, *(dequantize(*quantize(x), x.dtype) for x in (k, v)))

        rule = jax.custom_vjp(run)
        rule.defvjp(forward, lambda kept, dout: jax.vjp(run, *kept)[1](dout))
        return rule(q, k, v)

    monkeypatch.setattr(decoder, "flash_attention", by_hand)
    want = loss_and_gradients(adapted, "none")
    assert distance(want, exact) > 3 * CODES
    assert distance(got, want) < CODES


@pytest.mark.turns("plans of rematerialisation")
def test_groups_of_a_plan_may_cut_across_stacks(quantized):
    want = loss_and_gradients(quantized, "none")
    assert_equal_results(loss_and_gradients(quantized, MIXED["groups of one"]), want, exact=False)


# ---- what is kept -------------------------------------------------------------------------------------------------


def kept(model, remat, features=64):
    """For each forward loop over layers: (length, {name: action}, shapes of one layer) of what it hands to backward.

    Values without a name go by the operation that makes them.
    """
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(2, 23))
    batch = {"input_ids": ids, "labels": ids}

    def loss(lora):
        return sum_of_losses(graph, lora, frozen, batch, remat=remat)[0]

    loops = []
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(lora).jaxpr):
        # Backward walks in reverse, and the loop of the loss carries no [B, T, D].
        if eqn.primitive.name != "scan" or eqn.params["reverse"]:
            continue
        body = eqn.params["jaxpr"]
        body = getattr(body, "jaxpr", body)
        carry, *stacked = body.outvars
        if carry.aval.shape != (2, 23, features):
            continue
        makers = {var: inner for inner in body.eqns for var in inner.outvars}
        names = {}
        for var in stacked:
            maker, action = makers.get(var), "save"
            if maker is not None and maker.primitive.name == "encode_kept":  # codes, and their scales
                action = "save_quantized"
            if maker is not None and maker.primitive.name == "device_put":
                assert "Host" in str(maker.params["devices"]), maker
                maker, action = makers[maker.invars[0]], "offload"
            if maker is not None and maker.primitive.name == "reduce_precision":  # keeps XLA from computing it twice
                maker = makers[maker.invars[0]]
            name = "an argument" if maker is None else maker.params.get("name", maker.primitive.name)
            names[name] = action
        loops.append((eqn.params["length"], names, {var.aval.shape for var in stacked}))
    return loops


def test_each_group_keeps_exactly_what_its_plan_names(adapted):
    absent = {"attention_lse", "thin"}  # only the kernels for GPUs have them
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(adapted.split()[2]["layers"]) if leaf.ndim > 2}
    for plan in (*PRESETS.values(), *MIXED.values(), *QUANTIZED.values()):
        loops, want = kept(adapted, plan), plan.resolve(LAYERS)
        assert [length for length, *_ in loops] == [count for count, _ in want]
        for (_, got, shapes), (_, actions) in zip(loops, want, strict=True):
            assert not shapes & weights
            if actions == EVERYTHING:
                assert {"k", "v", "residual", "gate", "up"} < got.keys()
                assert set(got.values()) == {"save"}
            else:
                assert got == {name: action for name, action in actions.items() if name not in absent}
                assert len(shapes) <= len(got) + sum(action == "save_quantized" for action in got.values())  # scales


def test_kernels_for_gpus_keep_8_bits(tmp_path):
    """What they keep by their own rules; nothing runs here."""
    hf = tiny.config(hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, torch_dtype="bfloat16")
    folder = tiny.write_folder(tmp_path / "model", hf, tokenizer=False)
    model = get_peft_model(tiny.open_model(folder, "nf4-double", jnp.bfloat16), r=12, verbose=False)
    plan = RematPlan(((None, {**EIGHT_BITS, "attention_lse": "save", "thin": "save"}),))
    with dispatch.using(flash_attention="triton", lora_matmuls="triton", lora_mlp="triton", lora_matmul="triton"):
        ((_, got, _),) = kept(model, plan, features=128)
    assert got == dict(plan.resolve(LAYERS)[0][1])


def test_a_cut_stack_is_not_copied(quantized):
    """Both loops over a cut stack take it whole: no part of it exists in the program but single layers."""
    loops = kept(quantized, MIXED["two groups"])
    assert [(length, "gate" in names) for length, names, _ in loops] == [(2, True), (1, False), (1, False)]
    graph, lora, frozen = quantized.split()
    ids = jnp.asarray(tiny.ids(2, 23))
    batch = {"input_ids": ids, "labels": ids}

    def loss(lora, frozen):
        return sum_of_losses(graph, lora, frozen, batch, remat=MIXED["two groups"])[0]

    text = jax.jit(jax.grad(loss)).lower(lora, frozen).compile().as_text()
    packed = {leaf.shape for leaf in jax.tree.leaves(frozen["layers"]) if leaf.ndim > 2 and leaf.dtype == np.uint8}
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bu8\[([\d,]+)\]", text)}
    assert packed <= shapes
    assert not {(2, *shape[1:]) for shape in packed} & shapes


# ---- plans as data ------------------------------------------------------------------------------------------------


def test_equal_plans_are_equal_and_hash_alike():
    plan = RematPlan(((2, {"gate": "save", "q": "recompute"}), (None, {"input": "save"})))
    same = RematPlan(((2, {"input": "save", "gate": "save"}), (None, {"up": "recompute"})))
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan != RematPlan(((3, {"gate": "save"}), (None, {})))
    assert RematPlan.of(plan) is plan


def test_a_plan_in_yaml():
    text = """
    - {layers: 8, gate: save, attention: save, attention_lse: save}
    - {layers: rest, input: offload}
    """
    plan = RematPlan.of(yaml.safe_load(text))
    assert plan.resolve(10) == [
        (8, {"input": "save", "attention": "save", "attention_lse": "save", "gate": "save"}),
        (2, {"input": "offload"}),
    ]
    assert plan.resolve(8) == plan.resolve(10)[:1]
    assert RematPlan.of(yaml.safe_load(yaml.safe_dump(plan.to_list()))) == plan
    assert str(plan) == "8 layers: save input attention attention_lse gate; the rest: offload input"
    settings = yaml.safe_load("gradient_checkpointing: [{layers: rest, gate: save}]")
    assert RematPlan.of(SFTConfig.from_dict(settings).remat) == RematPlan(((None, {"gate": "save"}),))
    parts = RematPlan.of([*plan.to_list(), {"mlp_rows": 8192}])
    assert parts == RematPlan(plan.groups, 8192) == RematPlan.of(parts.to_list()) != plan
    assert str(parts) == f"{plan}; feed-forward layers 8192 tokens at a time"
    eight_bits = RematPlan.of([{"layers": "rest", "k": "save_quantized", "v": "save_quantized", "q": "save"}])
    assert RematPlan.of(eight_bits.to_list()) == eight_bits
    assert str(eight_bits) == "all layers: save input q, save_quantized k v"
    for name, preset in PRESETS.items():
        assert RematPlan.of(name) == RematPlan.of(preset.to_list()) == preset
        assert str(preset) == name


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("some", "remat='some' is unknown; known are none, selective, full, offload"),
        ("Selectiv", "Did you mean 'selective'"),
        (3, "remat=3: wanted a preset"),
        ([], "at least one group"),
        (["full"], "wanted a preset"),
        ([{"gate": "save"}], "of how many `layers`"),
        ([{"layers": 0}], "at least 1 or None .all left., got 0"),
        ([{"layers": "8"}], "got '8'"),
        ([{"layers": "rest"}, {"layers": 2}], "only the last of 2 groups"),
        ([{"layers": 2, "gates": "save"}], "'gates' names no tensor of a layer; there are input, q"),
        ([{"layers": 2, "gate": "keep"}], "gate: 'keep' is unknown; there are save, recompute, offload, save_quant"),
        ([{"layers": 2, "thin": "save_quantized"}], "'thin' is not kept in 8 bits, only input, q, k, .* are; save it"),
        ([{"layers": 2, "attention_lse": "save_quantized"}], "'attention_lse' is not kept in 8 bits"),
        ([{"layers": 2, "*": "save_quantized"}], "'.' is not kept in 8 bits"),
        ([{"layers": 2, "input": "recompute"}], "save or offload it"),
        ([{"layers": 2, "*": "save", "gate": "save"}], "goes alone"),
        ([{"layers": 2}, {"mlp_rows": 0}], "at least 1, or None for all at once, got 0"),
        ([{"layers": 2}, {"flash_attention": "flash"}], "'flash' is unknown; known are xla, cudnn, triton, mosaic"),
    ],
)
def test_mistakes_in_plans(value, said):
    with pytest.raises(ValueError, match=said):
        RematPlan.of(value)


@pytest.mark.parametrize("groups", [((3, {}),), ((2, {}), (3, {"gate": "save"})), ((5, {}), (None, {}))])
def test_a_plan_for_another_number_of_layers_is_refused(groups, adapted):
    with pytest.raises(ValueError, match="groups of [35] layers, the model has 4"):
        make_train_step(adapted, optax.sgd(1.0), remat=RematPlan(groups))
