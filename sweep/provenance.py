"""Where and with what a number was made: git, versions, host."""

import importlib.metadata
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

__all__ = ["git_state", "package_versions"]

PACKAGES = ("datasets", "hydra-core", "numpy", "polars", "submitit", "torch", "transformer-lens", "transformers")


@lru_cache(maxsize=1)
def git_state() -> tuple[str, bool]:
    """Commit of this code and whether the checkout differs from it; ("", False) outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
