"""The modules of this repository and their files."""

from pathlib import Path

from commands import ROOT

__all__ = ["OURS", "modules"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(*folders: str) -> dict[str, Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {module_name(path): path for path in files}


OURS = modules("sweep") | {"sweep_runner": ROOT / "sweep_runner.py"}
