"""Which nodes of a job are bad, from the reports that ``health.py`` left. Imports no torch.

``python -m maestro_scale.cluster.verdict REPORTS NODE…``: exit 0 if all are good; 3 if some are bad, their names, with
commas, on standard output; 2 if the job cannot run anywhere. What is wrong, and what to do, goes to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from maestro_scale.cluster.health import NodeReport, read_reports

ALL_GOOD, NO_GOOD_NODE, SOME_BAD = 0, 2, 3


def find_bad_nodes(nodes: list[str], reports: dict[str, NodeReport]) -> dict[str, str]:
    """Bad node -> what is wrong with it."""
    bad = {}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            bad[node] = (
                "no answer: no task could start there, it hung, or it cannot write to the run directory"
            )
        elif report.problems:
            bad[node] = "; ".join(report.problems)
    if bad:
        return bad  # what the others say of the network follows from it
    for node in nodes:
        blamed_by = [n for n in nodes if node in reports[n].unreachable]
        # A node that is cut off blames all the others; they agree on it.
        if 2 * len(blamed_by) > len(nodes) - 1:
            bad[node] = (
                f"{', '.join(blamed_by)} cannot reach it: check the network, firewall and MAESTRO_IFNAME"
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
            said = report.collective or "it did not end in time"
            bad[node] = f"all-reduce failed ({said}): set MAESTRO_IFNAME, or NCCL_DEBUG=INFO to see more"
    return bad


def main(argv: list[str]) -> int:
    """The command line; see above."""
    folder, nodes = Path(argv[0]), argv[1:]
    reports = read_reports(folder)
    bad = find_bad_nodes(nodes, reports)
    for node, reason in bad.items():
        print(f"bad node {node}: {reason}", file=sys.stderr)
    if not bad:
        slowest = max((r.all_reduce_ms or 0.0 for r in reports.values()), default=0.0)
        print(f"all {len(nodes)} nodes are well; all-reduce of 4 MiB in {slowest:.1f} ms", file=sys.stderr)
        return ALL_GOOD
    if len(bad) == len(nodes):
        print(
            f"error: no good node among {', '.join(nodes)}: mend what is said above and submit again "
            f"(or, with other nodes: sbatch --exclude={','.join(nodes)} …)",
            file=sys.stderr,
        )
        return NO_GOOD_NODE
    print(",".join(bad))
    return SOME_BAD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
