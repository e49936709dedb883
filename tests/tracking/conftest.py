"""What the tests of tracking share."""

import logging

import pytest


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's, held by our own logger: MLflow, when it creates a store, may replace the handlers of the root."""
    logger = logging.getLogger("maestro_scale")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    return caplog
