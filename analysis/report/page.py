"""The page: rows are read, put together and written into the template with everything a browser needs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis.common_rows import sequences_of
from analysis.effects import effects
from analysis.query import where as chosen_by
from analysis.rank import rank
from analysis.report.charts import specs
from analysis.report.latents import CHOICES, LatentPage, latent_page, the_cell
from analysis.report.place import MAX_DRAWN, Place, drawn, make_place
from analysis.report.sweeps import Sweep, sweeps_of
from analysis.rows import KEY, comparable
from analysis.show import plain
from analysis.tables import load_table, what_to_run
from sweep.results import METRICS

__all__ = ["Request", "report"]

HERE = files("analysis.report")


@dataclass(frozen=True)
class Request:
    """What a report is asked for."""

    where: str | None = None
    """A SQL condition that the runs shall satisfy."""
    latents_of: str | None = None
    """A cell whose latents are shown: its id, the beginning of it, or `best`."""
    latents: Sequence[int] = ()
    """Latents to show beside those that are chosen for every cell."""


def report(results: Path, request: Request) -> tuple[str, list[str]]:
    """The page as HTML, and what a reader of the numbers should know, one line each.

    Raises:
        ResultsError: `results` is no results folder, or lacks the latents of the cell that was asked for.
        ConfigError: the condition, the cell or a latent does not exist.
    """
    loaded = load_table(results, "runs")
    remarks = list(loaded.warnings)
    everything = loaded.frame.collect()
    runs = everything if request.where is None else chosen_by(everything.lazy(), request.where).collect()
    if n_dropped := everything.height - runs.height:
        remarks.append(f"left out {n_dropped} of {everything.height} runs: they do not satisfy {request.where}")
    sweeps = sweeps_of(results)
    places = _places(results, runs, sweeps, remarks)
    latents = None
    if request.latents_of is not None:
        best = next((place.best_id for place in places if place.best_id), None)
        latents = latent_page(results, the_cell(runs, request.latents_of, best), request.latents)
    page = _environment().get_template("page.html")
    html = page.render(
        choices=CHOICES,
        docs={column.name: column.doc for column in METRICS},
        latents=latents,
        make_some=what_to_run(results),
        n_runs=runs.height,
        payload=_payload(places, sweeps, latents),
        places=places,
        remarks=remarks,
        results=str(results),
        script=_source("page.js") + (_source("latents.js") if latents else ""),
        style=_source("page.css"),
        sweeps=sweeps,
        vega=_vega() if places else "",
        where=request.where,
    )
    return html, remarks


def _places(results: Path, runs: pl.DataFrame, sweeps: Sequence[Sweep], remarks: list[str]) -> list[Place]:
    """The groups of a ranking, each with all that is drawn of it. What could not be read is added to the remarks."""
    sequences = sequences_of(results, runs)
    groups = rank(runs, sequences=sequences)
    rows = list(comparable(runs).values())
    changes = {tuple(found.key.values()): found for found in effects(runs, sequences)}
    each = max(MAX_DRAWN // max(len(groups), 1), 8)
    wanted = [drawn(group.rows, each) for group in groups]
    cells = [cell_id for some in wanted for cell_id in some]
    curves, latents = (load_table(results, table, cells) for table in ("curves", "latents"))
    remarks += [*curves.warnings, *latents.warnings]
    points = curves.frame.collect()
    columns = ("cell_id", "density", "nearest_cosine")
    densities = latents.frame.select(columns).collect()
    return [
        make_place(
            group,
            members,
            changes.get(tuple(group.key[name] for name in KEY)),
            points.filter(pl.col("cell_id").is_in(some)),
            densities.filter(pl.col("cell_id").is_in(some)),
            sweeps,
            some,
        )
        for group, members, some in zip(groups, rows, wanted, strict=True)
    ]


def _payload(places: Sequence[Place], sweeps: Sequence[Sweep], latents: LatentPage | None) -> dict[str, Any]:
    """What the scripts of the page read."""
    units = {column.name: "" if column.unit in ("", "1") else f" ({column.unit})" for column in METRICS}
    return {
        "specs": specs() if places else {},
        "titles": {name: name.replace("_", " ") + unit for name, unit in units.items()},
        "places": [place.data for place in places],
        "commands": [sweep.command for sweep in sweeps],
        "latents": asdict(latents) if latents else None,
    }


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["embed"] = _embed
    return found


def _embed(value: Any) -> Markup:
    """JSON that can stand in a script element whatever texts it holds."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"), default=str)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _source(name: str) -> Markup:
    """A file of this package, which goes into the page as it is."""
    return Markup(HERE.joinpath(name).read_text(encoding="utf-8"))


def _vega() -> Markup:
    """Vega, Vega-Lite and vega-embed as one script, from the package that ships them."""
    from vl_convert import javascript_bundle

    bundle: str = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(bundle.replace("</script", "<\\/script"))
