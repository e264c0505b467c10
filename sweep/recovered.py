"""What sums of cross-entropies say: means over tokens, and how much of the harm of an ablation is undone."""

from collections.abc import Mapping

__all__ = ["SUMS", "causal_metrics"]

SUMS = {
    "clean": "sum_ce_clean",
    "spliced": "sum_ce_spliced",
    "ablated_zero": "sum_ce_ablated_zero",
    "ablated_mean": "sum_ce_ablated_mean",
    "kl": "sum_kl",
}
"""What is added up over tokens, in nats, and its column in the table of sequences."""


def causal_metrics(n_tokens: int, sums: Mapping[str, float]) -> dict[str, float | int | None]:
    """The metrics of these sums over `n_tokens` tokens, by the names of SUMS; None where an ablation does no harm."""
    clean, spliced, zero, mean, kl = (sums[name] / n_tokens for name in SUMS)
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_ablated_zero": zero,
        "ce_ablated_mean": mean,
        "ce_recovered_zero": (zero - spliced) / (zero - clean) if zero > clean else None,
        "ce_recovered_mean": (mean - spliced) / (mean - clean) if mean > clean else None,
        "kl": kl,
        "n_causal_tokens": n_tokens,
    }
