"""Two hosts that reach each other by ssh: network namespaces of this machine, each with a host name and an sshd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAMES = ("maestro-ssh1", "maestro-ssh2")
ADDRESSES = ("10.78.0.11", "10.78.0.12")
_BRIDGE = "maestro-ssh"  # interfaces have at most 15 characters
_SSHD = Path("/usr/sbin/sshd")
_NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", "pdsh")
_CLIENT = """
Host *
  IdentityFile /etc/ssh/key
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SERVER = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""


def why_not() -> str | None:
    """Why the hosts cannot be started on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if not _SSHD.exists():
        missing.append("sshd")
    if missing:
        return f"no {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else None


def on(host: str, command: Sequence[str]) -> list[str]:
    """``command`` on a host: with its network, name, ``/etc/hosts`` and ``/etc/ssh``."""
    return [
        "ip",
        "netns",
        "exec",
        host,
        "unshare",
        "--uts",
        "sh",
        "-c",
        f'hostname {host}; exec "$@"',
        "sh",
        *command,
    ]


@contextmanager
def hosts(folder: Path) -> Iterator[tuple[str, ...]]:
    """The names of the hosts, which exist within this context. ``folder``: for a new key."""
    _down()  # of a test that was killed
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    try:
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "link", "set", _BRIDGE, "up")
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            _up(number, name, address, key)
        yield NAMES
    finally:
        _down()


def _up(number: int, name: str, address: str, key: Path) -> None:
    # `ip netns exec` mounts each entry of this folder over the entry of the same name in /etc.
    etc = _etc(name)
    (etc / "ssh").mkdir(parents=True)
    lines = (f"{a} {n}\n" for n, a in zip(NAMES, ADDRESSES, strict=True))
    (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (etc / "ssh" / "ssh_config").write_text(_CLIENT)
    (etc / "ssh" / "sshd_config").write_text(_SERVER)
    shutil.copy(key, etc / "ssh" / "key")  # with its mode: ssh refuses a key that others can read
    shutil.copy(key.with_suffix(".pub"), etc / "ssh" / "authorized_keys")
    link = f"{_BRIDGE}-{number}"
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", link, "master", _BRIDGE, "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _run("ip", "-n", name, "link", "set", device, "up")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd does not start without it
    _run(*on(name, [str(_SSHD)]))


def _down() -> None:
    existing = _run("ip", "netns", "list", check=False).split()
    for number, name in enumerate(NAMES):
        if name in existing:
            for pid in _run("ip", "netns", "pids", name, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", name, check=False)
        _run("ip", "link", "del", f"{_BRIDGE}-{number}", check=False)
        shutil.rmtree(_etc(name), ignore_errors=True)
    _run("ip", "link", "del", _BRIDGE, check=False)


def _etc(name: str) -> Path:
    return Path("/etc/netns") / name


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
