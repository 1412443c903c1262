"""Who is logged in to W&B, and whether a run is kept offline."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse


def default_project() -> str:
    """Return W&B's project if no option names one."""
    return os.environ.get("WANDB_PROJECT") or "clip-lightning"


def stays_offline(offline: bool | None) -> bool:
    """Whether to make the run an offline one ourselves, over what W&B would choose."""
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ("disabled", "shared"):
        return False
    if offline is not None:
        return offline
    # online is also W&B's default: only in the environment is it somebody's word
    decided = mode != "online" or os.environ.get("WANDB_MODE") == "online"
    return not decided and not has_api_key()


def has_api_key() -> bool:
    """Whether a key for W&B's server is configured (environment or netrc)."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(wandb.setup().settings.base_url).hostname or ""
    candidates = (
        [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    )
    for file in candidates:
        try:
            if netrc.netrc(file.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
