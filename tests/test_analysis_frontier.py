"""The frontier and a cell's place on it: closed forms, an independent reference, and what may not change a verdict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.frontier import Array, Placement, Sums, counts, frontier, interpolate, place, tied

TOKENS = 10.0


def sums(l0: list[float], loss: list[float], noise: Array | None = None) -> Sums:
    """Transcoders with these means on 40 sequences of TOKENS tokens; `noise` [n, 40] multiplies the losses."""
    shape = (len(l0), 40)
    losses = np.broadcast_to(np.array(loss)[:, None], shape) * (1 if noise is None else noise)
    return Sums(losses, np.broadcast_to(np.array(l0)[:, None] * TOKENS, shape), np.full(40, TOKENS))


def scatter(n: int, size: float, seed: int = 0) -> Array:
    return np.exp(size * np.random.default_rng(seed).normal(size=(n, 40)))


def alone(cell: tuple[float, float], edge: Sums, noise: Array | None = None) -> Placement:
    (placement,) = place(sums([cell[0]], [cell[1]], noise), edge).placements
    return placement


POWER_LAW = sums([8, 16, 64, 256], [2 * l0**-0.5 for l0 in (8, 16, 64, 256)])


@given(st.floats(4, 512), st.floats(0.1, 10))
@settings(max_examples=30)
def test_a_power_law_is_its_own_interpolation(l0: float, factor: float) -> None:
    at = alone((l0, factor * 2 * l0**-0.5), POWER_LAW)
    assert at.ratio == pytest.approx(factor)
    assert at.extrapolated == (not 8 <= l0 <= 256)
    matched = l0 / factor**2
    if 8 * 1.001 < matched < 256 / 1.001:
        assert at.matched_l0 == pytest.approx(matched)
    elif not 8 / 1.001 < matched < 256 * 1.001:
        assert at.matched_l0 is None


def test_on_the_frontier_the_ratio_is_one_and_a_tie() -> None:
    noise = scatter(4, 0.3)
    edge = sums([8, 16, 64, 256], [0.8, 0.5, 0.3, 0.2], noise)
    for i, l0 in enumerate((8.0, 16.0, 64.0, 256.0)):
        at = alone((l0, (0.8, 0.5, 0.3, 0.2)[i]), edge, noise[i : i + 1])
        assert (at.ratio, at.low, at.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
        assert at.matched_l0 == pytest.approx(l0)
        assert (at.extrapolated, at.verdict) == (False, "tie")


def test_what_is_hard_for_all_cancels() -> None:
    noise = scatter(1, 2.0)
    at = alone((16, 0.4), sums([8, 64], [1.0, 0.25], noise), noise)
    assert at.low == pytest.approx(at.ratio)
    assert at.high == pytest.approx(at.ratio)
    assert at.verdict == "better"


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        ((16, 0.4), "better"),
        ((16, 0.5), "tie"),
        ((16, 0.6), "worse"),
        ((4, 0.5), "dominates"),  # sparser than all and better than the sparsest
        ((4, 1.3), "not comparable"),
        ((128, 0.5), "dominated"),
        ((128, 0.1), "not comparable"),
    ],
)
def test_verdicts(cell: tuple[float, float], verdict: str) -> None:
    edge = sums([8, 64], [1 / 2**0.5, 0.25], scatter(2, 0.1))
    assert alone(cell, edge, scatter(1, 0.1, seed=1)).verdict == verdict


def test_one_baseline_is_no_frontier_but_can_be_dominated() -> None:
    edge = sums([16], [0.5], scatter(1, 0.1))
    found = [alone(cell, edge) for cell in ((8, 0.4), (8, 0.6), (32, 0.6), (32, 0.4), (16, 0.5))]
    assert [at.verdict for at in found] == ["dominates", "not comparable", "dominated", "not comparable", "tie"]
    assert [at.ratio is None for at in found] == [True] * 4 + [False]


def test_totals_alone_give_a_ratio_without_interval_or_verdict() -> None:
    one = np.ones(1)
    edge = Sums(np.array([[0.8], [0.2]]), np.array([[4.0], [64.0]]), one)
    (at,) = place(Sums(np.array([[0.2]]), np.array([[16.0]]), one), edge).placements
    assert at.ratio == pytest.approx(0.5)
    assert (at.low, at.high, at.verdict) == (None, None, None)


def test_what_has_no_logarithm_has_no_ratio() -> None:
    edge = sums([0, 8, 16], [1.0, 0.5, 0.0])
    assert frontier(np.array([0.0, 8, 16, 32]), np.array([1.0, 0.5, 0, -1])).tolist() == [1, 2]
    assert alone((0, 1.0), edge).ratio is None
    assert alone((8, -0.1), edge) == Placement(None, None, None, None, False, None)
    with pytest.raises(ValueError, match="above zero"):
        place(edge, sums([0], [1.0]))


@pytest.mark.parametrize(("n_negative", "has_interval"), [(1, True), (4, False)])
def test_a_few_draws_without_a_logarithm_widen_the_interval_and_many_leave_none(
    n_negative: int, has_interval: bool
) -> None:
    added = np.full((1, 8), 7.0)
    added[0, :n_negative] = -5.5  # cross-entropy that a prediction takes away
    of, l0 = np.ones((2, 8)) * np.array([[9.0], [5.0]]), np.ones((2, 8)) * np.array([[8.0], [32.0]])
    edge = Sums(of, l0, np.ones(8))
    cells = Sums(added, np.full((1, 8), 16.0), np.ones(8))
    draws = (counts(8, 1000) @ added.T)[1:, 0]
    assert 0 < (draws <= 0).mean() < 0.025 or not has_interval
    (at,) = place(cells, edge).placements
    assert at.ratio is not None
    assert (at.low is not None) == (at.verdict is not None) == has_interval


def test_place_is_the_naive_bootstrap() -> None:
    rng = np.random.default_rng(3)
    cells = Sums(rng.gamma(2, size=(5, 12)), rng.integers(20, 600, (5, 12)) * 1.0, rng.integers(5, 9, 12) * 1.0)
    l0, loss = np.array([[40.0], [90], [300]]), np.array([[3.0], [2], [1]])
    edge = Sums(loss * rng.gamma(20, size=(3, 12)), l0 * rng.uniform(0.9, 1.1, (3, 12)), cells.n_tokens)

    def log_ratio(i: int, drawn: Array) -> float:
        def point(of: Sums, j: int) -> tuple[float, float]:
            tokens = sum(c * n for c, n in zip(drawn, of.n_tokens, strict=True))
            l0, loss = (sum(c * v for c, v in zip(drawn, values[j], strict=True)) for values in (of.l0, of.loss))
            return float(np.log(l0 / tokens)), float(np.log(loss))

        xs, ys = zip(*(point(edge, j) for j in range(3)), strict=True)
        x, y = point(cells, i)
        k = 0 if x <= xs[1] else 1
        return y - (ys[k] + (ys[k + 1] - ys[k]) * (x - xs[k]) / (xs[k + 1] - xs[k]))

    draws = counts(12, 50)
    placed = place(cells, edge, n_resamples=50)
    for i, at in enumerate(placed.placements):
        log_ratios = np.array([log_ratio(i, drawn) for drawn in draws])
        stretched = log_ratios[0] + (log_ratios[1:] - log_ratios[0]) * (12 / 11) ** 0.5 * 2.2010 / 1.959964
        assert at.ratio == pytest.approx(np.exp(log_ratios[0]))
        assert placed.log_ratios[:, i] == pytest.approx(stretched)
        assert (at.low, at.high) == pytest.approx(tuple(np.exp(np.quantile(stretched, [0.025, 0.975]))))


def test_other_cells_change_nothing() -> None:
    cells = sums([10, 20, 40], [0.9, 0.6, 0.3], scatter(3, 0.2))
    edge = sums([8, 64], [1.0, 0.25], scatter(2, 0.2, seed=5))
    for i, at in enumerate(place(cells, edge).placements):
        (by_itself,) = place(cells.part(slice(i, i + 1)), edge).placements
        assert by_itself.verdict == at.verdict
        assert (by_itself.ratio, by_itself.low, by_itself.high) == pytest.approx((at.ratio, at.low, at.high))


@pytest.mark.parametrize("n_sequences", [2, 3, 8, 60])
def test_the_interval_holds_the_truth_as_often_as_it_says(n_sequences: int) -> None:
    rng = np.random.default_rng(0)
    n_trials, held = 200, 0
    for _ in range(n_trials):
        noise = rng.gamma(4, 1 / 4, size=(3, n_sequences))  # of mean 1
        values = np.array([1.0, 0.25, 0.5])[:, None] * noise
        l0 = np.array([8.0, 128, 32])[:, None] * np.ones((3, n_sequences))
        of = [Sums(values[part], l0[part], np.ones(n_sequences)) for part in (slice(2, 3), slice(0, 2))]
        (at,) = place(*of, n_resamples=300).placements
        assert at.low is not None
        assert at.high is not None
        held += at.low <= 0.5 / (0.25 ** (1 / 2)) <= at.high
    assert 0.90 <= held / n_trials <= 0.98


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=10))
def test_the_frontier_is_its_definition(points: list[tuple[int, int]]) -> None:
    l0, loss = np.array(points, dtype=float).reshape(-1, 2).T
    chosen = frontier(l0, loss).tolist()
    active = {p for p in points if p[0] > 0}
    beaten = {p for p in active for q in active if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert [points[i] for i in chosen] == sorted(active - beaten)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6, unique=True), st.floats(-4, 4))
def test_interpolation_is_numpys_inside(xs: list[float], x: float) -> None:
    line = np.sort(np.array(xs))
    ys = np.sin(line)
    (found,) = interpolate(line[None], ys[None], np.array([[x]]))[0]
    if line[0] <= x <= line[-1]:
        assert found == pytest.approx(np.interp(x, line, ys))
    elif np.diff(line).min() > 1e-3:
        i = 0 if x < line[0] else len(line) - 2
        slope = (ys[i + 1] - ys[i]) / (line[i + 1] - line[i])
        assert found == pytest.approx(ys[i] + slope * (x - line[i]))


def test_counts_draw_as_many_as_there_are() -> None:
    drawn = counts(7, 20)
    assert (drawn[0] == 1).all()
    assert (drawn.sum(1) == 7).all()
    assert len({tuple(line) for line in drawn}) > 15


def test_tied_asks_whether_the_difference_can_be_zero() -> None:
    spread = np.linspace(-1, 1, 101)
    assert tied(spread, spread + 0.1) is False  # paired: always the lower one
    assert tied(spread, spread[::-1]) is True
    assert tied(spread[:0], spread[:0]) is None
    assert tied(spread, spread[:0]) is None
