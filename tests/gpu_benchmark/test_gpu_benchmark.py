"""``python -m benchmarks.gpu``: its rehearsal, and what it does with a section that fails, crashes or hangs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils import backend_registration

from benchmarks import gpu
from benchmarks.gpu_sections import SECTIONS, Section, pack, runner
from benchmarks.gpu_sections.cases import Case, case_recipe, config_of, specs_of
from benchmarks.gpu_sections.device import Device, WaitRecorder, summarize
from benchmarks.gpu_sections.parity import forward_backward
from benchmarks.gpu_sections.record import Record, max_relative
from benchmarks.gpu_sections.table import print_report
from benchmarks.gpu_sections.training import StepClock, new_model
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source

REPO = Path(__file__).parents[2]
HERE = "tests.gpu_benchmark.sections"


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=REPO, env=env, capture_output=True, text=True, timeout=1790
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a hundred seconds of one core
def test_the_rehearsal_runs_every_section(tmp_path):
    out = tmp_path / "gpu.json"
    done = run_python("-m", "benchmarks.gpu", "--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report["rehearsal"]
    sections = {s["name"]: s for s in report["sections"]}
    assert list(sections) == [s.name for s in SECTIONS]
    assert {s["status"] for s in sections.values()} == {"passed"}
    modes = [(row["mode"], row["samples_per_s"] > 0) for row in sections["speed"]["data"]["rows"]]
    assert modes == [("none", True), ("blocks", True), ("step", True)]
    curves = sections["curves"]["data"]["curves"]
    assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(
        ("fp32", "bf16", "bf16_weights"), 3
    )
    assert sections["resume"]["data"]["deterministic"]["bitwise"]
    made = {name: sum(c["passed"] is True for c in s["checks"]) for name, s in sections.items()}
    # What needs a GPU is not measured here, and says so.
    assert made["waits"] == made["memory"] == 0
    assert {c["note"] for c in sections["waits"]["checks"]} == {"not on this device"}
    assert made["parity"] == 12
    assert (made["zero"], made["resume"], made["evaluation"], made["multi_gpu"]) == (3, 4, 6, 1)


def run_sections(
    monkeypatch, tmp_path: Path, *sections: Section, budget_s: float = 120.0
) -> tuple[dict, bool]:
    monkeypatch.setattr(runner, "SECTIONS", sections)
    monkeypatch.setattr(runner, "_MIN_S", 1.0)
    run = runner.Runner(tmp_path, tmp_path / "gpu.json", rehearse=False, budget_s=budget_s)
    report = run.run([])
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    return {s["name"]: s for s in report["sections"]}, run.passed


def section(name: str, limit_s: float = 60.0, **options) -> Section:
    return Section(name, name.title(), f"{HERE}:{name}", limit_s, **options)


@pytest.mark.slow
def test_a_section_that_fails_loses_no_other(monkeypatch, tmp_path):
    sections = (
        section("crashes"),
        section("dies", required=False),
        section("hangs", 30.0),
        section("wrong"),
        section("fine"),
    )
    found, passed = run_sections(monkeypatch, tmp_path, *sections)
    assert {name: s["status"] for name, s in found.items()} == {
        "crashes": "error",
        "dies": "error",
        "hangs": "timeout",
        "wrong": "failed",
        "fine": "passed",
    }
    assert not passed
    for name in ("crashes", "dies", "hangs"):
        assert found[name]["data"] == {"before": 1}
    assert found["crashes"]["stderr"][-1] == "RuntimeError: the last words"
    assert found["dies"]["error"] == "exit code -6"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("required", "passes"), [(True, False), (False, True)])
def test_only_a_required_section_fails_the_command(required, passes, monkeypatch, tmp_path):
    _, passed = run_sections(monkeypatch, tmp_path, section("wrong", required=required), section("fine"))
    assert passed is passes


@pytest.mark.slow
def test_a_background_section_ends_before_a_timed_one(monkeypatch, tmp_path):
    sections = (section("compiles", 600.0, background=True), section("beside"), section("wrong", timed=True))
    found, _ = run_sections(monkeypatch, tmp_path, *sections)
    assert list(found) == ["beside", "compiles", "wrong"]
    assert found["beside"]["status"] == found["compiles"]["status"] == "passed"
    assert found["compiles"]["seconds"] < 300  # it would run for 600 s
    assert found["compiles"]["data"] == {"first": 1}


@pytest.mark.parametrize("required", [True, False])
def test_sections_without_time_are_skipped(required, monkeypatch, tmp_path):
    found, passed = run_sections(monkeypatch, tmp_path, section("fine", required=required), budget_s=0.5)
    assert (found["fine"]["status"], found["fine"]["skipped"]) == ("skipped", "no time left")
    assert passed is not required  # what must hold was not checked


def test_a_place_that_cannot_be_written_is_refused_before_the_first_section(tmp_path, capsys):
    (tmp_path / "file").touch()
    work = ["--rehearse", "--only", "machine", "--work", str(tmp_path / "work")]
    assert gpu.main([*work, "--out", str(tmp_path / "file" / "gpu.json")]) == 2
    found = capsys.readouterr()
    assert "machine" not in found.out
    (line,) = found.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'file'}")
    with pytest.raises(SystemExit):
        gpu.main([*work, "--out", str(tmp_path)])


def test_without_a_gpu_nothing_else_is_tried(monkeypatch, tmp_path):
    machine = next(s for s in SECTIONS if s.name == "machine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found, passed = run_sections(monkeypatch, tmp_path, machine, section("fine"))
    assert found["machine"]["stderr"][-1].startswith("RuntimeError: torch finds no GPU")
    assert found["fine"]["skipped"] == "the section machine failed"
    assert not passed


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)
def test_sections_on_the_simulated_device():
    """Parity and reference mix no host and device tensors, and compare what was computed on both."""
    done = run_python(str(REPO / "tests/gpu_benchmark/on_simulated_device.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for name in ("parity", "reference"):
        assert found[name]["mixes"] == []
        assert found[name]["kernels"] > 1000
    assert len(found["parity"]["checks"]) == 12
    assert all(c["passed"] for c in found["parity"]["checks"])


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a build of torch with CUDA asks the driver, not the fake"
)
def test_sections_on_a_fake_gpu():
    """What only a GPU has: counted waits, peak memory, kernels; on CPU tensors, with answers for torch.cuda."""
    done = run_python(str(REPO / "tests/gpu_benchmark/on_fake_gpu.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    sections = found["sections"]
    assert found["alive"] == []
    # The debug mode is on for one step of each case, and off again.
    assert found["modes"] == ["warn", "default"] * 2
    assert [(c["value"], c["limit"]) for c in sections["waits"]["checks"]] == [(0, 2), (0, 0)] * 2
    memory = sections["memory"]
    assert memory["status"] == "failed"  # 3 GiB were made up
    for check, row in zip(memory["checks"], memory["data"].values(), strict=True):
        assert row["peak_bytes"] == 3 * 2**30
        assert check["value"] == pytest.approx(abs(row["plan_bytes"] / (3 * 2**30) - 1))
    (profile,) = sections["kernels"]["data"].values()
    assert (profile["kernels"], profile["launches"], profile["waits"]) == (0, 0, {})
    for row in sections["speed"]["data"]["rows"]:
        assert row["peak_bytes"] == 3 * 2**30
        assert row["plan_samples_per_s"] > 0
    assert sections["machine"]["status"] == "passed"
    assert sections["machine"]["data"]["gpu"]["name"] == "NVIDIA H100 80GB HBM3"


def call_in(filename: str, body: str, **names) -> object:
    """The value of a function ``call`` that is compiled as if it were in ``filename``."""
    scope = dict(names)
    exec(compile(f"def call():\n    {body}", filename, "exec"), scope)
    return scope["call"]


def test_waits_are_attributed_to_the_code_that_waits():
    import maestro_scale

    ours = str(Path(maestro_scale.__file__).parent / "training/engine.py")
    in_torch = str(Path(torch.__file__).parent / "_tensor.py")
    warn = call_in(in_torch, "warn(text)", warn=warnings.warn, text="called a synchronizing CUDA operation")
    other = call_in(in_torch, "warn(text)", warn=warnings.warn, text="something else")
    read = call_in(ours, "return item()", item=warn)
    deepspeed = call_in("/x/site-packages/deepspeed/runtime/engine.py", "return item()", item=warn)
    autograd = call_in(str(Path(torch.__file__).parent / "autograd/graph.py"), "return item()", item=warn)
    recorder = WaitRecorder(Device(torch.device("cpu")))
    recorder.start()
    for call in (
        read,
        call_in(ours, "return inner()", inner=deepspeed),
        call_in(ours, "return inner()", inner=autograd),
    ):
        call()
    other()
    waits = recorder.stop()
    found = [(w.owner, w.place, w.called.rpartition("/")[2], w.backward) for w in waits]
    assert found == [
        ("maestro_scale", "maestro_scale/training/engine.py:2", "engine.py:2", False),
        ("deepspeed", "deepspeed/runtime/engine.py:2", "engine.py:2", False),
        ("maestro_scale", "maestro_scale/training/engine.py:2", "engine.py:2", True),
    ]
    with warnings.catch_warnings(record=True) as seen:  # the warnings of others are shown again
        warnings.simplefilter("always")
        warn()
    assert len(seen) == 1


def event(name: str, device: str, start: int = 0, duration: int = 0, kind: str = "") -> SimpleNamespace:
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: f"DeviceType.{device}",
        start_ns=lambda: start,
        duration_ns=lambda: duration,
        activity_type=lambda: kind,
    )


def test_a_profile_counts_kernels_launches_and_waits():
    events = [
        event("aten::mm", "CPU", 0, 50),
        event("cudaLaunchKernel", "CPU"),
        event("cudaLaunchKernel", "CPU"),
        event("cudaGraphLaunch", "CPU"),
        event("cudaStreamSynchronize", "CPU"),
        event("gemm", "CUDA", 0, 100, "kernel"),
        event("gemm", "CUDA", 50, 100, "kernel"),  # on another stream, at the same time
        event("flash_fwd_kernel", "CUDA", 300, 40, "kernel"),
        event("Optimizer.step#AdamW.step", "CUDA", 0, 1000, "gpu_user_annotation"),
        event("Stream Synchronize", "CUDA", 0, 1000, "cuda_sync"),
    ]
    profile = summarize(events, 1e-6, is_gpu=True)
    assert (profile.operations, profile.kernels, profile.launches) == (1, 3, 3)
    assert profile.waits == {"cudaStreamSynchronize": 1}
    assert profile.busy_s == pytest.approx(190e-9)
    assert profile.top == [("gemm", 200e-9, 2), ("flash_fwd_kernel", 40e-9, 1)]
    assert profile.attention == ["flash_fwd_kernel"]
    # Without the kind, as in older torch versions.
    older = [SimpleNamespace(**{k: v for k, v in vars(e).items() if k != "activity_type"}) for e in events]
    assert summarize(older, 1e-6, is_gpu=True).kernels == 3
    on_cpu = summarize(events[:1], 1e-6, is_gpu=False)
    assert (on_cpu.kernels, on_cpu.launches, on_cpu.waits, on_cpu.busy_s) == (None, None, None, None)
    assert on_cpu.top == [("aten::mm", 50e-9, 1)]


def test_a_new_model_is_that_of_a_training():
    recipe = case_recipe(Case("treesatai_ts", "base", 2), True)
    config = config_of(recipe)
    ours, theirs = new_model(config, 3), Maestro(config).initialise(3)
    assert not list(theirs.buffers())  # would not be initialised
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    (spec,) = specs_of(recipe)
    batch = mock_batch(Source(spec, (), None), config.dataset, 2)
    results = [forward_backward(m, batch, MaskingConfig(), torch.device("cpu")) for m in (ours, theirs)]
    assert results[0].loss == results[1].loss


def test_the_clock_measures_windows_after_the_warmup(monkeypatch):
    clock = StepClock(Device(torch.device("cpu")), warmup=2, repeats=2, length=3, ends_at=math.inf)
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock.on_start(None, 0)
    step_s = [100.0, 50.0, *(1.0, 2.0, 3.0), *(4.0, 4.0, 4.0)]
    for seconds in step_s:
        assert not clock.finished
        now[0] += seconds
        clock.after_step(SimpleNamespace(wait_s=seconds / 2))
    assert clock.finished
    assert (clock.warmup_s, clock.step_s, clock.wait_s) == (150.0, [2.0, 4.0], [1.0, 2.0])


def test_a_clock_out_of_time_ends_with_the_window_that_it_has():
    clock = StepClock(Device(torch.device("cpu")), warmup=1, repeats=3, length=100, ends_at=0.0)
    clock.after_step(SimpleNamespace(wait_s=0.0))
    assert not clock.finished
    clock.after_step(SimpleNamespace(wait_s=0.0))
    assert clock.finished
    assert len(clock.step_s) == 1


def test_what_is_not_a_number_passes_no_check(tmp_path):
    record = Record(tmp_path / "r.json", time.time() + 10)
    assert not record.check("nan", math.nan, 1.0)
    assert not record.check("infinite", math.inf, 1.0)
    assert record.check("at the limit", 1.0, 1.0)
    assert json.loads(record.path.read_text())["status"] == "failed"
    assert [c["value"] for c in json.loads(record.path.read_text())["checks"]] == [None, None, 1.0]


@pytest.mark.parametrize(
    ("curve", "reference", "expected"),
    [
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([1.0], [1.0, 2.0], math.inf),
        ([], [], math.inf),
        ([math.nan], [1.0], math.inf),
        ([None], [1.0], math.inf),
    ],
)
def test_curves_that_cannot_be_compared_differ(curve, reference, expected):
    assert max_relative(curve, reference) == pytest.approx(expected)


def test_the_table_shows_failures_with_their_cause():
    checks = [
        {"name": "loss", "value": 3e-4, "limit": 1e-5, "passed": False, "note": "vitb"},
        {"name": "masks", "value": None, "limit": None, "passed": True, "note": ""},
    ]
    head = {"required": True, "seconds": 1.0}
    row = {"case": "base", "mode": "none", "samples_per_s": 50.0, "samples_per_s_range": [40.0, 60.0]}
    row |= {"mfu": 0.25, "plan_samples_per_s": 100.0, "data_wait_s": 0.01, "step_s": 0.1, "peak_bytes": 2**31}
    report = {
        "rehearsal": False,
        "sections": [
            {"name": "parity", "title": "Parity", "status": "failed", "checks": checks, **head},
            {
                "name": "zero",
                "title": "ZeRO",
                "status": "error",
                "error": "exit code 1",
                "stderr": ["[x] boom"],
                **head,
            },
            {"name": "speed", "title": "Speed", "status": "passed", "data": {"rows": [row]}, **head},
        ],
    }
    text = StringIO()
    print_report(report, Console(file=text, width=150))
    for part in ("1 of 2", "failed parity: loss: 0.0003, at most 1e-05 vitb", "[x] boom", "exit code 1"):
        assert part in text.getvalue()
    (line,) = [line for line in text.getvalue().splitlines() if "50.0" in line]
    assert [part.strip() for part in line.strip("│").split("│")[2:9]] == [
        *("50.0", "40.0", "60.0", "25.0%", "50%", "10.0%", "2.0")
    ]


def test_what_travels_is_the_code_and_the_wheels(tmp_path, capsys, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "x-1-py3-none-any.whl").write_bytes(b"0" * 1000)
    assert gpu.main(["--pack", str(tmp_path / "packed"), "--wheels", str(wheels)]) == 0
    packed = tmp_path / "packed"
    for name in (
        "benchmarks/gpu.py",
        "maestro_scale/train.py",
        "recipes/treesatai_ts.yaml",
        ".whl/x-1-py3-none-any.whl",
    ):
        assert (packed / name).is_file()
    assert not (packed / "tests").exists()
    assert not list(packed.glob("benchmarks/results/*"))
    assert "of 64 MiB" in capsys.readouterr().out
    assert gpu.main(["--pack", str(packed)]) == 1
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setattr(pack, "LIMIT_BYTES", 900)
    assert gpu.main(["--list-files", "--wheels", str(wheels)]) == 1
    assert "at most 0 can travel" in capsys.readouterr().err
