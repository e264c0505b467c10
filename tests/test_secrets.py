"""No token and no other value of the environment ends up in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from sweep.gang import described
from sweep.secrets import without_secrets

ROOT = Path(__file__).parents[1]
MARKER = "m4rk3r-of-a-s3cret"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PGPASSWORD", "MY_NOTES")


def holding(root: Path) -> list[str]:
    """Files with the marker in their name or content, that of Parquet decoded."""
    found = []
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".parquet":
            content += json.dumps(pl.read_parquet(content).to_dicts()).encode()
        if MARKER in path.name or MARKER.encode() in content:
            found.append(str(path.relative_to(root)))
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A sweep: one cell fails with the token in its error, two for want of a hub whose URL holds a login."""
    root = tmp_path_factory.mktemp("swept")
    environment = os.environ | dict.fromkeys(NAMES, MARKER)
    environment |= {
        "BREAK": "token@0.002@3",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "broken"), str(ROOT))),
    }
    environment |= {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://me:{MARKER}@127.0.0.1:9",
        "HF_HOME": str(root / "hub"),
    }
    words = ["model=tiny,gpt2", "layer=1", "lr=1e-3,2e-3", "dict_size=64", "top_k=4", "steps=6", "n_causal_rows=0",
             "results_dir=out", f"baselines_width='http://me:{MARKER}@host/x'"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "sweep_runner.py"), "-m", *words],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return root, done


def test_nothing_of_the_environment_is_in_a_file(swept: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    root, done = swept
    assert done.returncode == 1, done.stderr
    statuses = [json.loads(path.read_text()) for path in root.glob("out/cells/*/status.json")]
    assert sorted(status["state"] for status in statuses) == ["done", "failed", "failed", "failed"]
    errors = {status["error"].get("class", "") for status in statuses}
    assert errors == {"", "ValueError", "ModelError"}
    assert len(list(root.glob("out/*/*.parquet"))) == 4
    assert holding(root) == []


def test_the_error_is_told_with_the_name_of_what_it_held(
    swept: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    logs = [path.read_text() for path in swept[0].glob("out/cells/*/log.txt")]
    assert sum("ValueError: refused: $" in log for log in logs) == 1


def test_a_file_with_the_marker_would_be_found(tmp_path: Path) -> None:
    pl.DataFrame({"a": [MARKER]}).write_parquet(tmp_path / "a.parquet", compression="zstd")
    (tmp_path / f"{MARKER}.txt").touch()
    (tmp_path / "log").write_text(f"x{MARKER}x")
    assert len(holding(tmp_path)) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"401 for {MARKER}", "401 for $HF_TOKEN"),
        (f"https://me:{MARKER}@host/x", "https://***@host/x"),
        ("s3://key:pass@host and http://user@host", "s3://***@host and http://***@host"),
        ("https://host/a@b, mail me@host", "https://host/a@b, mail me@host"),
        ("false", "false"),
    ],
)
def test_secrets_are_told_by_their_name(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", MARKER)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert without_secrets(text) == told
    assert MARKER not in json.dumps(described(ValueError(f"{MARKER} was refused")))
