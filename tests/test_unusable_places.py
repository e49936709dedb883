"""A folder that cannot be written gives one line, in every command."""

import sys

import pytest

from maestro_scale import cli
from maestro_scale.evaluation.results import EvalResult

RESULT = EvalResult("treesatai_ts", "wf1", "knn", 0.5, {"Abies": 0.25}, (0.4, 0.6), 9)


@pytest.mark.parametrize(
    "words", [("synth", "treesatai_ts", "{file}/raw"), ("report", "{results}", "--out={file}/r.html")]
)
def test_one_line_and_no_traceback(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").touch()
    RESULT.write(tmp_path / "results" / "results.json")
    places = {"file": tmp_path / "file", "results": tmp_path / "results"}
    monkeypatch.setattr(sys, "argv", ["maestro-scale", *(w.format(**places) for w in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith(f"error: {tmp_path / 'file'}")
    assert message.endswith("use another path, or fix its permissions and free space\n")
    assert message.count("\n") == 1
