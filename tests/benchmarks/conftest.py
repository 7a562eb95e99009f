"""Benchmarks are of the checkout alone: they are not installed."""

import pathlib

import pytest


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])
