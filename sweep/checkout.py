"""Where the code lies, and its presets: what jobs and Hydra are pointed at."""

from pathlib import Path

__all__ = ["CONF", "ROOT"]

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
