"""Health check of the nodes of a job, one task per node: local checks, TCP to all other nodes, an all-reduce.

Each task writes ``REPORTS/<node>.json`` to a shared disk; ``verdict.py`` reads them. A node that hangs or crashes
leaves no report, or one with ``finished`` false.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.cluster import checks


@dataclass
class NodeReport:
    """The report of one node.

    ``port``: where it accepts TCP connections; ``problems``: of its local checks; ``unreachable``: nodes it could not
    connect to; ``collective``: error of the all-reduce, empty if it succeeded.
    """

    node: str
    port: int
    problems: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    collective: str = ""
    all_reduce_ms: float | None = None
    finished: bool = False

    def write(self, folder: Path) -> None:
        """Replace this node's report atomically: other nodes read it at any time."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{self.node}.json"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / f"{self.node}.json")


def read_reports(folder: Path) -> dict[str, NodeReport]:
    """The reports written so far, by node."""
    reports = (
        untrusted.from_builtins(NodeReport, untrusted.read_json(p)) for p in sorted(folder.glob("[!.]*.json"))
    )
    return {r.node: r for r in reports}


def local_problems(recipe_path: str, overrides: list[str], run_dir: Path) -> list[str]:
    """Problems of this node alone, without the network between nodes."""
    from maestro_scale.recipe import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    min_gib = float(os.environ.get("MAESTRO_MIN_FREE_GIB", 1))
    mixture = recipe.data.mixture
    return [
        *checks.gpu_problems(int(os.environ.get("MAESTRO_GPUS_PER_NODE", 0))),
        *checks.memory_problems(),
        *checks.disk_problems(Path(recipe.data.cache_dir).expanduser(), min_gib, "cache"),
        *checks.disk_problems(run_dir, min_gib, "run directory"),
        *checks.data_problems([e.shards for e in mixture], [e.split for e in mixture]),
    ]


def find_unreachable(others: dict[str, int], timeout_s: float) -> list[str]:
    """Those of the nodes {name: port} that do not accept a TCP connection."""
    failed = []
    for node, port in others.items():
        try:
            socket.create_connection((node, port), timeout=timeout_s).close()
        except OSError:
            failed.append(node)
    return failed


def all_reduce_ms(rank: int, size: int, timeout_s: float) -> float:
    """Milliseconds of an all-reduce of 4 MiB over one task per node, with the trainer's backend.

    Raises RuntimeError if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        vector = torch.full((2**20,), float(rank), device="cuda:0" if cuda else "cpu")
        dist.all_reduce(vector.clone())  # not timed: the first collective opens the connections
        start_s = time.perf_counter()
        dist.all_reduce(vector)
        total = float(vector[-1])  # waits for the device
        elapsed_s = time.perf_counter() - start_s
    finally:
        dist.destroy_process_group()
    if total != size * (size - 1) / 2:
        raise RuntimeError(f"the sum of all ranks is {total}")
    return 1e3 * elapsed_s


def _listen() -> socket.socket:
    """A socket on a free port that accepts and closes connections on a background thread."""
    both = socket.has_dualstack_ipv6()  # nodes may reach each other by IPv6 alone
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=256, dualstack_ipv6=both)

    def accept_connections() -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=accept_connections, daemon=True).start()
    return server


def _wait_for(
    folder: Path, nodes: list[str], ready: Callable[[NodeReport], bool], timeout_s: float
) -> dict[str, NodeReport]:
    """Poll until the reports of all nodes are ``ready``, or the timeout; returns the reports there are."""
    deadline = time.monotonic() + timeout_s
    while True:
        reports = read_reports(folder)
        if all(n in reports and ready(reports[n]) for n in nodes) or time.monotonic() > deadline:
            return reports
        time.sleep(0.1)


def check_network(report: NodeReport, folder: Path, nodes: list[str], timeout_s: float) -> None:
    """Test TCP to each other node, then the all-reduce; fills in the report.

    The all-reduce runs only if no node has a problem: it would wait for a bad node until its timeout.
    """
    others = [n for n in nodes if n != report.node]
    report.write(folder)
    # A third of the time each for: reports of all nodes, TCP connections, all-reduce.
    known = _wait_for(folder, nodes, lambda r: True, timeout_s / 3)
    report.unreachable = find_unreachable({n: known[n].port for n in others if n in known}, 5.0)
    if report.unreachable or len(known) < len(nodes) or any(r.problems for r in known.values()):
        return
    rank = int(os.environ.get("RANK", 0))  # set by cluster/launch.py; one task per node
    try:
        report.all_reduce_ms = all_reduce_ms(rank, len(nodes), timeout_s / 3)
    except (RuntimeError, OSError) as error:
        report.collective = str(error).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0 once the report is written."""
    from maestro_scale.recipe import RecipeError

    parser = argparse.ArgumentParser(prog="health", allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--timeout_s", type=float, default=180)
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[])
    args, _ = parser.parse_known_args(argv)  # other arguments are the trainer's
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    nodes = os.environ.get("MAESTRO_NODES", node).split()
    server = _listen()
    report = NodeReport(node, server.getsockname()[1])
    try:
        report.problems = local_problems(args.recipe, args.overrides, args.reports)
    except RecipeError as error:
        report.problems = [f"recipe: {error}"]
    check_network(report, args.reports, nodes, args.timeout_s)
    report.finished = True
    report.write(args.reports)
    # Keep accepting connections until the other nodes have finished their tests.
    _wait_for(args.reports, nodes, lambda r: r.finished, 10.0)
    server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
