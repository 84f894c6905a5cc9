"""Adapters on experts in PEFT's two layouts: written, read, and what PEFT makes of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import get_peft_model, load_adapter
from lora_jax.export.peft import adapter_tensors
from lora_jax.fused_experts import parts_of
from lora_jax.hf_checkpoint import read_json
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from tests import tiny

E, D, F = 3, 64, 40
MOE = {"hidden_size": D, "num_experts_per_tok": 2, "moe_intermediate_size": F, "sliding_window": None}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {**MOE, **LATENT, "n_routed_experts": E, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"num_key_value_heads": 4, "routed_scaling_factor": 1.5}
MODELS = {
    "mixtral": ("MixtralForCausalLM", {**MOE, "num_local_experts": E, "intermediate_size": F}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**MOE, "num_experts": E, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": E, "head_dim": 24, "mlp_only_layers": [1]}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**MOE, "num_local_experts": E, "intermediate_size": F, "head_dim": 16, "sliding_window": 7},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
}
ATTENTION = ["q_proj", "o_proj"]
# Of the names in published files, so that Mixtral has others.
EXPERTS = r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model as it is published: single experts, but for gpt-oss."""
    architecture, changes = MODELS[family]
    hf = tiny.config(architectures=[architecture], model_type=family, **changes)
    config = config_from_hf(hf)
    shapes = {name: slot.shape for name, slot in Decoder(config, np.float32).slots().items()}
    if family == "gpt_oss":
        whole = {"gate_up_proj": (E, D, 2 * F), "gate_up_proj_bias": (E, 2 * F), "down_proj": (E, F, D)}
        whole = {f"model.layers.{i}.mlp.experts.{n}": s for i in range(2) for n, s in whole.items()}
        whole |= {f"model.layers.{i}.mlp.experts.down_proj_bias": (E, D) for i in range(2)}
        shapes = {n: s for n, s in shapes.items() if n not in parts_of(whole, whole.__getitem__, architecture)} | whole
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = rng.normal(size=shape)
        weights[name] = np.float32(1 + 0.2 * noise if "norm" in name else 1.5 * noise / shape[-1] ** 0.5)
    return tiny.write_folder(folder, hf, weights, tokenizer=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(folder / family, family) for family in MODELS}


def adapted(folder: Path, **options):
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, lora_alpha=6, verbose=False, **options))


# Everything that may have an adapter, routers too; experts and attention alone; and what the options change.
OPTIONS = {
    "default": {},
    "router": {"target_modules": r".*_proj|.*\.w[123]|.*\.mlp\.gate|.*\.block_sparse_moe\.gate|.*\.router"},
    "gate alone": {"target_modules": r".*\.experts\.\d+\.(gate_proj|w1|down_proj|w2)"},
    "down alone": {"target_modules": r".*\.experts\.\d+\.(down_proj|w2)|.*\.o_proj"},
    "layer": {"layers_to_transform": [1], "use_rslora": True},
}


# ---- both layouts, by ourselves -----------------------------------------------------------------------------------


@pytest.mark.rotate
@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, "router") for family in MODELS), ("mixtral", "default"), ("deepseek_v2", "layer")],
)
def test_what_is_written_fused_is_read_back(models, tmp_path, family, options):
    """Bit for bit where gate and up both have an adapter."""
    model = adapted(models[family], **OPTIONS[options])
    folder = model.save_pretrained(tmp_path / "fused", expert_layout="fused")
    assert not [name for name in load_file(folder / "adapter_model.safetensors") if ".experts.0." in name]
    back = load_adapter(tiny.open_model(models[family]), folder)
    want = adapter_tensors(model)
    got = adapter_tensors(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    ids = tiny.ids(2, 9)
    np.testing.assert_array_equal(back.logits(ids), model.logits(ids))
    again = back.save_pretrained(tmp_path / "again", expert_layout="fused")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_the_tensors_of_all_experts(models, tmp_path):
    """By PEFT's formula for a parameter [E, N, K]: delta[e] = scale * sum_r B[:, r, e] A[e, r, :]."""
    model = adapted(models["qwen2_moe"], target_modules=EXPERTS)
    folder = model.save_pretrained(tmp_path / "fused", expert_layout="fused")
    single, fused = adapter_tensors(model), load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert {name: t.shape for name, t in fused.items() if name.startswith(prefix)} == {
        f"{prefix}.base_layer.lora_A.weight": (E * 8, D),
        f"{prefix}.base_layer.lora_B.weight": (2 * F, 8 * E),
        f"{prefix}.lora_A.weight": (E * 4, F),
        f"{prefix}.lora_B.weight": (D, 4 * E),
    }
    config = read_json(folder / "adapter_config.json")
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config["rank_pattern"] == {"experts.gate_up_proj": 8}
    assert config["alpha_pattern"] == {"experts.gate_up_proj": 12}

    def delta(module):  # B A, without the scale
        return single[f"{prefix}.{module}.lora_B.weight"] @ single[f"{prefix}.{module}.lora_A.weight"]

    a = fused[f"{prefix}.base_layer.lora_A.weight"].reshape(E, 8, D)
    b = fused[f"{prefix}.base_layer.lora_B.weight"].reshape(2 * F, 8, E)
    down_a = fused[f"{prefix}.lora_A.weight"].reshape(E, 4, F)
    down_b = fused[f"{prefix}.lora_B.weight"].reshape(D, 4, E)
    for e in range(E):
        gate_up = np.concatenate([delta(f"{e}.gate_proj"), delta(f"{e}.up_proj")])
        # Sums of four and of eight float32 products.
        np.testing.assert_allclose(np.einsum("nr,rk->nk", b[:, :, e], a[e]), gate_up, rtol=0, atol=1e-6)
        np.testing.assert_allclose(down_b[:, :, e] @ down_a[e], delta(f"{e}.down_proj"), rtol=0, atol=1e-6)


def test_which_layout_is_the_default(models, tmp_path):
    """That which PEFT loads whole."""

    def is_fused(family, **options):
        folder = adapted(models[family], **options).save_pretrained(tmp_path / "adapter", overwrite=True)
        return "target_parameters" in read_json(folder / "adapter_config.json")

    assert not is_fused("mixtral")
    assert is_fused("mixtral", layers_to_transform=0)
    assert is_fused("mixtral", lora_dropout=0.1)
    assert is_fused("gpt_oss")
    assert not is_fused("gpt_oss", target_modules=ATTENTION)
    assert is_fused("qwen2_moe", target_modules=EXPERTS)
    assert is_fused("qwen3_moe")  # whose last layer is dense
    assert not is_fused("qwen3_moe", target_modules=EXPERTS)
    assert not is_fused("deepseek_v2", target_modules=["o_proj", "kv_b_proj"])


@pytest.mark.turns("exports of mixtures")
def test_separate_experts_of_some_layers(models, tmp_path):
    """PEFT takes either a regex or `layers_to_transform`."""
    folder = adapted(models["mixtral"], layers_to_transform=1).save_pretrained(tmp_path / "a", expert_layout="separate")
    config = read_json(folder / "adapter_config.json")
    assert (config["target_modules"], config["layers_to_transform"]) == (
        ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"],
        [1],
    )
    model = adapted(models["qwen2_moe"], layers_to_transform=1, target_modules=EXPERTS)  # not the shared expert
    folder = model.save_pretrained(tmp_path / "adapter", expert_layout="separate")
    config = read_json(folder / "adapter_config.json")
    assert config["layers_to_transform"] is None
    names = {".".join(name.split(".")[2:-2]) for name in adapter_tensors(model)}
    assert {name for name in names if re.fullmatch(config["target_modules"], name)} == names
    assert re.fullmatch(config["target_modules"], "model.layers.1.mlp.experts.up_proj")  # as PEFT tries
    for other in ("layers.0.mlp.experts.2.up_proj", "layers.1.mlp.shared_expert.up_proj"):
        assert not re.fullmatch(config["target_modules"], f"model.{other}")
    back = load_adapter(tiny.open_model(models["qwen2_moe"]), folder)
    np.testing.assert_array_equal(back.logits(tiny.ids(1, 9)), model.logits(tiny.ids(1, 9)))


def test_layouts_that_cannot_be(models, tmp_path):
    model = adapted(models["mixtral"])
    with pytest.raises(ValueError, match="expert_layout='both' is unknown; known are separate, fused, or None"):
        model.save_pretrained(tmp_path / "adapter", expert_layout="both")
    llama = tiny.write_folder(tmp_path / "llama", tokenizer=False)
    with pytest.raises(ValueError, match="expert_layout='fused' is for mixtures of experts; LlamaForCausalLM has none"):
        adapted(llama).save_pretrained(tmp_path / "adapter", expert_layout="fused")


# ---- refused ------------------------------------------------------------------------------------------------------

GATE_UP = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_{}.weight"


def edit(config=None, tensors=None):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(read_json(path) | (config or {})))
        stored = load_file(folder / "adapter_model.safetensors")
        (tensors or (lambda _: None))(stored)
        save_file(stored, folder / "adapter_model.safetensors")

    return change


REFUSED = {
    "experts": (edit(tensors=lambda t: t.update({GATE_UP.format("A"): np.ones((16, D), np.float32)})), "want"),
    "width": (
        edit(tensors=lambda t: t.update({GATE_UP.format("A"): np.ones((24, 48), np.float32)})),
        r"gate_up_proj has shapes \[24, 48\] and \[80, 24\]; 3 experts \[80, 64\] want \[3 R, 64\] and \[80, 3 R\]",
    ),
    "rank": (edit({"r": 3, "alpha_pattern": {}}), "has rank 8 and lora_alpha 6 where r=3 and lora_alpha=6"),
    "alpha": (
        edit({"alpha_pattern": {}}),
        "has rank 8 and lora_alpha 6 where r=4 and lora_alpha=6; implemented is one",
    ),
    "not blocks": (
        edit(tensors=lambda t: t.update({GATE_UP.format("B"): np.ones((80, 24), np.float32)})),
        "implemented is one rank and scale for all, or gate and up side by side",
    ),
    "other pattern": (edit({"rank_pattern": {"q_proj": 8}}), r"rank_pattern={'q_proj': 8}, which is not implemented"),
    "lacks B": (edit(tensors=lambda t: t.pop(GATE_UP.format("B"))), "or A or B is missing"),
    "lacks a layer": (
        edit(tensors=lambda t: [t.pop(n) for n in list(t) if ".layers.1.mlp.experts.lora_" in n]),
        r"is damaged: it lacks that of model\.layers\.1\.mlp\.experts\.down_proj, which target_parameters names",
    ),
}


@pytest.fixture(scope="module")
def fused(models, tmp_path_factory) -> Path:
    return adapted(models["mixtral"]).save_pretrained(tmp_path_factory.mktemp("fused"), expert_layout="fused")


@pytest.fixture(scope="module")
def target(models):
    return tiny.open_model(models["mixtral"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, fused, target, tmp_path):
    change, message = REFUSED[case]
    folder = shutil.copytree(fused, tmp_path / "adapter")
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_adapter(target, folder)
    assert target.lora_config is None


def test_not_of_a_model_without_experts(fused, tmp_path):
    llama = tiny.open_model(tiny.write_folder(tmp_path / "llama", tokenizer=False))
    with pytest.raises(ValueError, match=r"an adapter of model\.layers\.\d\.mlp\.experts\..* does not have"):
        load_adapter(llama, fused)


# ---- against PEFT -------------------------------------------------------------------------------------------------

IDS = tiny.ids(1, 21)
# Beside single experts PEFT adapts no other MLP, and it does not know of those of two families.
SEPARATE = {"mixtral": {}}
SEPARATE |= dict.fromkeys(("qwen3_moe", "deepseek_v2", "deepseek_v3"), {"target_modules": rf"{EXPERTS}|.*attn.*_proj"})
# PEFT's own: everything that it can adapt, gate and up by one adapter of the same rank.
OWN = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}
OWN["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def by_peft(models, oracle, tmp_path_factory):
    """(folder of ours, folder of PEFT's, our models by name of the case); all in one process of PEFT."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    held, requests = {}, []

    def add(name, family, **options):
        layout = options.pop("layout")
        held[name] = adapted(models[family], **options)
        held[name].save_pretrained(ours / name, expert_layout=layout)
        requests.append({"name": name, "model": str(models[family]), "adapter": str(ours / name)})

    for family in MODELS:
        for option in ("default", "router", "down alone"):
            add(f"{family} fused {option}", family, layout="fused", **OPTIONS[option])
        if family in SEPARATE:
            add(f"{family} separate", family, layout="separate", **SEPARATE[family])
        own = {**OWN, "target_modules": ["kv_b_proj", "o_proj"]} if family.startswith("deepseek") else OWN
        requests.append({"name": f"{family} own", "model": str(models[family]), "config": own})
    add("deepseek_v2 fused layer", "deepseek_v2", layout="fused", layers_to_transform=[1])
    add("qwen2_moe fused rslora", "qwen2_moe", layout="fused", use_rslora=True)
    add("mixtral fused gate", "mixtral", layout="fused", **OPTIONS["gate alone"])
    add("mixtral separate rest", "mixtral", layout="separate", target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    (ours / "cases.json").write_text(json.dumps(requests))
    np.savez(ours / "ids.npz", ids=IDS[0])
    oracle("peft_adapters.py", ours / "cases.json", ours / "ids.npz", theirs)
    return ours, theirs, held


def assert_same_logits(got, want) -> None:
    assert want.std() > 0.3
    # Float32 through two layers, the adapter merged into experts on PEFT's side.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.turns("long runs of torch")
@pytest.mark.oracle
def test_peft_loads_both_layouts_with_the_same_logits(by_peft, models):
    _, theirs, held = by_peft
    warnings = read_json(theirs / "warnings.json")
    for name, model in held.items():
        got = np.asarray(model.logits(IDS))[0]
        base = np.asarray(tiny.open_model(models[name.split()[0]]).logits(IDS))[0]
        assert np.abs(got - base).max() > 0.05, name  # the adapter matters
        try:
            assert_same_logits(got, np.load(theirs / f"{name}.npy"))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}; {warnings[name]}") from None
        assert not [text for text in warnings[name] if "missing" in text or "unexpected" in text], name


@pytest.mark.turns("long runs of torch")
@pytest.mark.oracle
def test_what_peft_saves_is_loaded(by_peft, models):
    """Adapters of ours that went through PEFT, and adapters that PEFT made for all experts."""
    _, theirs, held = by_peft
    for folder in sorted(path for path in theirs.iterdir() if path.is_dir()):
        model = load_adapter(tiny.open_model(models[folder.name.split()[0]]), folder)
        try:
            assert_same_logits(np.asarray(model.logits(IDS))[0], np.load(theirs / f"{folder.name}.npy"))
        except AssertionError as error:
            raise AssertionError(f"{folder.name}: {error}") from None
        if folder.name in held and "rslora" not in folder.name and "gate" not in folder.name.split():
            assert adapter_tensors(model).keys() == adapter_tensors(held[folder.name]).keys(), folder.name
