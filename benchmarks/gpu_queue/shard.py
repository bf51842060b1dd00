"""A pytest plugin: `--shard I/N` runs the I-th of N parts of what is selected, neighbours together: they share kernels."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", default="0/1", help="the I-th, from 0, of N parts of the tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """The tests that are marked otherwise have been left out before: pytest's own plugins come first."""
    part, parts = map(int, config.getoption("shard").split("/"))
    kept = items[len(items) * part // parts : len(items) * (part + 1) // parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
