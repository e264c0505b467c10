"""The charts of a report as Vega-Lite, without data: the page puts in rows and what its reader chose.

Words in capitals that begin with `$` stand for a choice (an option, a metric) or a colour of the theme.
"""

from typing import Any

import altair as alt

from analysis.report.histograms import LOWEST

__all__ = ["CELL", "MEASURED", "PUBLISHED", "specs"]

CELL = "cell"
MEASURED = "baseline, same held-out rows"
PUBLISHED = "published, other text"

COLOUR = alt.Color("$COLOUR:N", title="$COLOUR", legend=alt.Legend(symbolLimit=12))
METRIC_AXIS = alt.Axis(title="$METRIC_TITLE", format="~g")
ROWS = alt.NamedData("rows")

Chart = Any
"""A chart of Altair, whose methods are typed only in part."""


def front() -> Chart:
    """FVU against L0: cells with their front, and other people's with theirs."""
    base = alt.Chart(ROWS).encode(
        x=alt.X("l0:Q", scale=alt.Scale(type="log", nice=False, padding=16), title="L0: active latents per token"),
        y=alt.Y("fvu:Q", scale=alt.Scale(zero=False, padding=12), title="FVU: variance left unexplained"),
        tooltip=[
            alt.Tooltip("name:N", title="cell"),
            alt.Tooltip("rank:Q", title="rank"),
            alt.Tooltip("fvu:Q", title="FVU", format=".4f"),
            alt.Tooltip("l0:Q", title="L0", format=".1f"),
            alt.Tooltip("n_seeds:Q", title="seeds"),
        ],
    )
    shape = alt.Shape(
        "kind:N",
        scale=alt.Scale(domain=[CELL, MEASURED, PUBLISHED], range=["circle", "diamond", "triangle-up"]),
        legend=None,
    )
    cells, others = alt.datum.kind == CELL, alt.datum.kind != CELL
    on_front = base.transform_filter(alt.datum.front)
    return alt.layer(
        on_front.transform_filter(others)
        .mark_line(strokeDash=[5, 4], strokeWidth=1.5, color="$MUTED")
        .encode(detail="kind:N", tooltip=alt.value(None)),
        on_front.transform_filter(cells)
        .mark_line(strokeWidth=1.5, color="$LINE", opacity=0.7)
        .encode(tooltip=alt.value(None)),
        base.transform_filter("isValid(datum.fvu_low)")
        .mark_rule(strokeWidth=1.5)
        .encode(y="fvu_low:Q", y2="fvu_high:Q", color=COLOUR, tooltip=alt.value(None)),
        base.transform_filter(others).mark_point(size=70, color="$MUTED", filled=True).encode(shape=shape),
        base.transform_filter(cells).mark_point(filled=True, opacity=0.9).encode(color=COLOUR, shape=shape),
        base.transform_filter(alt.datum.labelled)
        .mark_text(align="left", dx=8, dy=-8, color="$INK")
        .encode(text="rank:N", tooltip=alt.value(None)),
    )


def curves() -> Chart:
    """One line per cell over the steps."""
    return (
        alt.Chart(ROWS)
        .transform_flatten(["step", "value"])
        .mark_line()
        .encode(
            x=alt.X("step:Q", title="training step", scale=alt.Scale(nice=False), axis=alt.Axis(format=",d")),
            y=alt.Y("value:Q", scale=alt.Scale(zero=False), axis=METRIC_AXIS),
            color=COLOUR,
            detail="cell_id:N",
            tooltip=[alt.Tooltip("name:N", title="cell"), alt.Tooltip("cell_id:N", title="id")],
        )
    )


def effects() -> Chart:
    """The mean change of a metric for each step of each option, with its interval."""
    axis = alt.Axis(labelLimit=260, grid=True, ticks=False, domain=False)
    base = alt.Chart(ROWS).encode(
        y=alt.Y("step:N", sort=alt.EncodingSortField("order", op="min"), title=None, axis=axis),
        tooltip=[
            alt.Tooltip("step:N", title="option"),
            alt.Tooltip("change:Q", title="change", format="+.4g"),
            alt.Tooltip("low:Q", title="95% from", format="+.4g"),
            alt.Tooltip("high:Q", title="95% to", format="+.4g"),
            alt.Tooltip("n_pairs:Q", title="pairs"),
        ],
    )
    zero = alt.Chart(ROWS).transform_calculate(zero="0").mark_rule(color="$MUTED", strokeWidth=1).encode(x="zero:Q")
    axis = alt.Axis(title="change of $METRIC_TITLE", format="+~g")
    return alt.layer(
        zero,
        base.mark_rule(strokeWidth=2, color="$LINE").encode(x=alt.X("low:Q", axis=axis), x2="high:Q"),
        base.mark_point(size=80, opacity=1, stroke="$LINE", strokeWidth=2).encode(
            x=alt.X("change:Q", axis=axis),
            fill=alt.condition(alt.datum.sure, alt.value("$LINE"), alt.value("$PAGE")),
        ),
    )


def heat() -> Chart:
    """The mean of a metric over the runs of each pair of values of two options."""
    base = (
        alt.Chart(ROWS)
        .transform_filter("isValid(datum['$METRIC'])")
        .transform_aggregate(mean="mean($METRIC)", n="count()", groupby=["$X", "$Y"])
        .transform_joinaggregate(least="min(mean)", most="max(mean)")
        .transform_calculate(
            part="datum.most > datum.least ? (datum.mean - datum.least) / (datum.most - datum.least) : 0",
            runs="datum.n + (datum.n == 1 ? ' run' : ' runs')",
        )
        .encode(
            x=alt.X("$X:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("$Y:O"),
            tooltip=[
                alt.Tooltip("$Y:N"),
                alt.Tooltip("$X:N"),
                alt.Tooltip("mean:Q", title="$METRIC_TITLE", format=".5~g"),
                alt.Tooltip("n:Q", title="runs"),
            ],
        )
    )
    ink = alt.condition("datum.part > 0.55", alt.value("$INK_HIGH"), alt.value("$INK_LOW"))
    return alt.layer(
        base.mark_rect(cornerRadius=3, stroke="$PAGE", strokeWidth=2).encode(
            color=alt.Color("mean:Q", title="$METRIC_TITLE", scale=alt.Scale(zero=False))
        ),
        base.mark_text(dy=-6, fontSize=13).encode(text=alt.Text("mean:Q", format=".4~g"), color=ink),
        base.mark_text(dy=10, fontSize=11).encode(text="runs:N", color=ink),
    )


def histogram(x: alt.X) -> Chart:
    """The outline of one histogram per cell; the records hold `low`, `high` and `share` of its bins."""
    return (
        alt.Chart(ROWS)
        .transform_flatten(["low", "share"])
        .mark_line(interpolate="step-after")
        .encode(
            x=x,
            y=alt.Y("share:Q", axis=alt.Axis(title="share of the latents", format="~%")),
            color=COLOUR,
            detail="cell_id:N",
            tooltip=[alt.Tooltip("name:N", title="cell"), alt.Tooltip("cell_id:N", title="id")],
        )
    )


def density() -> Chart:
    title = "density: share of held-out tokens it fires on"
    axis = alt.Axis(title=title, values=[10.0**power for power in range(LOWEST, 1)], format="~g")
    return histogram(alt.X("low:Q", scale=alt.Scale(type="log", nice=False), axis=axis))


def cosine() -> Chart:
    axis = alt.Axis(title="cosine with the most similar decoder row", format="~g")
    return histogram(alt.X("low:Q", scale=alt.Scale(zero=False, nice=False), axis=axis))


def _spec(chart: Chart, height: int | None) -> dict[str, Any]:
    sized = chart.properties(width="container", description="$DESCRIPTION")
    if height:
        sized = sized.properties(height=height)
    spec: dict[str, Any] = sized.to_dict()
    spec.pop("config", None)  # the theme of the page
    spec.pop("datasets", None)
    return {**spec, "autosize": {"type": "fit-x", "contains": "padding"}}


def specs() -> dict[str, dict[str, Any]]:
    """Vega-Lite of each chart, by its name in the page."""
    steps = _spec(effects(), None) | {"height": {"step": 28}}
    cells = _spec(heat(), None) | {"height": {"step": 52}}
    lines = {"front": front(), "curves": curves(), "density": density(), "cosine": cosine()}
    return {**{name: _spec(chart, 340) for name, chart in lines.items()}, "effects": steps, "heat": cells}
