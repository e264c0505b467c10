"""Whether metrics are those expected."""

import math

import pytest

from sweep.metrics import Metrics

__all__ = ["assert_close"]


def assert_close(result: Metrics, expected: Metrics, rel: float) -> None:
    """Equal to a relative tolerance; None equals only None."""
    numbers = [{k: math.nan if v is None else v for k, v in values.items()} for values in (result, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=rel, nan_ok=True)
