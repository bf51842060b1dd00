"""Whatever is in a file that a command reads, it is used or refused in one line; `make fuzz` goes on for an hour."""

import shutil
from random import Random

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of every kind, as commands write them."""
    return fuzz.make_corpus(tmp_path_factory.mktemp("mutated") / "corpus")


@settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_changed_file_is_used_or_refused_in_a_line(corpus, kind, seed):
    here = corpus.parent / kind
    shutil.rmtree(here, ignore_errors=True)
    _, wrong = fuzz.attempt(kind, Random(seed), corpus, here)
    assert wrong is None, wrong
