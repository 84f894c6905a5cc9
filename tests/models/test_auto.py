"""Loading under transformers' names, AutoModelForCausalLM and the class of an architecture."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import auto
from lora_jax.models.registry import ARCHITECTURES
from tests import tiny


def hf(architecture: str) -> dict:
    return tiny.config(architectures=[architecture], head_dim=16)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"])
def test_both_names_load_what_from_pretrained_loads(tmp_path, architecture):
    folder = tiny.write_random(tmp_path / "model", hf(architecture))
    tiny.write_tokenizer(folder)
    options = {"dtype": "float32", "load_in_4bit": False, "max_seq_length": 100, "progress": False}
    want, _ = lora_jax.from_pretrained(folder, **options)
    for loader in (lora_jax.AutoModelForCausalLM, getattr(lora_jax, architecture)):
        got = loader.from_pretrained(folder, **options)
        assert type(got) is lora_jax.CausalLM
        assert (got.config, got.max_seq_length, got.source) == (want.config, 100, folder)
        np.testing.assert_array_equal(got.logits(tiny.ids(1, 9)), want.logits(tiny.ids(1, 9)))


def test_defaults_are_those_of_from_pretrained(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    want, _ = lora_jax.from_pretrained(folder)
    got = lora_jax.LlamaForCausalLM.from_pretrained(folder)
    weight = got.module.slots()["model.layers.0.mlp.up_proj.weight"].variable.get_value()
    assert weight.double_quantized and got.module.dtype == jnp.float32  # the folder's own
    np.testing.assert_array_equal(got.logits(tiny.ids(1, 9)), want.logits(tiny.ids(1, 9)))


def test_no_tokenizer_is_needed(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", tokenizer=False)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        lora_jax.from_pretrained(folder, progress=False)
    model = lora_jax.AutoModelForCausalLM.from_pretrained(folder, progress=False)
    assert lora_jax.get_peft_model(model, r=2, verbose=False) is model


def test_another_architecture_is_refused_by_name(tmp_path):
    folder = tiny.write_random(tmp_path / "model", hf("MistralForCausalLM"))
    message = (
        "LlamaForCausalLM.from_pretrained: .* holds a MistralForCausalLM; load it with lora_jax.MistralForCausalLM, or "
        "with lora_jax.AutoModelForCausalLM"
    )
    with pytest.raises(ValueError, match=message):
        lora_jax.LlamaForCausalLM.from_pretrained(folder, progress=False)
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    for loader in (lora_jax.LlamaForCausalLM, lora_jax.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="architecture 'GPT2LMHeadModel' is not implemented"):
            loader.from_pretrained(folder, progress=False)


def test_adapter_folders_load_with_their_base(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", tokenizer=False)
    options = {"load_in_4bit": False, "progress": False}
    model = lora_jax.AutoModelForCausalLM.from_pretrained(folder, **options)
    tiny.randomize_adapter(lora_jax.get_peft_model(model, r=2, verbose=False))
    model.save_pretrained(tmp_path / "adapter")
    again = lora_jax.LlamaForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    np.testing.assert_array_equal(again.logits(tiny.ids(1, 9)), model.logits(tiny.ids(1, 9)))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM.from_pretrained: .* holds a LlamaForCausalLM"):
        lora_jax.Qwen3ForCausalLM.from_pretrained(tmp_path / "adapter", **options)


def test_a_class_for_each_architecture():
    for name in ARCHITECTURES:
        made = getattr(lora_jax, name)
        assert (made.__name__, made.architecture) == (name, name)
        assert made is getattr(lora_jax, name) is getattr(auto, name) and name in dir(lora_jax)
        assert issubclass(made, lora_jax.AutoModelForCausalLM) and name in made.__doc__
        assert pickle.loads(pickle.dumps(made)) is made
    with pytest.raises(AttributeError, match="'GPT2LMHeadModel'; it has AutoModelForCausalLM, .*LlamaForCausalLM"):
        _ = lora_jax.GPT2LMHeadModel
    with pytest.raises(AttributeError, match="'lora_jax.auto' has no attribute 'GPT2LMHeadModel'"):
        _ = auto.GPT2LMHeadModel


def test_what_transformers_takes_and_this_does_not(tmp_path, capsys):
    folder = tiny.write_folder(tmp_path / "model", tokenizer=False)
    model = lora_jax.LlamaForCausalLM.from_pretrained(folder, device_map={"": 0}, torch_dtype="float32", progress=False)
    assert model.module.dtype == jnp.float32
    assert "from_pretrained: device_map has no effect: weights are put on JAX's devices" in capsys.readouterr().err
    with pytest.raises(TypeError, match="LlamaForCausalLM.from_pretrained: unknown argument 'dtpye'. Did you mean 'dt"):
        lora_jax.LlamaForCausalLM.from_pretrained("nowhere", dtpye="float32")
    with pytest.raises(TypeError, match="LlamaForCausalLM has no instances: LlamaForCausalLM.from_pretrained"):
        lora_jax.LlamaForCausalLM()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, r"load_in_8bit=True is not supported: use load_in_4bit=True \(NF4\)"),
        ({"full_finetuning": True}, "full_finetuning=True is not supported: only adapters"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not supported: put 'rope_scaling' into"),
        ({"load_in_4bit": True, "load_in_16bit": True}, "got load_in_4bit=True and load_in_16bit=True"),
        ({"quantization_config": {"load_in_8bit": True}}, "load_in_8bit is not supported"),
        ({"quantization_config": {"load_in_4bit": True}}, "bnb_4bit_quant_type is 'fp4'; wanted \"nf4\""),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.FastLanguageModel.from_pretrained("nowhere", 64, **options)


def test_unsloths_and_trls_names_of_loading(tmp_path, capsys):
    folder = tiny.write_folder(tmp_path / "model")
    unsloth = {"max_seq_length": 64, "dtype": None, "gpu_memory_utilization": 0.5, "fast_inference": True}
    model, tokenizer = lora_jax.FastLanguageModel.from_pretrained(str(folder), **unsloth, progress=False)
    assert model.module.slots()["model.layers.0.mlp.up_proj.weight"].variable.get_value().double_quantized
    assert (model.max_seq_length, tokenizer.eos_token_id) == (64, 257)
    assert "fast_inference has no effect" in capsys.readouterr().err
    assert lora_jax.FastLanguageModel.for_inference(model) is model
    assert lora_jax.FastLanguageModel.get_peft_model(model, r=2, verbose=False) is model
    model.save_pretrained(tmp_path / "adapter")
    quantization = lora_jax.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = lora_jax.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, progress=False)
    assert not base.module.slots()["model.layers.0.mlp.up_proj.weight"].variable.get_value().double_quantized
    base = lora_jax.prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    assert lora_jax.PeftModel.from_pretrained(base, tmp_path / "adapter").lora_config.r == 2
    assert lora_jax.is_bfloat16_supported() is True


def test_what_is_not_there_says_why():
    with pytest.raises(NotImplementedError, match="GRPOTrainer is not implemented: only supervised fine-tuning"):
        lora_jax.GRPOTrainer(model=None)
    with pytest.raises(NotImplementedError, match="FastVisionModel is not implemented: only models of text"):
        lora_jax.FastVisionModel.from_pretrained("x")
    with pytest.raises(AttributeError, match="has no attribute 'FastLanguageModle'. Did you mean 'FastLanguageModel'"):
        _ = lora_jax.FastLanguageModle
