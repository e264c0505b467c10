"""Other libraries as contenders of the step benchmark, each in an environment of its own.

`NAME.txt` says what to install, `NAME.py` is the contender, started in that environment. Every peer has the same d,
dict_size, top_k and batch in float32, its own initialisation, loss, optimiser and per-step bookkeeping, and no logging.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FOLDER", "PEERS", "Peer", "python"]

FOLDER = Path(__file__).parents[2] / "build" / "peers"
"""Where environments are built if nothing else is said; git ignores it."""


@dataclass(frozen=True)
class Peer:
    """A library; `nested` tells whether it can train nested prefixes."""

    name: str
    nested: bool

    @property
    def requirements(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.txt")

    @property
    def module(self) -> str:
        return f"{__name__}.{self.name}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("sparsify", nested=False),
        Peer("dictionary_learning", nested=True),
        Peer("sae_lens", nested=True),
    )
}


def python(folder: Path, peer: Peer) -> Path:
    """The interpreter of a peer's environment, whether it is there or not."""
    return folder / peer.name / "bin" / "python"
