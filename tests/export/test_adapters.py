"""Adapters read, exchanged, and combined; against PEFT's `add_weighted_adapter`."""

import dataclasses
import json

import numpy as np
import pytest

import lora_jax
from lora_jax import get_peft_model
from lora_jax.export.adapters import combine
from lora_jax.export.merge import merged_tensors
from lora_jax.export.peft import adapter_tensors, put_on, read_adapter, take_off
from tests import tiny

IDS = tiny.ids(1, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Two of one rank and different modules, one of another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        "b": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        "c": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    }
    for seed, (name, options) in enumerate(settings.items()):
        model = get_peft_model(tiny.open_model(base), verbose=False, **options)
        tiny.randomize_adapter(model, seed).save_pretrained(folder / name)
    return {name: folder / name for name in settings}


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in merged_tensors(model).items()}


def test_adapters_by_turns(base, folders):
    """A model takes one, another, and none, and computes what it does with each loaded alone."""
    model = tiny.open_model(base)
    plain = np.asarray(model.logits(IDS))
    adapters = {name: read_adapter(model, folder) for name, folder in folders.items()}
    np.testing.assert_array_equal(model.logits(IDS), plain)
    for name in "abcab":
        put_on(model, adapters[name])
        alone, _ = lora_jax.from_pretrained(folders[name], load_in_4bit=False, progress=False)
        np.testing.assert_array_equal(model.logits(IDS), alone.logits(IDS))
        got, want = adapter_tensors(model), adapter_tensors(alone)
        assert got.keys() == want.keys() and all(np.array_equal(got[key], want[key]) for key in want)
    taken = take_off(model)
    np.testing.assert_array_equal(model.logits(IDS), plain)
    assert taken.tensors.keys() == adapters["b"].tensors.keys()
    with pytest.raises(ValueError, match="no adapter"):
        take_off(model)


def test_cat_is_the_weighted_sum(base, folders):
    model = tiny.open_model(base)
    plain = weights_of(model)
    adapters = [read_adapter(model, folder) for folder in folders.values()]
    weights, deltas = [0.7, -0.4, 1.5], []
    for adapter in adapters:
        put_on(model, adapter)
        deltas.append({name: w.astype(np.float64) - plain[name] for name, w in weights_of(model).items()})
    put_on(model, combine(adapters, weights))
    assert model.lora_config.r == 4 + 4 + 3 and model.lora_config.scale == 1
    for name, got in weights_of(model).items():
        want = plain[name] + sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=name)  # float32, of weights up to 1


def test_a_combination_is_an_adapter_like_others(base, folders, tmp_path):
    """It can be saved, loaded and trained further."""
    model = tiny.open_model(base)
    a, b = (read_adapter(model, folders[name]) for name in "ab")
    put_on(model, combine([a, b], [0.5, 0.5], "linear"))
    assert model.lora_config.r == 4
    want = np.asarray(model.logits(IDS))
    model.save_pretrained(tmp_path / "both")
    again, _ = lora_jax.from_pretrained(tmp_path / "both", load_in_4bit=False, progress=False)
    np.testing.assert_array_equal(again.logits(IDS), want)
    put_on(again, combine([a], [1.0], "cat"))
    put_on(model, a)
    np.testing.assert_allclose(again.logits(IDS), model.logits(IDS), atol=1e-5)


def test_what_cannot_be_combined(base, folders):
    model = tiny.open_model(base)
    a, b, c = (read_adapter(model, folder) for folder in folders.values())
    for adapters, weights, kind, message in [
        ([a, b], [1, 1], "ties", "combination_type='ties' is unknown; known are cat, linear"),
        ([a, b], [1], "cat", "got 2 and 1"),
        ([], [], "cat", "got 0 and 0"),
        ([a, b], [1, float("nan")], "cat", "must be numbers"),
        ([a, c], [1, 1], "linear", r"one rank, model.layers.0.self_attn.q_proj has \[3, 4\]; use 'cat'"),
    ]:
        with pytest.raises(ValueError, match=message):
            combine(adapters, weights, kind)
    whole = get_peft_model(model, target_modules=["q_proj"], modules_to_save=["lm_head"], verbose=False)
    with pytest.raises(ValueError, match="lm_head.weight is not of an adapter's A or B"):
        combine([take_off(whole)], [1])


def test_another_base(base, folders, tmp_path, capfd):
    """Its shapes are checked; another name is said."""
    other = tiny.write_folder(tmp_path / "other", tiny.config(intermediate_size=96))
    with pytest.raises(ValueError, match="made for another model.*down_proj"):
        read_adapter(tiny.open_model(other), folders["a"])
    same = tiny.write_folder(tmp_path / "renamed")
    model = tiny.open_model(same)
    adapter = read_adapter(model, folders["a"])
    assert f"trained on {base}, and is put on {same}" in capfd.readouterr().err
    narrow = {name: tensor[:, :-1] for name, tensor in adapter.tensors.items()}
    with pytest.raises(ValueError, match="made for another model"):
        put_on(model, dataclasses.replace(adapter, tensors=narrow))
    assert model.lora_config is None


@pytest.mark.turns("long runs of torch")
@pytest.mark.oracle
def test_combinations_equal_pefts(base, folders, oracle, tmp_path):
    (tmp_path / "out").mkdir()
    cases = [
        {"name": f"{kind}{i}", "weights": weights, "combination_type": kind}
        for kind in ("cat", "linear")
        for i, weights in enumerate([[0.7, 0.3], [1.2, -0.5]])
    ]
    given = {"model": str(base), "adapters": [str(folders[n]) for n in "ab"], "ids": IDS[0].tolist(), "cases": cases}
    (tmp_path / "in.json").write_text(json.dumps(given))
    oracle("peft_weighted.py", tmp_path / "in.json", tmp_path / "out")
    model = tiny.open_model(base)
    adapters = [read_adapter(model, folders[name]) for name in "ab"]
    for case in cases:
        put_on(model, combine(adapters, case["weights"], case["combination_type"]))
        want = np.load(tmp_path / "out" / f"{case['name']}.npy")
        # float32 both, logits up to 10
        np.testing.assert_allclose(model.logits(IDS)[0], want, atol=1e-4, err_msg=case["name"])
