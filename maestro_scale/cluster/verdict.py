"""Decides from the reports of ``health.py`` which nodes of a job are bad. Imports no torch.

``python -m maestro_scale.cluster.verdict REPORTS NODE…``: exit code 0 if all nodes are good; 3 if some are bad, with
their names, comma-separated, on standard output; 2 if all are bad. Problems and advice are printed to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from maestro_scale.cluster.health import NodeReport, read_reports

ALL_GOOD, NO_GOOD_NODE, SOME_BAD = 0, 2, 3


def find_bad_nodes(nodes: list[str], reports: dict[str, NodeReport]) -> dict[str, str]:
    """{bad node: problem}.

    Three stages, most certain first: problems of a node itself, then nodes that most others cannot reach, then failed
    connections and collectives. A later stage is used only if the earlier ones found nothing, because a bad node also
    causes connection errors on good ones.
    """
    bad = {}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            bad[node] = "no report: no task started on it, it hangs, or it cannot write to the run directory"
        elif report.problems:
            bad[node] = "; ".join(report.problems)
    if bad:
        return bad
    for node in nodes:
        reported_by = [n for n in nodes if node in reports[n].unreachable]
        # A disconnected node reports all others as unreachable, but they report only that node: the majority decides.
        if 2 * len(reported_by) > len(nodes) - 1:
            bad[node] = (
                f"{', '.join(reported_by)} cannot reach it: check the network, firewall and MAESTRO_IFNAME"
            )
    if bad:
        return bad
    for node in nodes:
        report = reports[node]
        if report.unreachable:
            bad[node] = (
                f"cannot reach {', '.join(report.unreachable)}: check the network, firewall and MAESTRO_IFNAME"
            )
        elif report.collective or not report.finished:
            reason = report.collective or "timed out"
            bad[node] = f"all-reduce failed ({reason}): set MAESTRO_IFNAME, or NCCL_DEBUG=INFO for details"
    return bad


def main(argv: list[str]) -> int:
    """The command line, see the module docstring."""
    folder, nodes = Path(argv[0]), argv[1:]
    reports = read_reports(folder)
    bad = find_bad_nodes(nodes, reports)
    for node, reason in bad.items():
        print(f"bad node {node}: {reason}", file=sys.stderr)
    if not bad:
        slowest = max((r.all_reduce_ms or 0.0 for r in reports.values()), default=0.0)
        print(
            f"all {len(nodes)} nodes passed the health check; all-reduce of 4 MiB in {slowest:.1f} ms",
            file=sys.stderr,
        )
        return ALL_GOOD
    if len(bad) == len(nodes):
        print(
            f"error: no good node among {', '.join(nodes)}: fix the problems above and submit again "
            f"(or use other nodes: sbatch --exclude={','.join(nodes)} …)",
            file=sys.stderr,
        )
        return NO_GOOD_NODE
    print(",".join(bad))
    return SOME_BAD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
