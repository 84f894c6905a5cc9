"""Uploads, with a hub that only notes what it gets."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lora_jax import get_peft_model
from tests import tiny


class Hub:
    """`huggingface_hub.HfApi` as far as it is used."""

    def __init__(self):
        self.calls, self.files = [], []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        self.files = sorted(path.name for path in folder_path.iterdir())


def test_adapter_merged_and_gguf(tmp_path, capsys):
    base = tiny.write_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(tiny.open_model(base), r=2, verbose=False)
    hub = Hub()
    assert (
        model.push_to_hub("me/adapter", tokenizer, api=hub, commit_message="x") == "https://huggingface.co/me/adapter"
    )
    assert hub.calls[0] == ("create", "me/adapter", {"private": True, "exist_ok": True})
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert "push_to_hub: commit_message has no effect" in capsys.readouterr().err
    model.push_to_hub_merged("me/merged", tokenizer, save_method="merged_16bit", private=False, token="", api=hub)
    assert hub.calls[-2][1:] == ("me/merged", {"private": False, "exist_ok": True})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    model.push_to_hub_gguf("me/gguf", tokenizer, quantization_method="f16", api=hub)
    assert [name for name in hub.files if name.endswith(".gguf")]
    with pytest.raises(TypeError, match="overwite"):
        model.push_to_hub("me/adapter", overwite=True, api=hub)
