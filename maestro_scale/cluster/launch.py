"""Launcher of an srun task: sets rank and network variables from SLURM's, then executes the program.

``srun … python -m maestro_scale.cluster.launch train.py --recipe …`` (or ``-m module …``). SLURM's ranks replace a RANK
that was inherited from the submitting shell; network interfaces that are already set are kept.
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
    """The environment variables to set.

    Reads ``MAESTRO_NODES``, the nodes of the job, and ``MAESTRO_IFNAME``, the network interface to use.
    """
    added = {name: env[slurm] for name, slurm in _FROM_SLURM.items() if slurm in env}
    interface = env.get("MAESTRO_IFNAME") or _route_interface(env, find_interface)
    if interface:
        added.update({name: interface for name in _SOCKETS if name not in env})
    return added


def _route_interface(env: Mapping[str, str], find: Callable[[str], str | None]) -> str | None:
    # Without this, Gloo and NCCL resolve the own host name, which is often 127.0.1.1 and not reachable from other
    # nodes. The interface that routes to another node is reachable.

    nodes = env.get("MAESTRO_NODES", "").split()
    others = [n for n in nodes if n != env.get("SLURMD_NODENAME")]
    if not others:
        return "lo" if nodes else None
    return find(others[0])


def main() -> None:
    """Set the environment and replace this process by the program."""
    os.environ.update(task_environment(os.environ))
    # SIGUSR1 asks the trainer to save and stop. Its default action would kill a task that has not installed a handler
    # yet. Ignoring is safe: pretrain_multinode.sh repeats the signal until the tasks exit.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
