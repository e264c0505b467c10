"""Entries of a sparse matrix against what torch says of the dense one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sweep.step.entries import (
    COLUMNS,
    Active,
    counted,
    entries,
    kth_largest,
    places,
    places_of_largest,
    products,
    sorting,
    sums_in_columns,
    weighted_sums,
)


@given(st.lists(st.booleans(), max_size=70))
def test_places_are_those_of_nonzero(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    assert torch.equal(places(mask), mask.nonzero().squeeze(1))


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40), st.data())
def test_the_kth_largest_is_that_of_topk(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    torch.testing.assert_close(torch.tensor(kth_largest(tensor, k)), tensor.topk(k).values[-1], equal_nan=True)


@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.floats(width=32), min_size=n, max_size=n), min_size=1)),
    st.data(),
)
def test_places_of_the_largest_are_some_that_hold_the_values_of_topk(
    rows: list[list[float]], data: st.DataObject
) -> None:
    values = torch.tensor(rows)
    k = data.draw(st.integers(1, values.shape[1]))
    found = places_of_largest(values, k)
    assert bool((found.diff(dim=1) > 0).all())
    largest = values.gather(1, found).topk(k, dim=1).values
    torch.testing.assert_close(largest, values.topk(k, dim=1).values, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.integers(0, 5), max_size=30))
def test_sorting_keeps_the_order_of_equals(values: list[int]) -> None:
    index = torch.tensor(values, dtype=torch.int64)
    assert torch.equal(sorting(index), index.argsort(stable=True))
    assert counted(index.sort().values, 6).diff().tolist() == [values.count(value) for value in range(6)]


def test_sums_and_products_are_those_of_the_dense_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(7, 12, generator=g, dtype=torch.float64).clamp_min(0)
    found = Active.join([entries(0, dense[:, :5], dense[:, :5] > 0), entries(5, dense[:, 5:], dense[:, 5:] > 0)])
    found = found.by_token()
    assert torch.equal(found.token * 12 + found.latent, dense.flatten().nonzero().squeeze(1))
    rows, others = torch.randn(12, 3, generator=g).double(), torch.randn(7, 3, generator=g).double()
    starts = counted(found.token, 7)
    torch.testing.assert_close(weighted_sums(rows, found.latent, starts[:-1], found.value), dense @ rows)
    torch.testing.assert_close(products(others, rows, starts, found.latent), (others @ rows.T)[dense > 0])


def test_sums_some_columns_at_a_time_are_the_sums() -> None:
    g = torch.Generator().manual_seed(0)
    rows, index = torch.randn(30, 2 * COLUMNS + 5, generator=g), torch.randint(30, (100,), generator=g)
    starts, weights = torch.tensor([0, 0, 7, 60]), torch.randn(100, generator=g)
    wanted = weighted_sums(rows, index, starts, weights)
    torch.testing.assert_close(sums_in_columns(rows, index, starts, weights), wanted)
