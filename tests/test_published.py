"""Published baselines: the file is read whole, and only what is defined as ours is compared."""

import csv
from dataclasses import fields
from importlib.resources import files

import pytest

from sweep.baselines.published import Published, published, published_for


def test_published_has_the_columns_and_lines_of_its_file():
    text = files("sweep.baselines").joinpath("published.csv").read_text(encoding="utf-8")
    header, *lines = csv.reader(text.splitlines())
    assert header == [f.name for f in fields(Published)]
    assert len(published()) == len(lines) > 0
    assert [line.source for line in published()] == [line[header.index("source")] for line in lines]


def test_published_parses_numbers_and_flags():
    by_metric = {line.metric: line for line in published() if line.layer == 13}
    assert by_metric["explained_variance_saebench"].value == 0.637
    assert by_metric["explained_variance_saebench"].comparable is False
    assert by_metric["explained_variance_saebench"].l0 == 89.0
    assert all(line.source and line.value > 0 for line in published())


@pytest.mark.parametrize("hook_out", ["mlp_out", "blocks.18.hook_mlp_out"])
def test_published_for_finds_comparable_fvus_of_the_same_target(hook_out: str):
    found = published_for("gemma-2-2b", 18, hook_out)
    assert [line.value for line in found] == [0.3195, 0.3397]
    assert {(line.metric, line.comparable, line.model, line.layer) for line in found} == {
        ("fvu", True, "gemma-2-2b", 18)
    }


@pytest.mark.parametrize(
    ("model", "layer", "hook_out"),
    [
        ("gemma-3-270m", 18, "mlp_out"),
        ("gemma-2-2b", 17, "mlp_out"),  # only context numbers there
        ("gemma-2-2b", 18, "resid_mid"),
        ("gemma-2-2b", 18, "blocks.17.hook_mlp_out"),
    ],
)
def test_published_for_other_places_is_empty(model: str, layer: int, hook_out: str):
    assert published_for(model, layer, hook_out) == []
