"""The error handler of the entry points."""

import errno
import os
import subprocess
import sys

import pytest
from testkit.runs import REPO

from maestro_scale.entry import run_command
from maestro_scale.errors import MaestroError


def test_an_expected_error_is_one_line_and_exit_code_2(capsys):
    class Wrong(MaestroError):
        pass

    def fail():
        raise Wrong("x.yaml: what is wrong; what to do")

    assert run_command(fail) == 2
    assert capsys.readouterr() == ("", "error: x.yaml: what is wrong; what to do\n")


def test_a_file_that_cannot_be_used_is_named(capsys):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/out")

    assert run_command(fail) == 2
    assert capsys.readouterr().err.startswith("error: /data/out: No space left on device; ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        # As raised by file.write, pathlib, tempfile, pwd and getpass: none of them names a file.
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free space on "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded: free space on "),
        (RuntimeError("Could not determine home directory."), "user {uid} has no home folder or name "),
        (KeyError("getpwuid(): uid not found: 12345"), "user {uid} has no home folder or name "),
        (OSError("No username set in the environment"), "user {uid} has no home folder or name "),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"),
            "no temporary folder can be written: set TMPDIR",
        ),
    ],
)
def test_a_full_disk_and_a_missing_home_are_expected(capsys, error, line):
    def fail():
        raise error

    assert run_command(fail) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: " + line.format(uid=os.getuid()))
    assert message.count("\n") == 1


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("without a file")])
def test_a_bug_keeps_its_traceback(bug):
    def fail():
        raise bug

    with pytest.raises(type(bug)):
        run_command(fail)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_keeps_its_own_exit_code(returned, code):
    assert run_command(lambda: returned) == code


@pytest.mark.parametrize(
    "words",
    [
        ["maestro_scale/train.py", "--recipe", "missing.yaml"],
        ["maestro_scale/evaluate.py", "--recipe", "missing.yaml", "--checkpoint", "x", "--out", "y"],
        ["-m", "maestro_scale.cli", "plan", "--recipe", "missing.yaml", "--gpus", "8"],
    ],
)
def test_every_entry_point_reports_alike(words, tmp_path):
    words = [str(REPO / word) if word.endswith(".py") else word for word in words]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: missing.yaml: ")


def test_only_rank_0_of_an_evaluation_reports_a_wrong_recipe(tmp_path):
    words = [
        str(REPO / "maestro_scale" / "evaluate.py"),
        "--recipe=missing.yaml",
        "--checkpoint=x",
        "--out=y",
    ]
    env = {**os.environ, "RANK": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, "")
