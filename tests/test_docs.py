"""Documents that cannot lie: they name what is there."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from commands import GRID, ROOT, analysis
from gangs import make_workflow, run_cells
from make import make_cell
from modules import OURS

from sweep.paths import CacheFolder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_readme_shows_the_tiny_command_that_is_tested() -> None:
    assert f"python sweep_runner.py -m {' '.join(GRID)} results_dir=out" in (ROOT / "README.md").read_text()


def test_readme_names_every_preset() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f"`{path.stem}`" in text, f"{path.parent.name}={path.stem}"


def test_the_python_of_the_readme_runs(cache: CacheFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    cell = make_cell(steps=3, skip=True)
    run_cells([cell], make_workflow(tmp_path / "results", cache))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("<cell>", cell.cell_id), names)
    assert names["cell"] == cell
    assert names["latents"].shape == (len(names["tokens"]) - 1, cell.capacity.dict_size)
    assert names["error"].shape == names["target"].shape


def test_structure_names_every_module() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    for module in OURS:
        assert module.rsplit(".", 1)[-1] in text, module


def test_options_in_the_pages_exist() -> None:
    from sweep.launch.machine import LocalOptions
    from sweep.launch.slurm_options import SlurmOptions
    from sweep.options import option_fields

    groups = {"model", "data", "capacity", "schedule", "revival", "experiment", "hydra/launcher"}
    launcher = [field.name for options in (LocalOptions, SlurmOptions) for field in dataclasses.fields(options)]
    names = {name for _, name, _, _ in option_fields()} | groups | {f"hydra.launcher.{name}" for name in launcher}
    for line in re.findall(
        r"^python sweep_runner\.py (.*)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE
    ):
        for key in re.findall(r"([\w./]+)=", line.partition("#")[0]):
            assert key in names


def test_the_tables_are_told_in_the_words_of_the_schema() -> None:
    page = (ROOT / "docs" / "schema.md").read_text()
    told = analysis("schema", "--markdown").stdout
    assert page.endswith(told), "put what `python -m analysis schema --markdown` prints into docs/schema.md"


def test_changelog_begins_with_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
