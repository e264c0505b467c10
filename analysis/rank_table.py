"""A ranking as text: a table of cells and one of baselines, what is the same above, what to keep in mind below."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from analysis.frontier import N_RESAMPLES
from analysis.place import Standing
from analysis.rank import Group
from analysis.rows import ALWAYS, compact, number
from analysis.show import as_table, as_text, readable
from sweep.baselines.published import Published
from sweep.config import SLICES, Cell
from sweep.results import METRICS

__all__ = ["rank_text"]

SHOWN = ("l0", "fvu", "fvu_per_dimension", "dead_fraction", "absorption_score")
OPTIONAL = tuple(column.name for column in METRICS if column.name.startswith("ce_"))
PARETO = "* no other row of this group has both a lower or equal L0 and a lower FVU"
TIE = "= not told from the first by the {what} (95%, {by}, one pair at a time)"
RATIO = (
    "{name}_ratio: {words} over the baselines' at the same L0, log {words} linear in log L0 between them; "
    "{name}_frontier: theirs there; {name}_matched_l0: the L0 at which theirs is as low"
)
RESAMPLED = (
    "95%: held-out sequences ({n}) drawn {draws:,} times, the same for cell and baselines; a tie where it holds 1"
)
OUTSIDE = (
    "{name}_ratio~: extrapolated, for the baselines were measured at L0 {reach}; {last}all that is known of them is "
    "whether a cell is sparser and better than the sparsest (dominates), or denser and worse than the densest "
    "(dominated)"
)
INTERVAL = "±: 95% interval of the mean over seeds; their spread is pooled over the cells of this group"
EQUAL_L0 = (
    "FVU compares fairly only at equal L0: more active latents explain more. No baseline was measured on these rows "
    "(baselines=gemma_scope does), so they stand in the order of {by} alone"
)


def rank_text(group: Group, top: int | None = None) -> str:
    """One group for the terminal; `top` limits its runs, never its baselines."""
    place = f"{group.key['model']} layer {group.key['layer']} target {group.key['hook_out']}"
    n = sum(row["n_seeds"] for row in group.rows)
    n_runs = f"{n} run{'s' * (n != 1)}"
    if n > len(group.rows):
        n_runs += f" of {len(group.rows)} cells"
    if n_measured := len(group.measured):
        n_runs += f" and {n_measured} baseline{'s' * (n_measured > 1)}"
    title = f"{place}: {n_runs}, held-out rows {compact(group.key['heldout_hash'] or '-')}"
    below = [*group.notes]
    if n_more := max(len(group.rows) - (top or len(group.rows)), 0):
        below.append(f"{n_more} more rows left out by --top {top}")
    below += [f"left out {cell_id}: {reason}" for cell_id, reason in group.left_out]
    below += [*_legend(group)]
    if not group.baselines:
        below.append(f"no published baseline for {place.replace(' target', '')}")
    below += [f"[{i}] {_citation(line)}" for i, line in enumerate(group.baselines, 1)]
    return (
        as_text(title, style="bold")
        + as_text("the same for all:", *_same_lines(group), "")
        + as_table(*_columns_and_rows(group, top))
        + (as_text("") + as_table(*_measured(group)) if group.measured else "")
        + as_text("", *below, "")
    )


def _legend(group: Group) -> Iterator[str]:
    """What the marks and columns mean that are there."""
    for standing in group.standings:
        yield RATIO.format(name=standing.measure.name, words=standing.measure.words)
        if any(row[f"{standing.measure.name}_extrapolated"] for row in group.rows):
            reach = " to ".join(dict.fromkeys(map(readable, standing.l0_range)))
            last = "such rows stand last, and " if standing is group.ordered_by else ""
            yield OUTSIDE.format(name=standing.measure.name, reach=reach, last=last)
    counts = {s.measure.name: sorted({len(numbers) for numbers in s.sequences.values()}) for s in group.standings}
    if said := [f"{name} {' or '.join(map(str, some))}" for name, some in counts.items() if some]:
        yield RESAMPLED.format(n=", ".join(said), draws=N_RESAMPLES)
    yield PARETO
    if any(row["tie"] for row in group.rows):
        order = group.ordered_by
        what = ["held-out sequences"] if order and order.sequences else []
        what += ["spread of the seeds"] if _has_intervals(group) else []
        yield TIE.format(by=f"{group.by} at equal L0" if order else group.by, what=" or the ".join(what))
    if _has_intervals(group):
        yield INTERVAL
    if group.rows and not group.measured:
        yield EQUAL_L0.format(by=group.by)


def _same_lines(group: Group) -> Iterator[str]:
    """What does not vary, one line per slice of the configuration."""
    for name, kind in (*SLICES.items(), ("seed", Cell)):
        options = [f"{f.name}={group.same[f.name]}" for f in fields(kind) if f.name in group.same]
        if options:
            yield readable(f"  {name:<9} {' '.join(options)}")


def _columns_and_rows(group: Group, top: int | None) -> tuple[list[str], list[list[Any]]]:
    metrics = [*SHOWN, *(name for name in OPTIONAL if any(row[name] is not None for row in group.rows))]
    if group.by not in metrics:
        metrics.insert(1, group.by)
    if _has_intervals(group):
        metrics.insert(metrics.index(group.by) + 1, "±")
    for standing in reversed(group.standings):
        ends = PLACED if standing in (group.ordered_by, group.standings[0]) else SHORT
        metrics[2:2] = [f"{standing.measure.name}_{end}" for end in ends]
    kind = ["kind"] if group.baselines else []
    seeds = ["n_seeds"] if any(row["n_seeds"] > 1 for row in group.rows) else ["seed"]
    columns = ["rank", *kind, *ALWAYS, *metrics, *seeds, *group.varying, "cell_id"]
    rows = [
        {
            **row,
            **_compacted(row, group.varying),
            "rank": f"{row['rank']}{'=' * bool(row['tie'])}{'*' * row['pareto']}",
            "±": _half_width(row, group.by),
            **{name: text for standing in group.standings for name, text in _placed(row, standing).items()},
        }
        for row in group.rows[:top]
    ]
    rows += [{**_baseline(line), "cell_id": f"[{i}]"} for i, line in enumerate(group.baselines, 1)]
    if group.by == "fvu" and not group.standings:
        rows.sort(key=lambda row: number(row["fvu"]))
    titles = [name.replace("_95%", " 95%") for name in columns]
    return titles, [[row.get(name) for name in columns] for row in rows]


PLACED = ("ratio", "95%", "verdict", "frontier", "matched_l0")
SHORT = ("ratio", "verdict")
"""What is shown of a measure that does not order the rows."""


def _placed(row: dict[str, Any], standing: Standing) -> dict[str, Any]:
    """The cells of one measure: an extrapolated ratio marked, an L0 that the frontier does not reach as a bound."""
    name, (lowest, highest) = standing.measure.name, standing.l0_range
    ratio, low, high = (row[f"{name}_{end}"] for end in ("ratio", "ratio_low", "ratio_high"))
    matched = row[f"{name}_matched_l0"]
    if matched is None and row[f"{name}_extrapolated"] is not None:
        better = standing.measure.loss_of(row) < standing.losses[-1]
        matched = f"> {readable(highest)}" if better else f"< {readable(lowest)}"
    return {
        f"{name}_ratio": None if ratio is None else readable(ratio) + "~" * row[f"{name}_extrapolated"],
        f"{name}_95%": None if low is None else f"{readable(low)} to {readable(high)}",
        f"{name}_matched_l0": matched,
    }


def _measured(group: Group) -> tuple[list[str], list[list[Any]]]:
    """The baselines of the group, sparsest first."""
    remarks = ["remarks"] if any(row["remarks"] for row in group.measured) else []
    columns = ["baseline", "frontier", "dict_size", "hook_in", *SHOWN, "baseline_l0", *remarks, "cell_id"]
    edges = [(standing.measure.name, {*standing.on_frontier}) for standing in group.standings]
    rows = []
    for row in group.measured:
        part_of = [name for name, edge in edges if row["cell_id"] in edge]
        rows.append([{**row, "frontier": ", ".join(part_of) or "-"}.get(name) for name in columns])
    return columns, rows


def _has_intervals(group: Group) -> bool:
    return any(_half_width(row, group.by) is not None for row in group.rows)


def _half_width(row: dict[str, Any], by: str) -> float | None:
    low, high = row[f"{by}_low"], row[f"{by}_high"]
    return None if low is None else (high - low) / 2


def _compacted(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Hashes cut short; numbers stay numbers."""
    return {name: compact(row[name]) if isinstance(row[name], str) else row[name] for name in names}


def _baseline(line: Published) -> dict[str, Any]:
    return {
        "kind": "baseline",
        "dict_size": line.width,
        "l0": line.l0,
        "fvu": line.value,
        "hook_in": line.hook_in,
    }


def _citation(line: Published) -> str:
    return (
        f"{line.baseline} {line.path}, published, measured on other text ({line.dataset}, {line.n_tokens} tokens): "
        f"{line.source}; {line.note}"
    )
