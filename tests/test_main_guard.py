"""A script that starts processes at its top level gets one line, before any process is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BODY = {
    "shards.jobs": """
from maestro_scale.shards.jobs import run_jobs
print(sum(found for _, found in run_jobs(divmod, [(7, 2), (9, 2)], 2, None)))
""",
    "stream.workers": """
from maestro_scale.stream.workers import start_fork_server
start_fork_server([])
""",
}


@pytest.mark.parametrize("name", BODY)
def test_the_line_and_what_to_write_are_named(name, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(BODY[name])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert (
        f'{path}: line 3 starts processes, which import this script again: write `if __name__ == "__main__":`'
        in last
    )
    assert done.stderr.count("Error:") == 1  # of one process


@pytest.mark.parametrize(
    ("script", "is_refused"),
    [
        ("check()\n", True),
        ("def f():\n    check()\n\nf()\n", True),
        ("for _ in range(2):\n    check()\n", True),
        ("if __name__ == '__main__':\n    check()\n", False),
        ("def main():\n    check()\n\nif '__main__' == __name__ and True:\n    main()\n", False),
        ("if True:\n    check()\nif __name__ == '__main__':\n    pass\n", True),
        ("import threading\nt = threading.Thread(target=check)\nt.start()\nt.join()\n", False),
    ],
)
def test_only_calls_from_the_top_level_are_refused(script, is_refused, tmp_path, monkeypatch):
    import types

    from maestro_scale.main_guard import MainGuardError, check_main_guard

    path = tmp_path / "script.py"
    path.write_text(script)
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    refused = []

    def check() -> None:
        try:
            check_main_guard("workers=0")
        except MainGuardError as error:
            refused.append(str(error))

    main.check = check  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(compile(script, str(path), "exec"), vars(main))
    assert bool(refused) == is_refused
    assert all(line.endswith("or set workers=0") for line in refused)
