"""The simulated device needs a version of torch in which a device can be registered from Python."""

import pytest
from torch.utils import backend_registration


@pytest.fixture(scope="session", autouse=True)
def registration():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device from Python: install a newer one")
