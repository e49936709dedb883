"""Rounds of ``shard``: two writers at once, kills of writers and their workers, on a folder and on S3 with faults."""

from __future__ import annotations

import json
import time
from pathlib import Path

from maestro_scale.shards.format.index import index_path
from tests.chaos.compare import check_error, check_success, files_of
from tests.chaos.findings import HANG, LEFT, WRONG, Finding
from tests.chaos.kills import START_UP, Kill, strike
from tests.chaos.objects import BUCKET
from tests.chaos.processes import WORKER, Start
from tests.chaos.round import Round
from tests.chaos.rounds.common import faulty_s3
from tests.chaos.site import SHARD_MB

_SPLITS = ("train", "val")
_REFUSED = r"another|in use|being written|is written by|lease|lock"


def local(r: Round) -> None:
    """Two writers in one folder, killed at random moments, then written to the end; equal byte by byte."""
    destination = r.folder / "shards"
    _disturb(r, str(destination), {})
    if _complete(r, str(destination), {}):
        r.found(compare_published(files_of(destination), files_of(_reference(r))))


def remote(r: Round) -> None:
    """The same on S3 through a proxy with faults; shards and manifest are compared by their names in the manifest."""
    prefix = f"{r.name}/shards"
    with faulty_s3(r, rate=0.15, max_hangs=0) as env:
        _disturb(r, f"s3://{BUCKET}/{prefix}", env)
        complete = _complete(r, f"s3://{BUCKET}/{prefix}", env)
    if complete:
        r.found(compare_published(r.site.objects.objects(prefix), files_of(_reference(r))))


def compare_published(objects: dict[str, bytes], files: dict[str, bytes]) -> list[Finding]:
    """Objects below a prefix against a folder: the same samples in the same shards, whatever their names; objects that
    the manifest does not name are left behind."""
    have, want = (json.loads(x["manifest.json"]) for x in (objects, files))
    for manifest in (have, want):  # the splits are in the order in which they were published
        manifest["shards"].sort(key=lambda shard: shard["split"])
    paths = [s["path"] for s in have["shards"]]
    known = {"manifest.json", "manifest.sha256"} | {n for p in paths for n in (p, index_path(p))}
    findings = [Finding(LEFT, f"object {name}") for name in sorted(objects) if name not in known]
    shards = [[objects.get(s["path"]) for s in have["shards"]], [files[s["path"]] for s in want["shards"]]]
    if shards[0] != shards[1]:
        findings.append(Finding(WRONG, f"the shards {paths} have other contents"))
    for shard in (*have["shards"], *want["shards"]):
        shard.pop("path")
    if have != want:
        different = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        findings.append(Finding(WRONG, f"the manifests differ in {different}, besides names of shards"))
    return findings


def _command(r: Round, destination: str, split: str) -> list[str]:
    words = (
        "shard",
        "treesatai_ts",
        str(r.site.raw),
        destination,
        f"--split={split}",
        f"--shard-mb={SHARD_MB}",
    )
    return r.site.command_line(*words, "--workers=2")


def _reference(r: Round) -> Path:
    """The splits, written one after the other without disturbance."""

    def command(folder: Path) -> list[str]:
        train, val = (" ".join(_command(r, str(folder / "shards"), split)) for split in _SPLITS)
        return ["sh", "-c", f"{train} && {val}"]

    return r.site.reference("shard", command).folder / "shards"


def _disturb(r: Round, destination: str, env: dict[str, str]) -> None:
    """Start two writers at once, of two splits or of the same one, and kill one or both; twice."""
    for _ in range(2):
        splits = r.rng.choice((("train", "val"), ("train", "train")))
        starts = [r.start(_command(r, destination, split), **env) for split in splits]
        r.outcome.inject(f"two writers of {'two splits' if len(set(splits)) == 2 else 'one split'}")
        targets = [r.rng.choice(("", "rank 0", WORKER, "all processes")) for _ in starts]
        time.sleep(r.rng.uniform(0.5, 5.0))
        killed = []
        for start, target in zip(starts, targets, strict=True):
            hit = bool(target) and start.running and strike(Kill(target, START_UP, 0, 0.0), start)
            killed.append(hit)
            if hit:
                r.outcome.inject(f"SIGKILL {'main process' if target == 'rank 0' else target} of shard")
        for start, hit in zip(starts, killed, strict=True):
            _end(r, start, hit, refusal=len(set(splits)) == 1)


def _end(r: Round, start: Start, killed: bool, refusal: bool) -> None:
    """Wait for a writer: it was killed, or it succeeds, or it is refused because another one writes the split."""
    if killed:
        r.was_killed(start)
        return
    code = start.wait(r.site.limit_s)
    if code is None:
        r.found([Finding(HANG, f"shard did not end within {r.site.limit_s:.0f} s")])
    elif code and refusal:
        r.found(check_error(code, start.output, (2,), _REFUSED))
    else:
        r.found(check_success(code, start.output))


def _complete(r: Round, destination: str, env: dict[str, str]) -> bool:
    """Write both splits to the end, and verify; whether all of it succeeded."""
    commands = [_command(r, destination, split) for split in _SPLITS]
    commands.append(r.site.command_line("verify", destination))
    return all(r.must_succeed(r.start(command, **env)) for command in commands)
