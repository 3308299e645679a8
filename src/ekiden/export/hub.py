"""A finished export to the Hugging Face hub, on request.

Only files are uploaded; the repository is created where there is none, and private: to publish is a decision of its
own. The token is found where `hf auth login` or HF_TOKEN put it, and is never shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.errors import UsageError, UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repository: str) -> None:
    """Refuse, before anything is exported, what could not be pushed.

    Raises:
        UserError: the name is not OWNER/NAME, or there is no token.
    """
    if not _NAME.fullmatch(repository):
        raise UsageError(f"--push-to-hub {repository} is not OWNER/NAME")
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError("--push-to-hub needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")


def push_to_hub(path: Path, repository: str, card: str | None = None) -> str:
    """Upload an exported folder, or a single file with its card, and return the repository's address.

    Raises:
        UserError: the hub refuses, or cannot be reached; what was exported stays.
    """
    import huggingface_hub

    api: Any = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        if path.is_dir():
            # A card edited on the hub would not be the manifest's any more.
            api.upload_folder(repo_id=repository, folder_path=path, ignore_patterns=[MANIFEST])
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)
            if card is not None:
                api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:  # network, permission and quota have a dozen exception types
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} was exported but not pushed to {repository} ({reason}); give the same command again"
        ) from None
    return str(address)
