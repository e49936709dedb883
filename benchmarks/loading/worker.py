"""A process that measures loaders on request: one JSON object per line in, one line ``RESULT …`` out.

    python -m benchmarks.loading.worker ours|peers

``write``: writes a peer's format. ``read``: reads batches for ``seconds`` after a warm-up of a fifth, in as many passes
as it takes; the result has the processor time per sample of this process, with all of its threads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading.prepare import Layout, Preparation


def processor_time_us(passes: Callable[[], Iterator[Any]], batch: int, seconds: float) -> float:
    """Microseconds of processor time per sample."""
    warm_until = time.perf_counter() + seconds / 5
    begun: tuple[float, float] | None = None
    samples = 0
    while True:
        empty = True
        for _ in passes():
            empty = False
            now = time.perf_counter()
            if begun is None:
                if now >= warm_until:
                    begun = now, time.process_time()
                continue
            samples += batch
            if now - begun[0] >= seconds:
                return (time.process_time() - begun[1]) / samples * 1e6
        if empty:
            raise ValueError(f"fewer than {batch} samples")


def _peers(request: dict[str, Any]) -> Any:
    from benchmarks.loading.peers import PEERS

    peer, folder = PEERS[request["variant"]], Path(request["folder"])
    out = folder / request["variant"].replace(", ", "-")
    if request["task"] == "write":
        if not out.exists():
            partial = out.with_name(f"{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            peer.write(sorted((folder / "samples").iterdir()), partial)
            partial.rename(out)
        return {"version": peer.version, "does": peer.does}
    prepare = Preparation(Layout.read(folder / "layout.json"))
    return processor_time_us(lambda: iter(peer.read(out, prepare)), prepare.layout.batch, request["seconds"])


def _ours(request: dict[str, Any]) -> Any:
    from benchmarks.loading import ours
    from benchmarks.loading.data import shards_of

    folder, dataset = Path(request["folder"]), request["dataset"]
    layout = Layout.read(folder / "layout.json")
    kind, _, codec = request["variant"].partition(", ")
    bound = ours.LowerBound(folder)  # made once: only its passes are measured
    passes: dict[str, Callable[[], Iterator[Any]]] = {
        "lower bound": bound,
        "ours": lambda: ours.shards(str(shards_of(folder, codec)), dataset, layout.batch, folder / "cache"),
        "authors' files": lambda: ours.files(folder, dataset, Preparation(layout)),
    }
    return processor_time_us(passes[kind], layout.batch, request["seconds"])


def main(kind: str) -> None:
    """Answer requests until the input ends."""
    import torch

    torch.set_num_threads(1)
    measure = {"ours": _ours, "peers": _peers}[kind]
    for line in sys.stdin:
        try:
            answer = {"value": measure(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - the caller records it and continues
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print("RESULT", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads of libraries
