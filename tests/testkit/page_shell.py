"""The shell that runs the blocks of the pages: bash, with stand-ins for the programs of the project and a few others.

A stand-in hands its arguments, folder, environment and outputs to the test, which runs the program in a forked process
that has imported torch and DeepSpeed (``preloaded.py``), on one rank and with one worker, whatever the page says:
launchers and workers have tests of their own, and each start of Python would cost seconds. ``sbatch`` runs a script
with MAESTRO_CHECK=1, ``hf download`` copies the files of a prepared repository, ``…`` among the arguments of
evaluate.py stands for ``rest``.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testkit import preloaded
from testkit.page_blocks import ROOT

_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as test:
    test.connect({address!r})
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    message = json.dumps({{"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
    socket.send_fds(test, [len(message).to_bytes(4, "big") + message], [1, 2])
    code = int(test.makefile().readline())
os._exit(code if code >= 0 else 128 - code)
"""
# Processes of the loader import it again.
_COMMAND_LINE = "from maestro_scale.cli import main\nif __name__ == '__main__':\n    main()\n"
_STAND_INS = ("maestro-scale", "deepspeed", "torchrun", "evaluate.py", "train.py", "sbatch", "hf")
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Shell:
    """``folder``: where the blocks run; ``env``: more variables; ``rest``: words that … stands for; ``hub``:
    {repository: folder} for ``hf download``."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    rest: Sequence[str] = ()
    hub: Mapping[str, Path] = field(default_factory=dict)

    def run(self, text: str, timeout_s: float = 120) -> str:
        """Run a script; returns its output. Raises AssertionError if a command of it fails."""
        # Not below the folder of the test, whose long path would not fit into an address.
        with tempfile.TemporaryDirectory() as programs, socket.socket(socket.AF_UNIX) as listener:
            address = f"{programs}/socket"
            listener.bind(address)
            listener.listen()
            self._write(Path(programs), address)
            env = {k: v for k, v in self._base().items() if k not in _RANK} | {
                **self.env,
                "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            log = Path(programs, "log")
            with log.open("wb") as sink:
                # -u: a variable that a page does not set is an error.
                bash = subprocess.Popen(
                    ["bash", "-euo", "pipefail", "-c", text],
                    cwd=self.folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    start_new_session=True,
                )
                self._serve(listener, bash, time.monotonic() + timeout_s)
            output = log.read_text(errors="replace")
            assert bash.returncode == 0, f"{text}\n{output[-4000:]}"
            return output

    @staticmethod
    def _base() -> Mapping[str, str]:
        server = preloaded.server()
        return os.environ if server is None else server.env

    @staticmethod
    def _write(programs: Path, address: str) -> None:
        (programs / "command_line.py").write_text(_COMMAND_LINE)
        for name in _STAND_INS:
            (programs / name).write_text(_CLIENT.format(python=sys.executable, address=address))
            (programs / name).chmod(0o700)

    def _serve(self, listener: socket.socket, bash: subprocess.Popen, deadline: float) -> None:
        """Start what the stand-ins ask for, and answer with the exit codes, until bash has ended."""
        running: list[tuple[socket.socket, preloaded.ForkedProcess | subprocess.Popen]] = []
        programs = Path(listener.getsockname()).parent
        try:
            while bash.poll() is None:
                assert time.monotonic() < deadline, "a block of commands takes too long"
                if select.select([listener], [], [], 0.01)[0]:
                    client = listener.accept()[0]
                    running.append((client, self._start(client, programs)))
                for client, process in list(running):
                    if (code := process.poll()) is not None:
                        running.remove((client, process))
                        client.sendall(f"{code}\n".encode())
                        client.close()
        finally:
            for client, process in running:
                process.send_signal(9)
                client.close()
            if bash.poll() is None:
                bash.kill()
                bash.wait()

    def _start(self, client: socket.socket, programs: Path) -> preloaded.ForkedProcess | subprocess.Popen:
        data, outputs, _, _ = socket.recv_fds(client, 1 << 20, 2)
        while len(data) < 4 + int.from_bytes(data[:4], "big"):
            data += client.recv(1 << 20)
        request = json.loads(data[4:])
        cwd, env, (program, *words) = Path(request["cwd"]), request["env"], request["words"]
        try:
            if program == "hf":
                self._download(words, cwd)
                return subprocess.Popen(["true"])
            if program == "sbatch":
                command = ["bash", *_check(words)]
                env = {**env, "MAESTRO_CHECK": "1", "MAESTRO_HOME": str(ROOT)}
                return subprocess.Popen(command, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1])
            command = [sys.executable, *self._script(program, words, programs)]
            server = preloaded.server()
            if server is None:
                return subprocess.Popen(command, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1])
            return server.start(command, env, cwd, *outputs)
        finally:
            for output in outputs:
                os.close(output)

    def _script(self, program: str, words: list[str], programs: Path) -> list[str]:
        """The script of a command and its arguments, without a launcher and its options."""
        if program in ("deepspeed", "torchrun"):
            if "-m" in words:
                program, words = "maestro-scale", words[words.index("-m") + 2 :]
            else:
                (first, *_) = (i for i, word in enumerate(words) if word.endswith(".py"))
                program, words = Path(words[first]).name, words[first + 1 :]
        for option, few in (("--nproc", ()), ("--workers", ("--workers", "1"))):
            if option in words:
                at = words.index(option)
                words = [*words[:at], *few, *words[at + 2 :]]
        if "…" in words:
            at = words.index("…")
            words = [*words[:at], *self.rest, *words[at + 1 :]]
        if program == "maestro-scale":
            return [str(programs / "command_line.py"), *words]
        return [str(ROOT / "maestro_scale" / program), *words]

    def _download(self, words: list[str], cwd: Path) -> None:
        assert words[0] == "download", words
        target = cwd / words[words.index("--local-dir") + 1]
        shutil.copytree(self.hub[words[1]], target, dirs_exist_ok=True)


def _check(words: list[str]) -> list[str]:
    """The script that is submitted, of the checkout, and its arguments."""
    (first, *_) = (i for i, word in enumerate(words) if word.endswith(".sh"))
    return [str(ROOT / words[first]), *words[first + 1 :]]
