"""Adapters on a head that is the embedding matrix: one matrix in both places, as with PEFT's ensure_weight_tying."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import get_peft_model, load_adapter
from lora_jax.export.peft import adapter_tensors
from lora_jax.hf_checkpoint import read_json
from tests import tiny
from tests.models.test_families import loss_and_gradients

IDS = tiny.ids(1, 17)
# Gemma scales its embeddings after the adapter, but not its head.
GEMMA = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 5.0}
MODELS = {"llama": {}, "gemma": {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 16}}
OPTIONS = {
    "copy": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]},
    "adapter": {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("tied")
    configs = {name: tiny.config(tie_word_embeddings=True, **changes) for name, changes in MODELS.items()}
    folders = {name: tiny.write_random(where / name, config) for name, config in configs.items()}
    return folders


def adapted(folder: Path, **options):
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, lora_alpha=6, verbose=False, **options))


EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip(models, tmp_path, options):
    model = adapted(models["llama"], **OPTIONS[options])
    folder = model.save_pretrained(tmp_path / "adapter")
    stored, config = load_file(folder / "adapter_model.safetensors"), read_json(folder / "adapter_config.json")
    assert config["ensure_weight_tying"] is True
    if options == "copy":
        assert config["modules_to_save"] == ["embed_tokens"]
        np.testing.assert_array_equal(stored[f"{HEAD}.weight"], stored[f"{EMBEDDING}.weight"])
    else:
        np.testing.assert_array_equal(stored[f"{HEAD}.lora_A.weight"], stored[f"{EMBEDDING}.lora_embedding_B"].T)
        np.testing.assert_array_equal(stored[f"{HEAD}.lora_B.weight"], stored[f"{EMBEDDING}.lora_embedding_A"].T)
    back = load_adapter(tiny.open_model(models["llama"]), folder)
    assert back.lora_config == model.lora_config
    for name, tensor in adapter_tensors(model).items():
        np.testing.assert_array_equal(adapter_tensors(back)[name], tensor, err_msg=name)
    np.testing.assert_array_equal(back.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_merged_model_is_still_tied(models, tmp_path, options):
    model = adapted(models["gemma"], **OPTIONS[options])
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    merged = tiny.open_model(tmp_path / "merged")
    # Float32 sums in another order; the softcap keeps logits below 5.
    np.testing.assert_allclose(merged.logits(IDS), model.logits(IDS), rtol=0, atol=5e-5)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


APART = {
    "embeddings alone": lambda t: t.pop(f"{HEAD}.weight"),
    "head alone": lambda t: t.pop(f"{EMBEDDING}.weight"),
    "two matrices": lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"] + 1}),
}


@pytest.mark.parametrize("case", APART)
def test_head_and_embeddings_apart_are_refused(models, tmp_path, case):
    """As PEFT trains them unless it is told to tie them."""
    folder = adapted(models["llama"], **OPTIONS["copy"]).save_pretrained(tmp_path / "adapter")
    edit(folder, APART[case])
    model = tiny.open_model(models["llama"])
    with pytest.raises(ValueError, match="head and embeddings apart .* one matrix in .* ensure_weight_tying=True"):
        load_adapter(model, folder)
    assert model.lora_config is None


def test_base_weights_beside_an_adapter(models, tmp_path):
    """PEFT saves those of embeddings and head with an adapter, and they must be the model's."""
    folder = adapted(models["llama"], **OPTIONS["adapter"]).save_pretrained(tmp_path / "adapter")
    weight = load_file(models["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lambda t: t.update({f"{name}.base_layer.weight": weight for name in (EMBEDDING, HEAD)}))
    load_adapter(tiny.open_model(models["llama"]), folder)
    for other in (weight + 1, weight[:-1]):
        shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        edit(tmp_path / "other", lambda t, w=other: t.update({f"{EMBEDDING}.base_layer.weight": w}))
        with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight is not the weight of .* vocabulary"):
            load_adapter(tiny.open_model(models["llama"]), tmp_path / "other")


@pytest.mark.turns("long runs of torch")
@pytest.mark.oracle
def test_peft_gives_the_same_logits_and_gradients(models, oracle, tmp_path):
    held, requests = {}, []
    for name, folder in models.items():
        for option, options in OPTIONS.items():
            case = f"{name} {option}"
            held[case] = adapted(folder, **options)
            held[case].save_pretrained(tmp_path / "ours" / case)
            requests.append({"name": case, "model": str(folder), "adapter": str(tmp_path / "ours" / case)})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cases.json").write_text(json.dumps(requests))
    np.savez(tmp_path / "ids.npz", ids=IDS[0])
    oracle("peft_adapters.py", tmp_path / "cases.json", tmp_path / "ids.npz", tmp_path / "theirs")
    messages = read_json(tmp_path / "theirs" / "warnings.json")
    for case, model in held.items():
        assert not [text for text in messages[case] if "missing" in text or "unexpected" in text or "tie" in text], case
        want = np.load(tmp_path / "theirs" / f"{case}.npy")
        assert want.std() > 0.5
        np.testing.assert_allclose(model.logits(IDS)[0], want, rtol=0, atol=1e-4, err_msg=case)  # float32, two layers
        back = load_adapter(tiny.open_model(models[case.split()[0]]), tmp_path / "theirs" / case)
        np.testing.assert_array_equal(back.logits(IDS), model.logits(IDS))
        _, count, got = loss_and_gradients(model, {"input_ids": IDS, "labels": IDS})
        want = load_file(tmp_path / "theirs" / f"{case}.safetensors")
        grads = {name.replace(".modules_to_save", "").replace(".default", ""): grad for name, grad in want.items()}
        # PEFT has two tensors of one memory, each with the gradient of its place.
        for mine, other in (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight")):
            if f"{HEAD}.{other}" in grads:
                grads[f"{EMBEDDING}.{mine}"] += grads.pop(f"{HEAD}.{other}").T
        assert got.keys() == grads.keys()
        for name, tensor in got.items():
            assert np.linalg.norm(tensor / count - grads[name]) <= 1e-4 * np.linalg.norm(grads[name]), (case, name)
            assert np.linalg.norm(grads[name]) > 1e-4, (case, name)
