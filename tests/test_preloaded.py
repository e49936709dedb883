"""A forked process of the test kit behaves as ``python script`` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from testkit import preloaded

SCRIPT = """
import atexit, json, os, sys, threading, time
def wait():
    time.sleep(0.3)
    print("thread", flush=True)
atexit.register(lambda: print("atexit", flush=True))
threading.Thread(target=wait).start()
seen = [sys.argv[1:], os.getcwd(), os.environ["X"], __name__, sys.path[0], os.getsid(0) == os.getpid()]
print(json.dumps(seen), flush=True)
{end}
"""


@pytest.fixture
def server():
    found = preloaded.server()
    if found is None:
        pytest.skip(f"{preloaded.DISABLE}=0")
    return found


def run(server, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    command = [sys.executable, str(script), "a", "--b"]
    env = {**server.env, "X": "1"}
    found = []
    for own in (True, False):
        with (tmp_path / "out.txt").open("wb") as sink:
            process = (
                subprocess.Popen(
                    command, env=env, cwd=tmp_path, stdout=sink, stderr=sink, start_new_session=True
                )
                if own
                else server.start(command, env, tmp_path, sink.fileno())
            )
            found.append((process.wait(timeout=60), (tmp_path / "out.txt").read_text().splitlines()))
    own, forked = found
    assert own[0] == forked[0]
    return own[1], forked[1]


@pytest.mark.slow
def test_the_exit_code_is_not_that_of_an_earlier_process_with_the_same_number(server, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_exit_codes", dict.fromkeys(range(1, 4_194_304), 0))
    script = tmp_path / "script.py"
    script.write_text("import sys, time\ntime.sleep(1)\nsys.exit(3)\n")
    with (tmp_path / "out.txt").open("wb") as sink:
        process = server.start([sys.executable, str(script)], server.env, tmp_path, sink.fileno())
    assert process.poll() is None
    assert process.wait(timeout=60) == 3


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "sys.exit('message')", "os._exit(4)", "1 / 0"])
def test_output_and_exit_code(server, tmp_path, end):
    own, forked = run(server, tmp_path, end)
    assert json.loads(forked[0]) == [["a", "--b"], str(tmp_path), "1", "__main__", str(tmp_path), True]
    if end == "1 / 0":
        assert "ZeroDivisionError: division by zero" in forked
    else:
        assert own == forked


@pytest.mark.slow
def test_a_signal_is_the_exit_code(server, tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text("import time; time.sleep(60)")
    with (tmp_path / "out.txt").open("wb") as sink:
        process = server.start([sys.executable, str(script)], server.env, tmp_path, sink.fileno())
    assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_what_python_reads_at_its_start_needs_a_process_of_its_own():
    client = object.__new__(preloaded.Server)
    client.env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py"]
    assert client.suits(command, {**client.env, "ANYTHING": "1"})
    assert client.suits(command, {**client.env, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert not client.suits(command, {**client.env, "PYTHONPATH": os.pathsep.join([*sys.path, "/elsewhere"])})
    assert not client.suits(command, {**client.env, "LD_PRELOAD": "libfaketime.so"})
    assert not client.suits(command, {k: v for k, v in client.env.items() if k != "OMP_NUM_THREADS"})
    assert not client.suits([sys.executable, "-c", "pass"], client.env)
    assert not client.suits(["deepspeed", "train.py"], client.env)
