"""Chooses the rendezvous port of a SLURM job on this node; used by the scripts in ``slurm/``. Imports no torch.

``python -m maestro_scale.cluster.port JOB_ID`` prints a port that nothing listens on. To be called where rank 0 runs.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

_FIRST, _COUNT = 10_000, 20_000  # Linux gives outgoing connections 32768 and above
_STEP = 211  # a prime: jobs with neighbouring ids do not try each other's ports next


def choose_port(job_id: int) -> int:
    """A free port that depends on the job, so that jobs that start together on a node choose different ones.

    Of two jobs whose ids differ by a multiple of the number of ports, the later one finds the first port in use.
    OSError if the first hundred candidates are all in use.
    """
    for attempt in range(100):
        port = _FIRST + (job_id + attempt * _STEP) % _COUNT
        with suppress(OSError):
            # As the store, for IPv6 and IPv4, and with a port whose last connections are still being closed.
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
            return port
    raise OSError(f"100 ports from {_FIRST} on are all in use: set MAESTRO_PORT to a free one")


def main(argv: list[str]) -> int:
    """The command line, see the module docstring."""
    try:
        print(choose_port(int(argv[0])))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
