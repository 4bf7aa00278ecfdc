"""Pushes a model folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id


def check_hub_access(repo_id: str) -> None:
    """Raises a ValueError for an invalid name, and without a valid login."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"cannot push: log in by `hf auth login` or set HF_TOKEN ({error})") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Pushes a model folder in one commit, to a new repository if there is none; returns the repository's address.

    Raises:
        ValueError: the Hub refuses; the folder stays.
    """
    try:
        url = HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload NaViL")
    except HfHubHTTPError as error:
        raise ValueError(f"cannot push {folder}: {error}\nTry again by: hf upload {repo_id} {folder}") from error
    return str(url)
