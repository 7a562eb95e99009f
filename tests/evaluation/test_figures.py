"""Charts: what their axes show."""

import math

import pytest
from matplotlib.figure import Figure

from vidsim.evaluation import figures


def axes_of(lines: dict, top: float | None = None):
    axes = Figure().add_subplot()
    figures._draw(axes, figures.Chart("", "", lines, top))
    return axes


def test_what_spans_much_is_logarithmic():
    near, far = axes_of({"a": {1: 0.5, 2: 1.0}}), axes_of({"a": {1: 0.5, 8: 2.0}})
    assert (near.get_xscale(), near.get_yscale()) == ("linear", "linear")
    assert (far.get_xscale(), far.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("diverged", [50.0, 1e4, math.nan, math.inf])
def test_what_diverged_does_not_flatten_what_did_not(diverged):
    lines = {"fine": {1: 0.9, 2: 0.6, 3: 0.5}, "diverged": {1: 0.8, 2: diverged, 3: 0.7}}
    low, high = axes_of(lines, top=1.3).get_ylim()
    assert 0.4 < low < 0.5 and 0.9 < high <= 1.3


@pytest.mark.parametrize("values", [(0.9, 0.6), (2.0, 3.0), (math.nan, math.nan)])
def test_nothing_is_cut_where_all_is_below_or_all_diverged(values):
    lines = {"one": dict(enumerate(values, 1))}
    assert axes_of(lines, top=1.3).get_ylim() == axes_of(lines).get_ylim()
