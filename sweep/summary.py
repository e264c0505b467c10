"""A few lines of plain text on how good a transcoder is."""

from collections.abc import Mapping

__all__ = ["summary", "verdict"]

SHOWN = (
    "fvu",
    "fvu_per_dimension",
    "cosine",
    "l0",
    "l0_median",
    "dead_fraction",
    "absorption_score",
    "frac_latents_with_twin",
    "n_evaluated_tokens",
)


def verdict(metric: str, value: float | int) -> str:
    """A word for a value; empty for metrics that have no scale of their own."""
    match metric:
        case "fvu":
            return "excellent" if value < 0.1 else "moderate" if value <= 0.3 else "poor"
        case "dead_fraction":
            return "excellent" if value < 0.1 else "some waste" if value <= 0.3 else "poor"
        case "absorption_score":
            return "excellent" if value < 0.01 else "good" if value < 0.05 else "poor"
        case _:
            return ""


def summary(metrics: Mapping[str, float | int | None]) -> str:
    """Metric, value and verdict, one line each; undefined values are shown as n/a."""
    lines = [("metric", "value", "verdict")]
    for name in SHOWN:
        value = metrics[name]
        if value is None:
            lines.append((name, "n/a", ""))
        else:
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            lines.append((name, text, verdict(name, value)))
    width, value_width = (max(len(line[i]) for line in lines) for i in (0, 1))
    return "".join(f"{name:<{width}}  {text:>{value_width}}  {word}".rstrip() + "\n" for name, text, word in lines)
