"""The valley of ``testkit.valley``, with a trained model."""

from __future__ import annotations

import pytest
from testkit.valley import Valley, make_valley

from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.maestro import Maestro


@pytest.fixture(scope="session")
def valley(tmp_path_factory) -> Valley:
    return make_valley(tmp_path_factory.mktemp("valley"))


@pytest.fixture(scope="session")
def model(valley) -> Maestro:
    return load_model(valley.model)
