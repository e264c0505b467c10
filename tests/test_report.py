"""The report: what is on the page, and that odd folders and odd texts give a page or a plain error."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from browser import CHROMIUM, browser, open_page, wait_for_charts
from commands import analysis
from hypothesis import given
from hypothesis import strategies as st
from make import row_file, write_cell
from placed import BASELINES, CELLS, write
from safetensors.numpy import save_file
from typer.testing import Result

from analysis.report.curves import MAX_POINTS_PER_CURVE, thinned
from analysis.report.decoder import neighbours
from analysis.report.histograms import cosines, densities
from analysis.report.page import Request, report
from analysis.report.place import drawn
from sweep.errors import ConfigError, ResultsError
from sweep.paths import ResultsFolder, write_json

needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

EVIL = "</script><script>alert('x')</script><b>"


def payload(html: str) -> dict[str, Any]:
    """What the scripts of the page read."""
    found = re.search(r'<script type="application/json" id="payload">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


def run(*words: object) -> Result:
    return analysis("report", *words)


def write_sweep(folder: Path) -> None:
    """Four cells of two seeds each, a baseline measured beside them, and the command that made them."""
    cells = []
    for i, (width, top_k) in enumerate([(64, 4), (64, 8), (128, 4), (128, 8)]):
        for seed in (0, 1):
            cells.append(f"cell{i}{seed}")
            options = {"dict_size": width, "top_k": top_k, "seed": seed}
            write_cell(folder, cells[-1], options=options, fvu=0.7 - 0.1 * i - 0.01 * seed, l0=float(top_k))
    write_cell(folder, "gemma", kind="baseline", baseline="gemma-scope <16k>", fvu=0.3, l0=6.0)
    command = f"python sweep_runner.py -m dict_size=64,128 top_k=4,8 seed=0,1 note='{EVIL}'"
    about = {"sweep_id": "s", "command": command, "started_at": "2026-01-01T00:00:00+00:00", "cell_ids": cells}
    write_json(ResultsFolder(folder).sweep("s"), {**about, "git_sha": "0" * 40, "git_dirty": False})
    transcoder = ResultsFolder(folder).cell("cell31").transcoder
    transcoder.mkdir(parents=True)
    save_file({"W_dec": np.eye(2, 3, dtype=np.float32) + 0.5}, transcoder / "transcoder.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "results"
    write_sweep(folder)
    return folder


def test_the_page_says_which_cell_is_best_and_how_sure_that_is(results: Path):
    html, remarks = report(results, Request())
    assert remarks == []
    assert "dict_size=128 top_k=8" in html
    assert "39.5 %" in html
    assert "2 seeds" in html
    assert "lowest FVU of 8 runs of 4 cells" in html
    assert "FVU 0.4950 at L0 4.0 (dict_size=128 top_k=4)" in html


def test_the_page_holds_no_foreign_markup_and_no_address(results: Path):
    html, _ = report(results, Request())
    assert EVIL not in html
    assert EVIL in payload(html)["commands"][0]
    visible = re.sub(r"<script.*", "", html, flags=re.DOTALL)
    assert "gemma-scope &lt;16k&gt;" in visible
    assert "gemma-scope <16k>" not in visible
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)[^"]*"', html.partition('id="payload"')[0])


def test_a_condition_is_stated_and_what_it_leaves_out(results: Path):
    html, remarks = report(results, Request(where="top_k = 4"))
    assert remarks == ["left out 4 of 9 runs: they do not satisfy top_k = 4"]
    assert remarks[0] in html
    assert "dict_size=128" in html
    with pytest.raises(ConfigError, match="SQL"):
        report(results, Request(where="width = 4"))


def test_the_front_of_baselines_stands_apart_from_that_of_cells(results: Path):
    (place,) = payload(report(results, Request())[0])["places"]
    points = {(row["kind"], row["name"], row["front"]) for row in place["front"]}
    assert ("baseline, same held-out rows", "gemma-scope <16k>", True) in points
    assert ("cell", "dict_size=128 top_k=8", True) in points
    assert ("cell", "dict_size=64 top_k=8", False) in points


def test_the_page_says_whether_the_best_is_better_than_the_baselines(tmp_path: Path):
    for i, (name, (l0, fvu)) in enumerate(BASELINES.items()):
        remarks = "measured L0 8, its authors' is 400" if name == "low" else None
        write(tmp_path, name, l0, fvu, i, kind="baseline", baseline=f"layer_1/{name}", remarks=remarks)
    write(tmp_path, "best", *CELLS["sparse"], seed=9)
    html = report(tmp_path, Request())[0].replace("&#39;", "'")
    interval = r"\(95%: 0\.8\d\d to 0\.9\d\d, 30 held-out sequences\)"
    assert re.search(rf"At equal L0 its FVU is 0\.884 times the baselines' {interval}: better\.", html)
    assert "Baseline layer_1/low: measured L0 8, its authors' is 400." in html
    table = html.partition('<table class="numbers cells">')[2].partition("</table>")[0]
    assert re.findall(r'<td data-value="(layer_1/\w+|best)">', table) == [
        "best",
        *(f"layer_1/{name}" for name in BASELINES),
    ]
    assert ">0.8839<" in table
    assert ">better<" in table
    write(tmp_path, "best2", *CELLS["dominant"], seed=10, options={"lr": 1e-4})
    html = report(tmp_path, Request(where="cell_id != 'best'"))[0].replace("&#39;", "'")
    known = "it is sparser than all of them and better than the sparsest"
    assert f"The baselines' FVU was measured at other L0s (8.0 to 128.0): {known}." in html


def test_an_empty_folder_says_what_to_run(tmp_path: Path):
    html, _ = report(tmp_path, Request())
    assert "No finished run yet" in html
    assert "python sweep_runner.py -m model=tiny" in html
    assert len(html) < 50_000


def test_failed_cells_damaged_files_and_missing_tables_are_named(tmp_path: Path):
    write_cell(tmp_path, "failed", fvu=None)
    write_cell(tmp_path, "damaged", options={"lr": 1e-2})
    row_file(tmp_path, "damaged").write_bytes(b"PAR1")
    row_file(tmp_path, "failed", "curves").unlink()
    row_file(tmp_path, "failed", "latents").unlink()
    html, remarks = report(tmp_path, Request())
    assert "no cell to rank" in html
    assert "its fvu is missing" in html
    assert "No training curve of these runs can be read" in html
    assert any("damaged.parquet" in line for line in remarks)


def test_a_single_cell_has_a_page(tmp_path: Path):
    write_cell(tmp_path, "alone")
    html, _ = report(tmp_path, Request())
    assert "The only run of this group" in html
    assert "Two options at a time" not in html


def test_the_command_writes_the_file_and_refuses_what_it_cannot_do(results: Path, tmp_path: Path):
    done = run(results, "--output", tmp_path / "page.html")
    assert (done.exit_code, done.stdout) == (0, "")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    for words, problem in [
        ([tmp_path / "nowhere"], "does not exist"),
        ([results, "--output", tmp_path / "no" / "page.html"], "choose another place"),
        ([results, "--latents", "zz"], "no such cell"),
        ([results, "--latents", "cell"], "several cells"),
        ([results, "--latents", "best", "--latent", "77"], "has latents 0 to 1"),
        ([results, "--latents", "best", "--latent", "x"], "whole numbers"),
        ([results, "--latent", "1"], "needs --latents"),
    ]:
        refused = run(*words)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert problem in refused.stderr


def test_latents_come_with_contexts_and_neighbours(results: Path):
    html, _ = report(results, Request(latents_of="best", latents=[1]))
    shown = payload(html)["latents"]
    assert (shown["cell_id"], shown["n_latents"], shown["chosen"]["asked"]) == ("cell30", 2, [1])
    html, _ = report(results, Request(latents_of="cell31"))
    first, second = payload(html)["latents"]["cards"]
    assert first["contexts"] == [{"tokens": ["a", " b"], "values": [0.0, 1.5], "peak": 1, "sequence": None}]
    assert first["peaks"] == [[" b", 1]]
    assert first["near"] == [[1, round(1.75 / 2.75, 3)]]
    assert second["contexts"] == []


@given(rows=st.lists(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3), min_size=1, max_size=9))
def test_neighbours_equal_all_cosines_sorted(tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]):
    folder = tmp_path_factory.getbasetemp() / "neighbours"
    folder.mkdir(exist_ok=True)
    decoder = np.array(rows, dtype=np.float32)
    decoder[np.abs(decoder) < 1e-3] = 0
    save_file({"W_dec": decoder}, folder / "transcoder.safetensors")
    found = neighbours(folder, list(range(len(rows))), n=3)
    for i, row in enumerate(decoder):
        if not row.any():
            assert found[i] == []
            continue
        wide = decoder.astype(np.float64)
        lengths = np.linalg.norm(wide, axis=1)
        cosines = [
            (row.astype(np.float64) @ other / (lengths[i] * lengths[j]) if lengths[j] else 0.0)
            for j, other in enumerate(wide)
            if j != i
        ]
        assert [cosine for _, cosine in found[i]] == pytest.approx(sorted(cosines, reverse=True)[:3], abs=1e-5)
        assert i not in [other for other, _ in found[i]]


def test_a_decoder_that_is_missing_or_damaged_is_named(tmp_path: Path):
    with pytest.raises(ResultsError, match=r"transcoder.safetensors cannot be read"):
        neighbours(tmp_path, [0])
    (tmp_path / "transcoder.safetensors").write_bytes(b"\x08")
    with pytest.raises(ResultsError, match=r"transcoder.safetensors cannot be read"):
        neighbours(tmp_path, [0])


@given(n_runs=st.integers(0, 300), n=st.integers(2, 80))
def test_of_many_runs_the_best_half_and_others_down_to_the_last_are_drawn(n_runs: int, n: int):
    ids = [str(i) for i in range(n_runs)]
    chosen = drawn([{"cell_ids": ids[i : i + 2]} for i in range(0, n_runs, 2)], n)
    assert len(set(chosen)) == len(chosen) == min(n, n_runs)
    assert chosen == sorted(chosen, key=int)
    assert chosen[: n // 2] == ids[: n // 2]
    assert chosen[-1:] == ids[-1:]


def test_ranks_that_would_lie_on_each_other_are_not_written(tmp_path: Path):
    for i, (l0, fvu) in enumerate([(4.0, 0.9), (4.001, 0.899), (8.0, 0.5), (64.0, 0.1)]):
        write_cell(tmp_path, f"c{i}", options={"lr": 1e-3 * (i + 1)}, l0=l0, fvu=fvu)
    (place,) = payload(report(tmp_path, Request())[0])["places"]
    assert [point["rank"] for point in place["front"] if point["front"]] == [1, 2, 3, 4]
    assert [point["rank"] for point in place["front"] if point["labelled"]] == [1, 2, 3]


def test_a_single_seed_says_whose_spread_its_interval_is(tmp_path: Path):
    for i, seed in enumerate((0, 1)):
        write_cell(tmp_path, f"c{i}", options={"seed": seed}, fvu=0.5 + 0.01 * i)
    write_cell(tmp_path, "best", options={"lr": 1e-2}, fvu=0.3)
    html, _ = report(tmp_path, Request())
    assert "(95%, one seed: spread of other cells&#39; seeds)" in html


@given(n=st.integers(1, 1500))
def test_thinned_curves_keep_their_mean_and_their_last_step(n: int):
    values = [math.sin(step) for step in range(n)]
    rows = {"cell_id": ["a"] * n, "step": range(n), "metric": ["loss"] * n, "value": values}
    (curve,), size = thinned(pl.DataFrame(rows))
    assert len(curve["step"]) == math.ceil(n / size) <= MAX_POINTS_PER_CURVE
    assert curve["step"][-1] == n - 1
    weights = np.diff([-1, *curve["step"]])
    assert float(weights @ curve["value"]) / n == pytest.approx(sum(values) / n, abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(-1, 1))
def test_histograms_count_every_latent_that_fires(density: list[float], cosine: float):
    n = len(density)
    rows = pl.DataFrame({"cell_id": ["a"] * n, "density": density, "nearest_cosine": [cosine] * n})
    shares = sum(sum(record["share"]) for record in densities(rows))
    assert shares == pytest.approx(sum(value > 0 for value in density) / n, abs=1e-3)
    (record,) = cosines(rows)
    (place,) = [i for i, share in enumerate(record["share"]) if share]
    assert record["low"][place] - 1e-9 <= cosine <= record["high"][place] + 1e-9


class TestInABrowser:
    pytestmark = needs_browser

    def test_it_is_read_sorted_and_darkened_by_keyboard_and_fits_a_phone(self, results: Path, tmp_path: Path):
        file = tmp_path / "page.html"
        file.write_text(report(results, Request(latents_of="cell31"))[0], encoding="utf-8")
        with browser() as chromium:
            with open_page(chromium, file, viewport={"width": 1180, "height": 900}) as (page, wrong):
                page.locator(".plot svg").nth(5).wait_for()  # all are drawn, seen or not, so that they can be printed
                charts = page.locator(".plot")
                assert charts.count() == 6
                assert page.locator(".plot[role=graphics-document][aria-label*='tiny']").count() == 6
                assert page.locator("#cards .card").count() == 2
                for name in ("FVU against L0", "What each option did", "Training", "Every run", "Commands"):
                    assert page.get_by_role("heading", name=name).is_visible()

                heading = page.locator("table.cells").get_by_role("columnheader", name="L0", exact=True)
                heading.get_by_role("button").focus()
                page.keyboard.press("Enter")
                assert heading.get_attribute("aria-sort") == "ascending"
                page.keyboard.press("Enter")
                assert heading.get_attribute("aria-sort") == "descending"
                column = [name.split()[0] for name in page.locator("table.cells thead th").all_inner_texts()].index(
                    "L0"
                )
                shown = page.locator(f"table.cells tbody td:nth-child({column + 1})").all_inner_texts()
                assert [float(text) for text in shown] == [8.0] * 4 + [6.0] + [4.0] * 4

                page.locator(".filter").fill("top_k=8 seed=1")
                assert page.locator("table.cells tbody tr:visible").count() == 2
                assert page.locator(".count").inner_text().strip() == "2 of 9 runs"
                page.locator(".filter").fill("cell31")
                assert page.locator("table.cells tbody tr:visible").count() == 1
                page.keyboard.press("Tab")
                page.keyboard.press("Enter")
                assert page.evaluate("document.activeElement.textContent").startswith("A heading sorts")
                page.locator(".filter").fill("")

                page.locator("button.more").first.focus()
                page.keyboard.press("Enter")
                assert EVIL in page.locator(".detail").inner_text()

                page.locator(".text").first.focus()
                page.keyboard.press("ArrowLeft")
                assert page.locator("#readout").inner_text().split() == ["“a”", "0"]

                theme, before = page.locator("#theme"), page.evaluate("getComputedStyle(document.body).backgroundColor")
                theme.focus()
                page.keyboard.press("Enter")
                assert theme.inner_text() == "Light theme"
                assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
                page.locator("select[name=COLOUR]").first.select_option("top_k")
                wait_for_charts(page)
                assert wrong == []
            phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
            with open_page(chromium, file, **phone) as (page, wrong):
                wait_for_charts(page)
                assert page.evaluate("document.documentElement.dataset.theme") == "dark"
                assert page.evaluate("document.documentElement.scrollWidth") <= 390
                assert wrong == []
