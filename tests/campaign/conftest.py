import pytest
from seed_files import make


@pytest.fixture(scope="session")
def seeds(tmp_path_factory):
    """A folder with one valid file of each kind."""
    return make(tmp_path_factory.mktemp("seeds"))
