"""What a task of srun does before it becomes its program: ranks and network from SLURM's own variables.

``srun … python -m maestro_scale.cluster.launch train.py --recipe …`` (or ``-m module …``). Ranks are srun's, whatever
RANK came along from the shell that submitted; interfaces that are named already stay.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping

from maestro_scale.cluster.network import interface_to

_FROM_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def task_environment(
    env: Mapping[str, str], find_interface: Callable[[str], str | None] = interface_to
) -> dict[str, str]:
    """The variables to add. ``MAESTRO_NODES`` lists the nodes of the job, ``MAESTRO_IFNAME`` names the interface."""
    added = {name: env[slurm] for name, slurm in _FROM_SLURM.items() if slurm in env}
    interface = env.get("MAESTRO_IFNAME") or _interface(env, find_interface)
    if interface:
        added.update({name: interface for name in _SOCKETS if name not in env})
    return added


def _interface(env: Mapping[str, str], find: Callable[[str], str | None]) -> str | None:
    # The host's own name often leads to 127.0.1.1, which no other node can reach: ask for the way to another node.
    nodes = env.get("MAESTRO_NODES", "").split()
    others = [n for n in nodes if n != env.get("SLURMD_NODENAME")]
    if not others:
        return "lo" if nodes else None
    return find(others[0])


def main() -> None:
    """Become the program."""
    os.environ.update(task_environment(os.environ))
    # Until the trainer listens, a request to stop must not kill it; the request is repeated.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
