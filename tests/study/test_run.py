"""Running cells: which are started, what is printed, failures, locks, data; without training anything."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from testkit.studies import STUDY, write_results, write_study
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.shards.locks import file_lock
from maestro_scale.study import command, processes, run, slurm, worker
from maestro_scale.study import data as study_data
from maestro_scale.study.cells import distinct, expand
from maestro_scale.study.command import Request, StudyRun
from maestro_scale.study.config import Data, load_study
from maestro_scale.study.processes import STOPPED, StopFlag
from maestro_scale.study.run import Outcome, RunOptions, StudyError, check_data, run_cells


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """(cells, scale, options) of a study of two cells with two seeds, whose data need not be written."""
    path = write_study(tmp_path, tmp_path / "no shards", setup={"seeds": [0, 1]})
    study = load_study(path)
    monkeypatch.setattr(run, "preload", lambda threads: None)
    monkeypatch.setattr(run, "end_study", lambda cells, folder, complete: None)
    root = tmp_path / "root"
    cells = distinct(expand(study, "cpu", root))
    return cells, study.scales["cpu"], RunOptions("tiny", root, jobs=2)


def note(cell, text: str) -> None:
    cell.directory.mkdir(parents=True, exist_ok=True)
    with (cell.directory / "calls").open("a") as file:
        file.write(f"{text} {os.environ['OMP_NUM_THREADS']}\n")


def test_finished_cells_are_skipped_and_a_failure_stops_no_other(prepared, monkeypatch, capsys):
    cells, scale, options = prepared

    def run_cell(cell, *_):
        note(cell, "run")
        if cell is cells[1]:
            print("error: out of memory")
            return 2
        write_results(cell)
        return 0

    monkeypatch.setattr(run, "run_cell", run_cell)
    write_results(cells[0])
    outcome = run_cells(cells, scale, options)
    assert (outcome.finished, outcome.exit_code) == (2, 1)
    assert [(c.directory / "calls").exists() for c in cells] == [False, True, True, True]
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert (cells[2].directory / "calls").read_text() == f"run {threads}\n"
    captured = capsys.readouterr()
    log = cells[1].directory / "log.txt"
    assert captured.err == f"failed: {cells[1].label}: error: out of memory (exit code 2), log {log}\n"
    assert "4 cells, 1 finished" in captured.out
    assert "[3/4]" in captured.out
    # Repeated, only the failed one is run.
    assert run_cells(cells, scale, options).exit_code == 1
    assert [len((c.directory / "calls").read_text().splitlines()) for c in cells[1:]] == [2, 1, 1]


def test_other_samples_at_the_address_of_existing_shards_are_refused(tmp_path):
    def shards(seed: int) -> Path:
        data = Data(dataset="treesatai_ts", tiles={"train": 4, "test": 3}, seed=seed)
        study_data.write(data, tmp_path, workers=1)
        return Path(study_data.place(data, tmp_path))

    first, other, place = shards(0), shards(1), tmp_path / "shards"
    shutil.copytree(first, place)
    study = write_study(tmp_path, place)
    started = StudyRun(Request(study, "", tmp_path / "root"))
    check_data(started.distinct)  # nothing was run
    cell = started.distinct[1]
    trained = cell.directory / "manifests" / "0-treesatai_ts.json"
    trained.parent.mkdir(parents=True)
    shutil.copy(first / "manifest.json", trained)
    manifest = json.loads(trained.read_text())
    (place / "manifest.sha256").unlink(missing_ok=True)

    def changed(**changes: str) -> None:
        """Write the manifest with other values of the shards of the test split."""
        shards = [{**s, **changes} if s["split"] == "test" else s for s in manifest["shards"]]
        shards += [{**s, "split": "more", "path": f"more-{s['path']}"} for s in manifest["shards"][:1]]
        (place / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))

    changed()
    check_data(started.distinct)  # a split was added
    for changes in ({"sha256": "0" * 64}, {"split": "other"}):
        changed(**changes)
        with pytest.raises(StudyError, match=r"was trained \(split test\)"):
            check_data(started.distinct)
    shutil.rmtree(place)
    shutil.copytree(other, place)
    for start in (started.run, lambda: started.run_cell("0"), lambda: started.submit(1, [])):
        with pytest.raises(StudyError, match=f"shards holds other samples than when {cell.name} was"):
            start()
    shutil.rmtree(place)
    check_data(started.distinct)  # cannot be read here


def test_a_cell_that_another_study_runs_is_waited_for(prepared, monkeypatch):
    cells, scale, options = prepared
    started = time.monotonic()
    monkeypatch.setattr(run, "_RETRY_S", 0.2)

    def run_cell(cell, *_):
        note(cell, "run")
        if cell is cells[0] and time.monotonic() < started + 0.5:
            return worker.LOCKED
        write_results(cell)
        return 0

    monkeypatch.setattr(run, "run_cell", run_cell)
    assert run_cells(cells[:2], scale, options).exit_code == 0
    assert 2 <= len((cells[0].directory / "calls").read_text().splitlines()) <= 6


def test_two_studies_exclude_each_other_per_cell(prepared, monkeypatch):
    (cell, *_), _, options = prepared
    monkeypatch.setattr(worker, "_run_stages", lambda *_: pytest.fail("it is locked"))
    cell.directory.mkdir(parents=True)
    with file_lock(cell.directory / ".cell.lock"):
        assert worker.run_cell(cell, "tiny", options.study_dir, False, 1) == worker.LOCKED


def test_a_signal_starts_no_further_cell_and_is_the_exit_code(prepared, monkeypatch):
    cells, scale, options = prepared
    stop = StopFlag()

    def run_cell(cell, *_):
        note(cell, "run")
        mine = StopFlag().install()
        while not mine.is_set:
            time.sleep(0.01)
        return STOPPED

    def start(cell, *arguments):
        pid = real(cell, *arguments)
        if len(stop.children) == 2:
            while not all((c.directory / "calls").exists() for c in cells[:2]):
                time.sleep(0.01)
            time.sleep(0.1)
            stop._on_signal(15, None)
        return pid

    real = run._start
    monkeypatch.setattr(run, "run_cell", run_cell)
    monkeypatch.setattr(run, "_start", start)
    outcome = run_cells(cells, scale, options, stop)
    assert (outcome.exit_code, outcome.failures) == (STOPPED, [])
    assert [(c.directory / "calls").exists() for c in cells] == [True, True, False, False]


def test_more_jobs_than_gpus_are_refused(prepared, monkeypatch):
    cells, _, options = prepared
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    study = load_study(write_study(options.root.parent), ["scales.cpu.gpu={kind: h100}"])
    with pytest.raises(run.StudyError, match="this machine has 1"):
        run_cells(cells, study.scales["cpu"], options)
    assert (
        run._environments(study.scales["cpu"], RunOptions("tiny", options.root, 1))[0]["CUDA_VISIBLE_DEVICES"]
        == "3"
    )


def test_seconds_and_machine_of_a_stage_are_recorded_while_it_runs(prepared, monkeypatch):
    (cell, *_), _, _ = prepared
    cell.directory.mkdir(parents=True)
    (cell.directory / worker.COST).write_text('{"train": 100.0}')
    monkeypatch.setattr(processes, "_CALL_S", 0.05)
    monkeypatch.setattr(worker, "device_kind", lambda: "H100")
    monkeypatch.setattr(worker, "run_entry", lambda *_: time.sleep(60) or 0)
    pid = processes.fork(lambda: worker._stage(cell, "train", [], StopFlag(), 2), None)
    deadline = time.monotonic() + 20
    while worker.seconds_spent(cell)["train"] <= 100.05 or not worker.machines_used(cell):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    processes.wait(pid, StopFlag())
    assert worker.seconds_spent(cell)["train"] > 100.05
    monkeypatch.setattr(worker, "run_entry", lambda *_: 0)
    worker._stage(cell, "evaluate", [], StopFlag(), 1)
    worker._stage(cell, "evaluate", [], StopFlag(), 2)
    device = "CPU" if cell.recipe.train.device == "cpu" else "H100"
    assert worker.machines_used(cell) == (f"2 threads, {device}", f"1 thread, {device}")
    assert json.loads((cell.directory / worker.MACHINES).read_text())["evaluate"] == [
        f"1 thread, {device}",
        f"2 threads, {device}",
    ]


def test_the_words_of_the_entry_points(prepared):
    (cell, *_), _, options = prepared
    (evaluation,) = cell.evaluations
    assert worker.training_words(cell) == [
        f"--recipe={cell.directory}/cell.yaml",
        f"--run-dir={cell.directory}",
    ]
    assert worker.evaluation_words(cell, cell.evaluations) == [
        f"--recipe={evaluation.folder}/evaluation.yaml",
        f"--out={evaluation.folder}",
        "--mode=knn",
        "--fraction=1",
        f"--features={cell.directory}/features",
        f"--checkpoint={cell.directory}",
    ]
    (cell.directory / "model").mkdir(parents=True)
    assert worker.evaluation_words(cell, cell.evaluations)[-1] == f"--checkpoint={cell.directory}/model"
    assert options.study_dir == options.root / "studies" / "tiny"


def test_frozen_modes_share_a_process_and_each_training_has_its_own(tmp_path):
    evaluations = [{"name": "trees", "modes": ["finetune", "probe", "knn"], "fractions": [1.0, 0.5]}]
    path = write_study(tmp_path, setup={"evaluations": evaluations})
    cell = expand(load_study(path), "cpu", tmp_path)[0]
    groups = [[(e.mode, e.fraction) for e in group] for group in worker.pending_evaluations(cell)]
    assert groups == [
        [("probe", 1.0), ("knn", 1.0)],
        [("probe", 0.5), ("knn", 0.5)],
        [("finetune", 1.0)],
        [("finetune", 0.5)],
    ]


def test_dry_run_lists_every_cell_with_its_cost_and_state(tmp_path):
    path = write_study(tmp_path, setup={"baselines": ["statistics"]})
    root = tmp_path / "root"
    write_results(expand(load_study(path), "cpu", root)[1])
    words = ["study", str(path), "--root", str(root), "--jobs", "1"]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if line.startswith("│")]
    table = [[cell.strip() for cell in row] for row in rows]
    assert [row[:4] for row in table] == [
        ["0", "trees target=patch seed=0", "6", "48"],
        ["1", "trees target=none seed=0", "6", "48"],
        ["2", "trees baseline=statistics seed=0", "-", "-"],
    ]
    assert [row[5] for row in table] == ["", "finished", ""]
    assert all(int(row[4]) >= 1 for row in table)
    assert "3 cells, 1 finished" in done.output
    assert not (root / "data").exists()
    printed = CliRunner().invoke(app, [*words, "--print"]).output.splitlines()
    cells = expand(load_study(path), "cpu", root)
    names = [cells[n].name for n in (0, 2)]
    assert printed == [f"maestro-scale study {path} --scale cpu --root {root} --cell {n}" for n in names]


def test_dry_run_of_a_gpu_scale_gives_gpu_hours(tmp_path):
    path = write_study(tmp_path)
    words = ["--set", "scales.cpu.gpu={kind: h100, mfu: 0.5}", "--dry-run", "--root", str(tmp_path)]
    done = CliRunner().invoke(app, ["study", str(path), *words])
    assert done.exit_code == 0, done.output
    assert "GPU hours (h100, MFU 0.5)" in done.output


def test_a_waiting_task_runs_its_cell_after_an_edit_of_the_study(tmp_path, monkeypatch):
    path, root = write_study(tmp_path), tmp_path / "root"
    sent: list[list[str]] = []
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "_sbatch", lambda options, words: sent.append([*options, *words]) or "7")
    monkeypatch.setattr(study_data, "write", lambda *_: None)
    started = StudyRun(Request(path, "", root))
    first, second = started.distinct
    started.submit(1, [])
    array, report = sent
    assert "--array=0-1%1" in array
    names = Path(array[array.index("--cells") + 1])
    assert "--cells" not in report
    assert names.read_text() == f"{first.name}\n{second.name}\n"

    ran = []
    monkeypatch.setattr(command, "run_cells", lambda cells, *_, **__: ran.extend(cells) or Outcome())
    more = {"new": {"model.target": "patch_group"}, "none": {"model.target": "none"}}
    write_study(tmp_path, factors={"target": more}, questions=[])
    edited = StudyRun(Request(path, "", root))
    assert edited.distinct[0].name != first.name
    edited.run_cell("1", names)
    assert [cell.name for cell in ran] == [second.name]
    edited.run_cell(second.name)
    assert len(ran) == 2
    for call in (lambda: edited.run_cell("0", names), lambda: edited.run_cell(first.name)):
        with pytest.raises(
            StudyError, match=f"'{first.name}': tiny-cpu has no cell of this name: its file"
        ) as e:
            call()
        assert "\n" not in str(e.value)
    with pytest.raises(StudyError, match="has the lines 0 to 1"):
        edited.run_cell("2", names)
    assert len(ran) == 2


def test_single_cells_end_the_run_of_the_study_in_mlflow_only_when_all_are_finished(tmp_path, monkeypatch):
    started = StudyRun(Request(write_study(tmp_path), "", tmp_path / "root"))
    ended: list[bool] = []
    monkeypatch.setattr(run, "preload", lambda threads: None)
    monkeypatch.setattr(run, "_write_data", lambda *_: True)
    monkeypatch.setattr(run, "run_cell", lambda cell, *_: write_results(cell) or 0)
    monkeypatch.setattr(run, "end_study", lambda *_: pytest.fail("one cell is not the study"))
    monkeypatch.setattr(command, "end_study", lambda cells, folder, complete: ended.append(complete))
    started.run_cell("0")
    assert ended == []
    started.run_cell("1")
    assert ended == [True]


def test_several_studies_are_planned_and_run_together(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, root = write_study(tmp_path / "a"), tmp_path / "root"
    levels = {"none": {"model.target": "none"}, "new": {"model.target": "patch_group"}}
    evaluations = [{"name": "trees", "modes": ["probe"]}]
    setup = {"evaluations": evaluations}
    other = write_study(tmp_path / "b", name="other", factors={"target": levels}, questions=[], setup=setup)
    words = ["study", str(first), str(other), "--root", str(root), "--jobs", "1"]
    output = CliRunner().invoke(app, [*words, "--dry-run"]).output
    assert "tiny-cpu, other-cpu: 3 cells" in output  # one is shared
    codes = {"tiny-cpu": 1, "other-cpu": 0}
    order = []

    def finish(self, report_only):
        order.append(self.options.study)
        return codes[self.options.study]

    monkeypatch.setattr(StudyRun, "finish", finish)
    assert CliRunner().invoke(app, words).exit_code == 1
    assert order == ["tiny-cpu", "other-cpu"]
    codes["tiny-cpu"] = STOPPED
    assert CliRunner().invoke(app, words).exit_code == STOPPED
    assert order[2:] == ["tiny-cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales.cpu.datasets.trees.evaluations[0].target=nope", "evaluation trees: target: no target of"),
        (
            "questions[0].margin=2",
            "question patch-none: margin is 2, and scores of species are fractions of 1",
        ),
        ("questions[0].at_least=-1", "at_least is -1"),
        ("exclude=[{dataset: trees}]", "tiny-cpu: no cell is left"),
    ],
)
@pytest.mark.parametrize("words", [["--dry-run"], [], ["--cell", "0"]], ids=["dry", "all", "cell"])
def test_what_would_fail_or_mislead_hours_later_is_refused_at_the_start(tmp_path, change, message, words):
    path, root = write_study(tmp_path), tmp_path / "root"
    done = CliRunner().invoke(app, ["study", str(path), "--root", str(root), "--set", change, *words])
    assert message in str(done.exception)
    assert not root.exists()


def test_a_question_that_no_evaluation_answers_is_named_at_the_start(tmp_path):
    words = ["study", str(write_study(tmp_path)), "--root", str(tmp_path / "root"), "--dry-run"]
    assert "warning" not in CliRunner().invoke(app, words).stderr
    done = CliRunner().invoke(app, [*words, "--set", "questions[0].mode=finetune"])
    assert "question patch-none has no answer on trees" in done.stderr


def test_options_that_exclude_each_other_are_refused(tmp_path):
    path = str(write_study(tmp_path))
    for words, message in (
        (["--dry-run", "--report"], "--dry-run and --report: give one of them"),
        (["--cells", path], "--cells: give --cell with the number of a line"),
        ([path], "tiny-cpu: two of the studies have this name"),
    ):
        assert message in str(CliRunner().invoke(app, ["study", path, *words]).exception)


def test_printed_commands_keep_the_threads(tmp_path):
    words = ["study", str(write_study(tmp_path)), "--print", "--root", str(tmp_path), "--threads"]
    assert "--threads 3" in CliRunner().invoke(app, [*words, "3"]).output
    assert "--threads" not in CliRunner().invoke(app, [*words, "0"]).output


def test_a_question_without_a_mode_compares_what_its_scale_compares(tmp_path):
    cpu = STUDY["scales"]["cpu"]
    question = {k: v for k, v in STUDY["questions"][0].items() if k != "mode"}
    own = {**question, "name": "own", "mode": "knn"}
    scales = {"cpu": cpu, "large": {**cpu, "mode": "finetune"}}
    path = write_study(tmp_path, scales=scales, questions=[question, own])
    for scale, mode in (("cpu", "probe"), ("large", "finetune")):
        study = StudyRun(Request(path, scale, tmp_path)).study
        assert [q.mode for q in study.questions] == [mode, "knn"]


def test_a_cell_number_that_does_not_exist_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["study", str(write_study(tmp_path)), "--cell", "9"])
    assert "the study has the cells 0 to 1" in str(done.exception)


def test_a_full_disk_is_reported_once(tmp_path, monkeypatch):
    """By what failed on it: the result of the study cannot be written either."""

    def refuse(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    started = StudyRun(Request(write_study(tmp_path), "", tmp_path / "root"))
    monkeypatch.setattr(command, "write_atomically", refuse)
    for failures in (["data"], []):
        monkeypatch.setattr(
            started, "run", lambda failures=failures: Outcome(finished=0, failures=list(failures))
        )
        if failures:
            assert started.finish() == 1
        else:
            with pytest.raises(OSError, match="No space left"):
                started.finish()
