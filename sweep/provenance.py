"""Where and with what a number was made: git, versions, host."""

import importlib.metadata
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

__all__ = ["git_state", "multiplies_bfloat16", "package_versions"]

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


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has units for bfloat16; True where it cannot be told."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return True
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
