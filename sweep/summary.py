"""A few lines of plain text on how good a transcoder is: each metric with its value, target and verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SCALES", "Metrics", "Scale", "summary", "target", "verdict"]

Metrics = Mapping[str, float | int | None]

CAUSAL = ("ce_clean", "ce_spliced", "ce_recovered_zero", "ce_recovered_mean", "kl")
"""Shown where the language model ran with predictions in it."""

SHOWN = (
    "fvu",
    "fvu_per_dimension",
    "cosine",
    *CAUSAL,
    "l0",
    "l0_median",
    "dead_fraction",
    "absorption_score",
    "frac_latents_with_twin",
    "n_evaluated_tokens",
)


@dataclass(frozen=True)
class Scale:
    """Words for a metric of which less is better: excellent below `excellent`, poor above `poor`, else `between`."""

    excellent: float
    between: str
    poor: float
    poor_from: bool = False
    """Whether `poor` itself is poor already."""

    @property
    def target(self) -> str:
        return f"< {self.excellent:g}"

    def word(self, value: float) -> str:
        if value < self.excellent:
            return "excellent"
        return self.between if value < self.poor or (value == self.poor and not self.poor_from) else "poor"


SCALES = {
    "fvu": Scale(0.1, "moderate", 0.3),
    "dead_fraction": Scale(0.1, "some waste", 0.3),
    "absorption_score": Scale(0.01, "good", 0.05, poor_from=True),
}
"""The metrics that have a target. Rules of thumb, in words: docs/metrics.md, Verdicts."""


def target(metric: str) -> str:
    """Where an excellent value lies; empty for metrics that have no scale of their own."""
    return SCALES[metric].target if metric in SCALES else ""


def verdict(metric: str, value: float | int | None) -> str:
    """A word for a value; empty where it is undefined or the metric has no scale."""
    return SCALES[metric].word(value) if metric in SCALES and value is not None else ""


def summary(metrics: Metrics, against: Metrics | None = None) -> str:
    """Metric, value, target and verdict, one line each; with `against`, also its value and the change from it.

    Undefined values are shown as n/a; what nobody asked for is not shown.
    """
    titles = ("metric", "value", "target", "verdict", *(("against", "change") if against is not None else ()))
    lines = [titles]
    causal = metrics.get("n_causal_tokens") is not None
    for name in (name for name in SHOWN if causal or name not in CAUSAL):
        value = metrics[name]
        line = (name, shown(value), target(name), verdict(name, value))
        lines.append(line if against is None else (*line, shown(against[name]), change(value, against[name])))
    return aligned(lines, right=(1, 4))


def shown(value: float | int | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def change(value: float | int | None, before: float | int | None) -> str:
    """The difference, and what it is of the value before: `-0.0125 (-4.0%)`."""
    if value is None or before is None:
        return ""
    if value == before:
        return "none"
    difference = f"{value - before:+,}" if isinstance(value, int) else f"{value - before:+.4g}"
    return f"{difference} ({(value - before) / abs(before):+.1%})" if before else difference


def aligned(lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Lines of equal columns, two spaces apart; the columns in `right` end where the others begin."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )
