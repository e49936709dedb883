"""Export of a checkpoint whose marker says something else than this project writes: one line, nothing is written."""

from __future__ import annotations

import pytest

from maestro_scale.errors import MaestroError
from maestro_scale.interop.export import export_model
from maestro_scale.training.checkpoint import commit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no position"),
        ({"position": 3}, "position is 3, expected an object"),
        ({"position": {}, "identity": 3}, "has no identity.seed"),
        ({"position": {}, "identity": {"seed": 0, "model": {}}}, "describes no model .*sensors: is missing"),
    ],
)
def test_a_marker_of_others(tmp_path, content, message):
    commit.commit(tmp_path, content, {})
    with pytest.raises(MaestroError, match=rf"COMMIT\.json:? {message}"):
        export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
