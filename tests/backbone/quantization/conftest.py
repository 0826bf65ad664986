"""What the tests of quantised weights share."""

import pytest
from shared.quantisers import KINDS, PACKAGES


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind whose package is there."""
    if (package := PACKAGES.get(request.param)) is not None:
        pytest.importorskip(package)
    return request.param
