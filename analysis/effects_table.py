"""Effects as text: a table per group, one line for each step of an option."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from analysis.effects import Effect, Effects
from analysis.rows import compact
from analysis.show import as_table, as_text

__all__ = ["SHOWN", "effects_text"]

SHOWN = ("fvu", "fvu_per_dimension", "l0", "dead_fraction", "absorption_score")
HOW = (
    "change of the mean from the first value to the second, over pairs of runs equal in all other options and in seed",
    "steps, warmup_steps, min_lr and groups count as equal where they are the same fraction of what they follow",
    "±: 95% interval over the pairs (Student); none for a single pair. ! where it does not hold zero",
    "A change of FVU that comes with a change of L0 is not one at equal sparsity",
)


def effects_text(group: Effects, metrics: Sequence[str] = SHOWN) -> str:
    """One group for the terminal."""
    place = f"{group.key['model']} layer {group.key['layer']} target {group.key['hook_out']}"
    title = f"{place}: what each option did, held-out rows {compact(group.key['heldout_hash'] or '-')}"
    rows: list[list[Any]] = []
    for (option, here, there), same in groupby(group.effects, lambda e: (e.option, e.from_value, e.to_value)):
        by_metric = {effect.metric: effect for effect in same}
        n_pairs = max(effect.n_pairs for effect in by_metric.values())
        rows.append([option, here, there, n_pairs, *(_cell(by_metric.get(metric)) for metric in metrics)])
    below = [*(f"{name} varies, but no two runs differ in it alone" for name in group.unmatched), *group.notes]
    if not rows:
        return as_text(title, style="bold") + as_text("no option varies", *below, "")
    table = as_table(["option", "from", "to", "pairs", *metrics], rows)
    return as_text(title, style="bold") + table + as_text("", *below, *HOW, "")


def _cell(effect: Effect | None) -> str:
    if effect is None:
        return "-"
    text = f"{effect.change:+.3g}"
    if effect.low is None or effect.high is None:
        return text
    sure = "!" if effect.low > 0 or effect.high < 0 else ""
    return f"{text} ±{(effect.high - effect.low) / 2:.2g}{sure}"
