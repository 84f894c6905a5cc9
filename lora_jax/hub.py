"""Saving a model to the Hugging Face hub: `push_to_hub`, `push_to_hub_merged` and `push_to_hub_gguf` of `CausalLM`."""

import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax.config import Names, resolve_names

__all__ = ["save_and_push"]

_NAMES = Names(
    no_effect={
        "commit_message": "the commit says that it is an export",
        "use_temp_dir": "a temporary folder is always used",
        "safe_serialization": "safetensors are always written",
        "create_pr": "it is pushed to the main branch",
        "temporary_location": "the system's folder for temporary files is used",
        "maximum_memory_usage": "weights are written tensor by tensor",
    }
)


def save_and_push(
    save: Callable[..., Any],
    repo_id: str,
    tokenizer: Any = None,
    *,
    token: str | None = None,
    private: bool = True,
    api: Any = None,
    **options: Any,
) -> str:
    """Saves into a temporary folder and uploads that; returns the address of the repository.

    Args:
      save: called with the folder, the tokenizer if it takes one, and `options`.
      repo_id: "user/name"; made if it does not exist.
      tokenizer: uploaded, too.
      token: of the hub; None for the one logged in with.
      private: of a repository that is made.
      api: a `huggingface_hub.HfApi`.
      options: of `save`.

    Raises:
      As `save` and `lora_jax.export.hub.push`.
    """
    from lora_jax.export.hub import push

    parameters = inspect.signature(save).parameters
    unknown_here = {name for name in options if name not in _NAMES.no_effect}  # `save` says which it knows
    options = resolve_names("push_to_hub", options, unknown_here, _NAMES)
    scratch = Path(tempfile.mkdtemp())
    folder = scratch / repo_id.rpartition("/")[2]
    try:
        if "tokenizer" in parameters:
            save(folder, tokenizer, **options)
        else:
            save(folder, **options)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    address = push(folder, repo_id, private=private, token=token or None, api=api)  # else the folder stays, as it says
    shutil.rmtree(scratch)
    return address
