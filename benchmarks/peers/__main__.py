"""Build the environments of peers: `python -m benchmarks.peers build [NAME ...]`.

Each takes one to two GB and some minutes. One that was built is left as it is; delete its folder to build it again.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import FOLDER, PEERS, Peer, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PEERS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to, default: %(default)s")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    for name in asked.names or PEERS:
        build(PEERS[name], asked.folder)
        print(f"{name} is there: {python(asked.folder, PEERS[name])}", flush=True)


def build(peer: Peer, folder: Path) -> None:
    """Make the environment of a peer, unless it is there; one that is not finished is not kept."""
    if python(folder, peer).exists():
        return
    unfinished = folder / f".{peer.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", unfinished], check=True)
    pip = [unfinished / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", peer.requirements], check=True)
    unfinished.rename(folder / peer.name)


if __name__ == "__main__":
    main()
