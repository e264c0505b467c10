"""The answer first: the best cell of a group in plain words, how sure it is, and what stands beside it."""

from collections.abc import Iterator, Sequence
from typing import Any

from analysis.rank import Group
from analysis.report.cells import field, label
from analysis.rows import Row, number

__all__ = ["facts", "place_of", "sentences", "title"]


def place_of(group: Group) -> str:
    """The model, layer and target."""
    key = group.key
    return f"{key['model']}, layer {key['layer']}, target {key['hook_out']}"


def title(group: Group, names: Sequence[str]) -> str:
    """The name of the best cell."""
    return label(best, names) if (best := _best(group)) else "no cell to rank"


def facts(group: Group) -> list[tuple[str, str, str]]:
    """Value, what it is, and its interval, of the best cell."""
    best = _best(group)
    if best is None:
        return []
    wanted = {
        "fvu": "of the variance left unexplained (FVU)",
        "l0": "active latents per token (L0)",
        "dead_fraction": "of the latents never fire",
        "frac_latents_with_twin": "of the latents have a twin (decoder cosine above 0.9)",
    }
    found = [(_plain(name, best[name]), words, _interval(best, name)) for name, words in wanted.items()]
    return [fact for fact in found if fact[0] != "-"]


def sentences(group: Group, names: Sequence[str]) -> Iterator[str]:
    """What a reader must know before using the best cell."""
    cells = group.rows
    best = _best(group)
    if best is None:
        yield "No cell of this group has a number to rank by."
        return
    n_runs = sum(row["n_seeds"] for row in cells)
    runs = f"{n_runs:,} run{'s' * (n_runs > 1)}"
    if n_runs > len(cells):
        runs += f" of {len(cells):,} cells, each the mean over its seeds"
    if n_runs == 1:
        yield "The only run of this group."
    else:
        yield f"It has the lowest {_order(group, best, cells)} of {runs}."
    yield from _against_baselines(group, best)
    if ties := [row for row in cells if row["tie"]]:
        shown = "; ".join(_difference(row, best, names) for row in ties[:3])
        more = f" and {len(ties) - 3} more" if len(ties) > 3 else ""
        what = "Held-out sequences or seeds do" if group.ordered_by else "The spread of the seeds does"
        yield f"{what} not tell it from {len(ties)} other{'s' * (len(ties) > 1)}: {shown}{more}."
    if sparser := _sparser(cells, number(best["l0"])):
        parts = [f"FVU {row['fvu']:.4f} at L0 {row['l0']:.1f} ({label(row, names)})" for row in sparser[:3]]
        yield f"More active latents explain more. The best with fewer: {'; '.join(parts)}."
    for note in group.notes:
        yield note[0].upper() + note[1:] + "."


def _against_baselines(group: Group, best: Row) -> Iterator[str]:
    """Whether the best is better than what others published, by each measure; and what looks wrong about theirs."""
    outside = {
        "dominates": "it is sparser than all of them and better than the sparsest",
        "dominated": "it has more active latents than all of them and is worse than the densest",
        "not comparable": "no verdict",
    }
    for standing in group.standings:
        name, words = standing.measure.name, standing.measure.words
        ratio, low, high, verdict = (best[f"{name}_{end}"] for end in ("ratio", "ratio_low", "ratio_high", "verdict"))
        if best[f"{name}_extrapolated"]:
            reach = " to ".join(dict.fromkeys(f"{l0:.1f}" for l0 in standing.l0_range))
            known = outside.get(verdict or "not comparable")
            yield f"The baselines' {words} was measured at other L0s ({reach}): {known}."
        elif ratio is not None:
            n = len(standing.sequences.get(best["cell_id"], ()))
            interval = "" if low is None else f" (95%: {low:.3f} to {high:.3f}, {n} held-out sequences)"
            yield f"At equal L0 its {words} is {ratio:.3f} times the baselines'{interval}: {verdict or 'no verdict'}."
    for row in group.measured:
        if row["remarks"]:
            yield f"Baseline {row['baseline']}: {row['remarks']}."


def _order(group: Group, best: Row, cells: list[Row]) -> str:
    """What the best is the lowest in."""
    standing = group.ordered_by
    if standing is None:
        return "FVU"
    if standing.guesses(best):
        return "FVU relative to the baselines', all of which were measured at other L0s and are extrapolated,"
    n_beyond = sum(standing.guesses(row) for row in cells)
    beyond = f" ({n_beyond} at an L0 the baselines do not reach left aside)" if n_beyond else ""
    return f"FVU, relative to the baselines' at its own L0{beyond},"


def _best(group: Group) -> Row | None:
    return next(iter(group.rows), None)


def _difference(row: Row, best: Row, names: Sequence[str]) -> str:
    """A cell by the options in which it differs from the best."""
    return label(row, [name for name in names if row[name] != best[name]] or names)


def _sparser(cells: Sequence[Row], l0: float) -> list[Row]:
    """Cells of the front with a lower L0, densest first, each with at most four fifths of the one before."""
    found = []
    for row in sorted((row for row in cells if row["pareto"]), key=lambda row: -number(row["l0"])):
        if number(row["l0"]) < 0.8 * l0:
            found.append(row)
            l0 = row["l0"]
    return found


def _plain(name: str, value: Any) -> str:
    if name in ("frac_latents_with_twin", "fvu"):
        name = "dead_fraction"  # a share
    return field(name, value).text


def _interval(row: Row, name: str) -> str:
    """The 95% interval of the mean, and what it rests on."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low is None or high is None:
        return ""
    n = row["n_seeds"]
    rests_on = f"{n} seeds" if n > 1 else "one seed: spread of other cells' seeds"
    return f"{_plain(name, max(low, 0.0))} to {_plain(name, high)} (95%, {rests_on})"
