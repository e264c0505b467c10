"""A ranking as text: one table per group, what is the same above it, what to keep in mind below it."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from analysis.rank import ALWAYS, Group, compact, number
from analysis.show import as_table, as_text, readable
from sweep.baselines.published import Published
from sweep.config import SLICES, Cell
from sweep.results import METRICS

__all__ = ["rank_text"]

SHOWN = ("l0", "fvu", "fvu_per_dimension", "dead_fraction", "absorption_score")
OPTIONAL = tuple(column.name for column in METRICS if column.name.startswith("ce_"))
PARETO = "* no other row of this group has both a lower or equal L0 and a lower FVU"
TIE = "= not told from the first by the spread of the seeds (95%, {by}, one pair at a time)"
INTERVAL = "±: 95% interval of the mean over seeds; their spread is pooled over the cells of this group"
EQUAL_L0 = "FVU compares fairly only at equal L0: more active latents explain more"


def rank_text(group: Group, top: int | None = None) -> str:
    """One group for the terminal; `top` limits its runs, never its baselines."""
    place = f"{group.key['model']} layer {group.key['layer']} target {group.key['hook_out']}"
    n = sum(row["n_seeds"] for row in group.rows)
    n_runs = f"{n} run{'s' * (n != 1)}"
    if n > len(group.rows):
        n_runs += f" of {len(group.rows)} cells"
    title = f"{place}: {n_runs}, held-out rows {compact(group.key['heldout_hash'] or '-')}"
    below = [*group.notes]
    if n_more := max(len(group.rows) - (top or len(group.rows)), 0):
        below.append(f"{n_more} more rows left out by --top {top}")
    below += [f"left out {cell_id}: {reason}" for cell_id, reason in group.left_out]
    below += [PARETO, *([TIE.format(by=group.by)] if any(row["tie"] for row in group.rows) else [])]
    below += [*([INTERVAL] if _has_intervals(group) else []), EQUAL_L0]
    if not group.baselines:
        below.append(f"no published baseline for {place.replace(' target', '')}")
    below += [f"[{i}] {_citation(line)}" for i, line in enumerate(group.baselines, 1)]
    return (
        as_text(title, style="bold")
        + as_text("the same for all:", *_same_lines(group), "")
        + as_table(*_columns_and_rows(group, top))
        + as_text("", *below, "")
    )


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
    kind = ["kind"] if group.baselines or len({row["kind"] for row in group.rows}) > 1 else []
    seeds = ["n_seeds"] if any(row["n_seeds"] > 1 for row in group.rows) else ["seed"]
    columns = ["rank", *kind, *ALWAYS, *metrics, *seeds, *group.varying, "cell_id"]
    shown = group.rows[:top]
    rows = [
        {
            **row,
            **_compacted(row, group.varying),
            "rank": f"{row['rank']}{'=' * bool(row['tie'])}{'*' * row['pareto']}",
            "±": _half_width(row, group.by),
        }
        for row in shown
    ]
    rows += [{**_baseline(line), "cell_id": f"[{i}]"} for i, line in enumerate(group.baselines, 1)]
    if group.by == "fvu":
        rows.sort(key=lambda row: number(row["fvu"]))
    return columns, [[row.get(name) for name in columns] for row in rows]


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
