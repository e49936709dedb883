"""The fault injection itself: its proxy sends what it claims, its comparison finds what it must, one round runs."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maestro_scale.tracking.metric_names import metric_names
from tests.chaos import proxy
from tests.chaos.command import run_round
from tests.chaos.compare import check_error, check_killed, check_success, compare_files, compare_runs
from tests.chaos.damages import DAMAGES, CacheDamager, damage
from tests.chaos.findings import HANG, LEFT, LOST, REPEATED, UNCLEAR, WRONG, Finding, Outcome
from tests.chaos.kills import COMMIT, START_UP, draw_kill
from tests.chaos.processes import Start, tagged, wait_until_gone
from tests.chaos.report import BEGIN, END, Invocation, replace_between_markers, tables, write_page
from tests.chaos.round import Round
from tests.chaos.rounds.shards import compare_published
from tests.chaos.rounds.tracking import compare_store
from tests.chaos.site import Site

BODY = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def upstream():
    """Port of a server whose GETs return BODY, and the list of its requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            received = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append(f"{self.command} {self.path}")
            content = received[::-1] if self.command == "PUT" else BODY
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1], requests
    server.shutdown()
    server.server_close()


def ask(port: int, method: str = "GET", path: str = "/bucket/a.tar", body: bytes | None = None):
    """(status, body) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("fault", [None, *proxy.FAULTS])
def test_the_proxy_sends_each_fault(upstream, fault):
    sent: list[str] = []
    with proxy.FaultyProxy(upstream[0], lambda request: fault, sent.append, random.Random(3)) as between:
        if fault in (None, proxy.DELAY):
            assert ask(between.port) == (200, BODY)
            assert ask(between.port, "PUT", body=b"abc") == (200, b"cba")
            assert ask(between.port, "HEAD") == (200, b"")
        elif fault in (proxy.CODE_500, proxy.CODE_503):
            assert ask(between.port) == (int(fault[-3:]), b"")
        elif fault == proxy.FLIP:
            status, body = ask(between.port)
            different = [a ^ b for a, b in zip(body, BODY, strict=True) if a != b]
            assert (status, different) == (200, [1])
        else:
            error = {
                proxy.RESET: ConnectionError,
                proxy.CUT: http.client.IncompleteRead,
                proxy.HANG: TimeoutError,
            }
            with pytest.raises(error[fault]):
                ask(between.port)
    assert sent == [fault] * {None: 0, proxy.DELAY: 3}.get(fault, 1)


def test_half_of_the_failed_requests_take_effect(upstream):
    upstream[1].clear()
    with proxy.FaultyProxy(upstream[0], lambda request: proxy.CODE_500, rng=random.Random(1)) as between:
        for _ in range(40):
            assert ask(between.port, "PUT", body=b"x")[0] == 500
        assert between.num_requests == 40
    assert 10 <= len(upstream[1]) <= 30


def test_random_faults_are_repeatable_and_never_three_in_a_row():
    get = proxy.Request("GET", "/b/a.tar?x", {}, b"")

    def draw(request, count=2000, rate=0.8):
        choose = proxy.random_faults(random.Random(5), rate)
        return [choose(request) for _ in range(count)]

    faults = draw(get)
    assert faults == draw(get)
    assert set(faults) == {None, *proxy.FAULTS}
    assert Counter(faults)[proxy.HANG] == 1
    serious = "".join("1" if f not in (None, proxy.DELAY) else "0" for f in faults)
    assert "11" in serious
    assert "111" not in serious
    assert proxy.FLIP not in draw(proxy.Request("GET", "/b/manifest.json", {}, b""))
    assert not {proxy.FLIP, proxy.CUT} & set(draw(proxy.Request("PUT", "/b/a.tar", {}, b"")))


def make_run(folder: Path, steps: int = 4) -> Path:
    """A run directory of two ranks as far as the comparison reads it."""
    (folder / "audit").mkdir(parents=True)
    for rank in range(2):
        lines = [
            {"step": s, "keys": [f"0/x/{4 * s + 2 * rank + i}" for i in (0, 1)], "digest": ["d"]}
            for s in range(1, steps + 1)
        ]
        (folder / "audit" / f"rank{rank:05d}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    metrics = [
        {"step": s, "loss": 1 / s, "grad_norm": 0.1, "step_s": 0.5, "data/wait_s": 0.1}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    state = folder / "checkpoints" / f"step_{steps:08d}" / "state"
    state.mkdir(parents=True)
    (state.parent / "COMMIT.json").write_text(
        json.dumps({"position": {"step": steps}, "guard": {"seen": steps}})
    )
    parameter = {"shape": [4], "pieces": [["rank00000.safetensors", 0, 4]]}
    index = {"adam_step": steps, "kinds": ["weight", "exp_avg"], "parameters": {"w": parameter}}
    (state / "index.json").write_text(json.dumps(index))
    save_file(
        {f"{k}/w": np.arange(4, dtype=np.float32) for k in index["kinds"]}, state / "rank00000.safetensors"
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    """(a run to be changed, the reference)."""
    return make_run(tmp_path / "run"), make_run(tmp_path / "reference")


def rewrite_line(path: Path, number: int, change) -> None:
    lines = path.read_text().splitlines()
    lines[number : number + 1] = [json.dumps(x) for x in change(json.loads(lines[number]))]
    path.write_text("".join(line + "\n" for line in lines))


def kinds(findings: list[Finding]) -> Counter[str]:
    total: Counter[str] = Counter()
    for finding in findings:
        total[finding.kind] += finding.count
    return total


@pytest.mark.parametrize("exact", [True, False])
def test_equal_runs_have_no_findings_and_measured_values_may_differ(runs, exact):
    rewrite_line(runs[0] / "metrics.jsonl", 1, lambda m: [m | {"step_s": 9.0, "data/wait_s": 3.0}])
    assert compare_runs(*runs, exact=exact) == []


@pytest.mark.parametrize("exact", [True, False])
def test_lost_and_repeated_samples_are_found(runs, exact):
    path = runs[0] / "audit" / "rank00001.jsonl"
    rewrite_line(path, 2, lambda line: [line | {"keys": line["keys"][:1]}])
    assert kinds(compare_runs(*runs, exact=exact)) == {LOST: 1}
    rewrite_line(path, 0, lambda line: [line, line])
    assert kinds(compare_runs(*runs, exact=exact)) == {LOST: 1, REPEATED: 2}
    path.unlink()
    assert kinds(compare_runs(*runs, exact=exact)) == {LOST: 8}


def test_another_order_is_found_on_the_same_ranks_only(runs):
    rewrite_line(runs[0] / "audit" / "rank00000.jsonl", 0, lambda line: [line | {"keys": line["keys"][::-1]}])
    assert kinds(compare_runs(*runs, exact=True)) == {WRONG: 1}
    assert compare_runs(*runs, exact=False) == []


@pytest.mark.parametrize(
    "change",
    [lambda m: [m, m], lambda m: [], lambda m: [m | {"loss": m["loss"] * (1 + 1e-4)}]],
    ids=("twice", "lost", "loss"),
)
@pytest.mark.parametrize("exact", [True, False])
def test_wrong_metrics_are_found(runs, change, exact):
    rewrite_line(runs[0] / "metrics.jsonl", 1, change)
    assert kinds(compare_runs(*runs, exact=exact)) == {WRONG: 1}


@pytest.mark.parametrize(
    ("by", "exact", "found"), [(1e-7, True, 1), (1e-7, False, 0), (1e-2, False, 1), (np.nan, False, 1)]
)
def test_a_changed_weight_is_found(runs, by, exact, found):
    (path,) = runs[0].glob("checkpoints/*/state/rank*.safetensors")
    tensors = load_file(path)
    tensors["exp_avg/w"] = tensors["exp_avg/w"] + np.array([by, 0, 0, 0], np.float32)
    save_file(tensors, path)
    assert kinds(compare_runs(*runs, exact=exact))[WRONG] == found


def test_a_missing_checkpoint_and_another_position_are_found(runs):
    (mark,) = runs[0].glob("checkpoints/*/COMMIT.json")
    mark.write_text(mark.read_text().replace('"step": 4', '"step": 3'))
    assert kinds(compare_runs(*runs, exact=True)) == {WRONG: 1}
    shutil.rmtree(mark.parent)
    assert kinds(compare_runs(*runs, exact=True)) == {WRONG: 1}


def test_files_are_compared_by_name_and_content():
    assert compare_files({"a": b"1"}, {"a": b"1"}) == []
    assert len(compare_files({"a": b"1", "b": b"2"}, {"a": b"0", "c": b"3"})) == 3


def test_published_shards_may_have_other_names_but_nothing_else():
    def dataset(name, **more):
        shards = [{"path": f"{name}.tar", "split": "train", "samples": 2}]
        return {"manifest.json": json.dumps({"shards": shards}).encode(), f"{name}.tar": b"tar", **more}

    files = dataset("train-000000")
    other = dataset("train-000000-abcd", **{"train-000000-abcd.index.json": b"{}"})
    assert compare_published(other, files) == []
    assert kinds(compare_published(other | {"stray.tar": b""}, files)) == {LEFT: 1}
    assert kinds(compare_published(other | {"train-000000-abcd.tar": b"rat"}, files)) == {WRONG: 1}
    changed = other["manifest.json"].replace(b'"samples": 2', b'"samples": 3')
    assert kinds(compare_published(other | {"manifest.json": changed}, files)) == {WRONG: 1}


TRACEBACK = "Traceback (most recent call last):\n  File x\nRuntimeError: gloo\n"


def test_terminations_are_clear_or_not():
    assert check_success(0, "done\n") == []
    assert kinds(check_success(1, "done\n")) == kinds(check_success(0, TRACEBACK)) == {UNCLEAR: 1}
    assert kinds(check_success(0, "error: x\n")) == {UNCLEAR: 1}
    full = "error (rank 1 on host): x cannot be written: No space left\n"
    assert check_error(2, full, (2,), "No space left") == []
    assert kinds(check_error(1, full, (2,), "No space left")) == {UNCLEAR: 1}
    assert kinds(check_error(2, full, (2,), "other words")) == {UNCLEAR: 1}
    assert kinds(check_error(2, full + TRACEBACK, (2,), "No space")) == {UNCLEAR: 1}
    assert check_killed("error: lost rank 1\n") == []
    (finding,) = check_killed("[rank0]: " + TRACEBACK)
    assert finding == Finding(UNCLEAR, "traceback: RuntimeError: gloo")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damages(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(BODY)
    damage(path, kind, random.Random(0))
    assert not path.exists() if kind == "deleted" else path.read_bytes() != BODY
    if kind in ("flipped", "replaced"):
        assert path.stat().st_size == len(BODY)
    assert len(list(tmp_path.iterdir())) == (kind != "deleted")


def test_a_damager_leaves_shards_in_use_alone(tmp_path):
    import fcntl

    (tmp_path / "shards").mkdir()
    used, unused = tmp_path / "shards" / "a.tar", tmp_path / "shards" / "b.tar"
    for path in (used, unused):
        path.write_bytes(BODY)
    done = threading.Event()
    with used.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with CacheDamager(tmp_path, random.Random(1), 0.01, lambda kind: done.set()):
            assert done.wait(10)
        assert used.read_bytes() == BODY
    assert not unused.exists() or unused.read_bytes() != BODY


def test_kills_are_drawn_for_every_target_and_moment():
    drawn = [draw_kill(random.Random(n)) for n in range(300)]
    assert drawn == [draw_kill(random.Random(n)) for n in range(300)]
    assert len({(k.target, k.moment) for k in drawn}) == 4 * 3 + 1
    assert 0.3 < sum(k.moment == COMMIT for k in drawn) / 300 < 0.6
    assert all(k.delay_s > 0.4 for k in drawn if k.moment == START_UP)


def test_processes_that_are_left_are_found_and_killed(tmp_path):
    start = Start(
        ["sh", "-c", "sleep 60 & exit 0"], {"PATH": "/usr/bin:/bin"}, tmp_path / "log", "test-left/1/"
    )
    assert start.wait(10) == 0
    # While a process replaces its program, the kernel shows no environment for a moment.
    deadline = time.monotonic() + 10
    while not tagged("test-left/") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(tagged("test-left/")) == 1
    assert len(wait_until_gone("test-left/1/", 0.1)) == 1
    assert tagged("test-left/") == []
    hung = Start(["sleep", "60"], {"PATH": "/usr/bin:/bin"}, tmp_path / "log", "test-left/2/")
    assert hung.wait(0.2) is None
    assert not hung.running


def outcomes() -> list[Outcome]:
    first, second = Outcome("kill", 0, starts=4), Outcome("kill", 1, starts=2)
    first.inject("SIGKILL rank 0", 3)
    second.inject("SIGKILL rank 0")
    second.findings += [Finding(LOST, "step 1", 2), Finding(HANG, "x")]
    return [first, second, Outcome("disk", 0, not_run="no root")]


def test_the_report_has_the_figures_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page, Invocation("python -m tests.chaos --seed=7", 7, 1.5, 2, "abc"), outcomes())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| kill | 2 | 6 | 2 | 0 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "| disk | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1: no root |" in text
    assert "| SIGKILL rank 0 | 4 | kill |" in text
    assert "seed 7" in text
    assert tables(Invocation("c", 7, 1.5, 2, None), []).count("|") > 0
    with pytest.raises(ValueError, match="must contain"):
        replace_between_markers("no markers", "")


def test_a_round_that_cannot_be_made_fails_and_says_how_to_repeat_it(tmp_path, monkeypatch, capsys):
    from tests.chaos import command

    def broken(r: Round) -> None:
        raise KeyError("x")

    monkeypatch.setitem(command.ROUNDS, "kill", broken)
    outcome = run_round(Site(tmp_path / "site", 10), "kill", 3, 5, keep=True)
    assert kinds(outcome.findings) == {WRONG: 1}
    assert "repeat: python -m tests.chaos --seed=5 --kinds kill --round=3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_round_of_embeddings(monkeypatch, synthetic_shards, tmp_path):
    """The smallest real round: no launcher, an exported model instead of a training."""
    model = Path(__file__).parents[1] / "fixtures" / "model"
    monkeypatch.setattr(Site, "training", lambda self, ranks, stage: type("Made", (), {"folder": model}))
    monkeypatch.setattr(Site, "shards", synthetic_shards)
    # Other tests run at the same time, and use the real one.
    monkeypatch.setattr("tests.chaos.round._SHARED_MEMORY", tmp_path)
    with tempfile.TemporaryDirectory() as folder:  # tmp_path would be too long for the sockets in $TMPDIR
        outcome = run_round(Site(Path(folder) / "site", 100), "embed", 0, 1, keep=False)
    assert outcome.findings == []
    assert outcome.starts >= 2


def test_lost_doubled_and_changed_metrics_of_mlflow_are_found(tmp_path):
    (tmp_path / "tracking.json").write_text('{"run_id": "r"}')
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 0.5} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [
        (name, line["step"], value, "r")
        for line in lines
        for name, value in metric_names(line, mixture=False).items()
    ]
    assert len(rows) >= 4

    def found(stored) -> int:
        path = tmp_path / "mlflow.db"
        path.unlink(missing_ok=True)
        with sqlite3.connect(path) as store:
            store.execute("CREATE TABLE metrics (key, step, value, run_uuid)")
            store.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", stored)
        return kinds(compare_store(path, tmp_path))[WRONG]

    assert found(rows) == 0
    assert found(rows[1:]) == 1
    assert found([*rows, rows[0]]) == 1
    assert found([(*rows[0][:2], rows[0][2] + 0.1, "r"), *rows[1:]]) == 1
