"""Adapters as GGUF files: in llama.cpp on the base's file against base and adapter here, for every family."""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import get_peft_model
from lora_jax.export.gguf_lora import save_gguf_lora, write_gguf_lora
from lora_jax.kernels.nf4.mlp import ACTIVATIONS
from tests import tiny
from tests.export.test_gguf_families import IDS, MODELS, VOCAB, config_json, gelu_from_a_table, write_model
from tests.llamacpp import LlamaCpp, centred_difference

APPLIED_OF_DEEPSEEK = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def of_kind(name: str):
    """One of those with permuted queries and keys runs, one without, one with experts."""
    experts = any(word in name for word in ("mixtral", "moe", "oss", "deepseek"))
    permuted = name.split(",")[0] in ("llama", "mistral", "mistral3", "smollm3", "granite")
    return pytest.param(name, marks=pytest.mark.rotate("experts" if experts else "permuted" if permuted else "plain"))


def log_probs(model) -> np.ndarray:
    """Ours after the last of IDS, float32 [V]."""
    return np.asarray(jax.nn.log_softmax(model.logits(np.array([IDS]))[0, -1]))


def adapted(folder: Path, scale: float = 0.1, **options):
    model = tiny.open_model(folder)
    return tiny.randomize_adapter(get_peft_model(model, r=5, lora_alpha=8, verbose=False, **options), scale=scale)


@pytest.mark.parametrize("name", [*map(of_kind, MODELS)])
def test_llamacpp_computes_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", gelu_from_a_table)
    architecture, changes = MODELS[name]
    folder = write_model(tmp_path / "model", architecture, **changes)
    (base,) = tiny.open_model(folder).save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    model = adapted(folder, use_rslora=True, target_modules=APPLIED_OF_DEEPSEEK if "deepseek" in name else None)
    path = save_gguf_lora(model, tmp_path / "adapter")
    ours = log_probs(model)
    with LlamaCpp(base, model.config.vocab_size) as server:
        assert np.abs(centred_difference(server.logprobs(IDS), ours)).max() > 0.1  # the adapter matters
    with LlamaCpp(base, model.config.vocab_size, lora=path) as server:
        difference = np.abs(centred_difference(server.logprobs(IDS), ours)).max()
    # As without an adapter (test_gguf_families.py).
    assert difference <= (2e-3 if "gemma" in name else 5e-4)


def difference_in_llamacpp(folder: Path, model, path: Path, tmp_path: Path) -> float:
    (base,) = tiny.open_model(folder).save_pretrained_gguf(
        tmp_path, quantization_method="f32", overwrite=True, verbose=False
    )
    with LlamaCpp(base, model.config.vocab_size, lora=path) as server:
        return float(np.abs(centred_difference(server.logprobs(IDS), log_probs(model))).max())


def test_adapters_that_llamacpp_would_not_apply_are_refused(tmp_path):
    architecture, changes = MODELS["deepseek-v3"]
    names = ("self_attn.q_a_proj", "self_attn.kv_b_proj", "mlp.down_proj")
    tensors = {f"base_model.model.model.layers.0.{n}.lora_{x}.weight": np.ones((4, 4)) for n in names for x in "AB"}
    with pytest.raises(ValueError, match="no adapter to kv_b_proj, q_a_proj of its architecture 'deepseek2'"):
        write_gguf_lora(tmp_path / "a.gguf", tensors, config_json(architecture, **changes), lambda _: 1.0)


def test_embeddings_and_head(tmp_path):
    folder = write_model(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=1)
    model = adapted(folder, target_modules=["embed_tokens", "lm_head", "q_proj"])
    path = save_gguf_lora(model, tmp_path)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.GGUFReader(path).tensors}
    assert shapes["token_embd.weight.lora_a"] == (VOCAB, 5) and shapes["token_embd.weight.lora_b"] == (64, 5)
    assert difference_in_llamacpp(folder, model, path, tmp_path) <= 5e-4


def test_float16_and_some_layers(tmp_path):
    folder = write_model(tmp_path / "model", "Qwen2ForCausalLM", num_hidden_layers=3)
    model = adapted(folder, target_modules=["k_proj", "down_proj"], layers_to_transform=[0, 2])
    path = save_gguf_lora(model, tmp_path, "f16")
    assert path.name == "model-lora.F16.gguf"
    reader = gguf.GGUFReader(path)
    fields = ("general.type", "adapter.type", "general.architecture", "general.base_model.0.name")
    assert [reader.get_field(f).contents() for f in fields] == ["adapter", "lora", "qwen2", "model"]
    assert reader.get_field("adapter.lora.alpha").contents() == 8
    assert {t.name.split(".")[1] for t in reader.tensors} == {"0", "2"}
    # 2^-11 of an adapter that moves log-probabilities by some units
    assert difference_in_llamacpp(folder, model, path, tmp_path) <= 1e-2
    with pytest.raises(FileExistsError, match="exists"):
        save_gguf_lora(model, tmp_path, "f16")
    with pytest.raises(ValueError, match="f32 or f16, not 'q8_0'"):
        save_gguf_lora(model, tmp_path, "q8_0")


def test_ranks_and_scales_of_their_own(tmp_path):
    """A file has one alpha; and an adapter that started as a part of the weights is written as one on the base."""
    folder = write_model(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=2)
    ranks, alphas = {"q_proj": 3, "layers.1.mlp.up_proj": 7}, {"down_proj": 20}
    options = {"rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": "pissa", "use_rslora": True}
    model = adapted(folder, scale=0.05, **options)
    path = save_gguf_lora(model, tmp_path)
    assert difference_in_llamacpp(folder, model, path, tmp_path) <= 5e-4
    with pytest.raises(ValueError, match="no adapters of DoRA"):
        save_gguf_lora(adapted(folder, use_dora=True), tmp_path / "dora")


def test_adapters_that_a_file_cannot_hold(tmp_path):
    tied = write_model(tmp_path / "tied", "Qwen2ForCausalLM", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="no adapter"):
        save_gguf_lora(tiny.open_model(tied), tmp_path)
    with pytest.raises(ValueError, match="which are the head too"):
        save_gguf_lora(adapted(tied, target_modules=["embed_tokens"]), tmp_path)
    untied = write_model(tmp_path / "untied", "Qwen2ForCausalLM")
    with pytest.raises(ValueError, match="lm_head is trained whole"):
        save_gguf_lora(adapted(untied, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    model = adapted(untied, target_modules=["q_proj"], scale=1e5)
    with pytest.raises(ValueError, match="more than float16 can"):
        save_gguf_lora(model, tmp_path, "f16")
    model.update_lora(jax.tree.map(lambda x: x * jnp.nan, model.split()[1]))
    with pytest.raises(ValueError, match="is not finite"):
        save_gguf_lora(model, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_nothing_is_left_when_the_disk_fills(tmp_path, monkeypatch):
    model = adapted(write_model(tmp_path / "model", "LlamaForCausalLM"))
    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", disk_full)
    with pytest.raises(OSError, match="disk is full"):
        save_gguf_lora(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def disk_full(*_) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_smollm2_in_llamacpp(smollm2, tmp_path):
    """The adapter of a real model on its F32 file, and on that in Q8_0, where it moves the answer as much."""
    model, tokenizer = lora_jax.from_pretrained(smollm2, load_in_4bit=False, dtype="float32", progress=False)
    files = model.save_pretrained_gguf(tmp_path, tokenizer, ["f32", "q8_0"], verbose=False)
    model = tiny.randomize_adapter(get_peft_model(model, r=8, verbose=False), scale=0.02)
    path = save_gguf_lora(model, tmp_path)
    ids = tokenizer("Once upon a time, in a village between two rivers, there lived a clockmaker who")["input_ids"]
    ours = np.asarray(jax.nn.log_softmax(model.logits(np.array([ids]))[0, -1]))
    differences = []
    for file in files:
        with LlamaCpp(file, model.config.vocab_size, lora=path) as server:
            differences.append(np.abs(centred_difference(server.logprobs(ids), ours)).max())
    print("largest centred difference on F32 and Q8_0:", differences)
    assert differences[0] <= 5e-4 and differences[1] <= 1.0
