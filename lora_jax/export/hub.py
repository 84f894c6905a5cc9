"""Exported folders to the Hugging Face hub."""

from pathlib import Path
from typing import Any

__all__ = ["push"]


def push(folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, api: Any = None) -> str:
    """Uploads a folder as a model repository, made if it does not exist; returns its address.

    Args:
      folder: what to upload.
      repo_id: ORGANISATION/NAME.
      private: of a repository that is made.
      token: None for the one logged in with.
      api: a `huggingface_hub.HfApi`.

    Raises:
      OSError: the hub refused it or could not be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(token=token) if api is None else api
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Export of lora-jax")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(f"{repo_id} could not be pushed ({error}); it is whole in {folder}: log in and push it") from None
    return f"https://huggingface.co/{repo_id}"
