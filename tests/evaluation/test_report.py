"""The report: results next to the published tables, self-contained, and rendered by a browser."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from maestro_scale.escaping import printable
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.report import charts
from maestro_scale.evaluation.report.charts import class_bars
from maestro_scale.evaluation.report.groups import find_results
from maestro_scale.evaluation.report.report import write_report
from maestro_scale.evaluation.results import Architecture, EvalResult, EvaluationError
from maestro_scale.evaluation.run import score_text
from tests.testkit.hostile import NAMES

CLASSES = ("meadow", "corn", "vines")
PAPER = Architecture(768, 12, 12, 64, 4, "group", 3)  # base size, three blocks between groups
TINY = Architecture(192, 12, 3, 64, 2, "monotemp", 0)
SEGMENTED = EvalResult(
    benchmark="pastis_hd",
    metric="miou",
    mode="finetune",
    value=0.656,
    per_class={"meadow": 0.7, "corn": 0.612, "vines": None},
    interval=(0.64, 0.67),
    num_tiles=482,
    confusion=((80, 20, 0), (10, 90, 0), (0, 0, 0)),
    scores={"pixel_accuracy": 0.85},
    encoder="runs/<b>base</b>",
    architecture=PAPER,
    trained_on=("pastis_hd",),
    checkpoint_step=1000,
    recipe={"name": "<script>alert(1)</script>"},
    chosen={"lr": 0.001},
    maps={"truth": np.eye(8, dtype=np.uint8)[None] * 255, "answer": np.ones((1, 8, 8), np.uint8)},
)
LABELLED = EvalResult(
    benchmark="treesatai_ts",
    metric="wf1",
    mode="finetune",
    value=0.70,
    per_class={"Abies": 0.5, "Acer": 0.8},
    interval=(0.69, 0.71),
    num_tiles=500,
    encoder="runs/naip",
    architecture=PAPER,
    trained_on=("s2_naip",),
    checkpoint_step=500,
)


class Page(HTMLParser):
    """Texts, images and links of a page, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        if tag == "a":
            self.links.append(attrs["href"])
        if "id" in attrs:
            self.ids.append(attrs["id"])
        assert tag != "script"
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    SEGMENTED.write(folder / "a" / "results.json")
    for seed, value in enumerate((0.70, 0.72, 0.74)):
        one = dataclasses.replace(LABELLED, value=value, seeds=(seed,))
        one.write(folder / f"seed{seed}" / "results.json")
        tenth = dataclasses.replace(one, value=value - 0.2, interval=(0.45, 0.55), fraction=0.1)
        tenth.write(folder / f"seed{seed}_10pct" / "results.json")
    return folder


def test_scores_are_shown_next_to_the_published_ones(results, tmp_path):
    page, text = write_report(find_results([results]), tmp_path / "out" / "report.html")
    read = Page(page.read_text())
    words = " ".join(" ".join(read.text).split())
    assert "65.6 (64.0-67.0) -3.0" in words  # to MAESTRO's 68.6
    assert "72.0 ± 2.0 -6.8" in words  # to MAESTRO's from S2-NAIP, 78.8
    assert "MAESTRO from FLAIR-HUB 79.6 68.0 – –" in words
    assert "nan" not in words.lower()
    assert "Not in any label of the test set, so without a score: vines." in words
    assert "naip from s2_naip, step 500, finetune" in words
    markdown = text.read_text()
    assert "| **naip from s2_naip, step 500, finetune** | 72.0 ± 2.0 [-6.8] | – | – | – |" in markdown
    assert "| AnySat | 75.1 | 66.5 | 55.1 | – |" in markdown
    assert not re.search(r"\n\n\|[^\n]+\n\n\|", markdown), "a table is torn apart"


def test_the_page_is_self_contained_and_escapes_its_inputs(results, tmp_path):
    page, _ = write_report(find_results([results]), tmp_path / "report.html")
    read = Page(page.read_text())
    assert len(read.images) == 5  # bars of two benchmarks, a curve, a confusion, maps
    for image in read.images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
        assert image["alt"]
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)
    for link in read.links:
        assert link.startswith("#") or (tmp_path / link).exists()
    again, _ = write_report(find_results([results]), tmp_path / "again.html")
    assert again.read_text() == page.read_text()


def test_hostile_names_are_only_text(tmp_path):
    """Every text of a result that is from the data, the recipe or the command line."""
    num = len(NAMES)
    hostile = dataclasses.replace(
        SEGMENTED,
        per_class=dict.fromkeys(NAMES, 0.5),
        confusion=((1,) * num,) * num,
        scores=dict.fromkeys(NAMES, 0.5),
        chosen=dict.fromkeys(NAMES, 0.5),
        recipe={name: {"value": name} for name in NAMES},
        maps={
            "truth": np.arange(64, dtype=np.uint8).reshape(1, 8, 8) % num,
            "answer": np.ones((1, 8, 8), np.uint8),
        },
    )
    names = NAMES[2::4]
    for i, name in enumerate(names):
        known = "pastis_hd" if i % 2 else name  # the first table has only known benchmarks
        one = dataclasses.replace(
            hostile, benchmark=known, target=name, encoder=name, splits={"test": (name,)}
        )
        if i:  # figures of one result suffice
            one = dataclasses.replace(one, confusion=None, maps=None, recipe=None, per_class={name: 0.5})
        one = dataclasses.replace(one, trained_on=("pastis_hd", name))
        one.write(tmp_path / "results" / f"javascript:alert({i})" / "results.json")
    page, markdown = write_report(find_results([tmp_path / "results"]), tmp_path / "report.html")
    read = Page(page.read_text())  # no script, every tag closed
    assert {attribute for image in read.images for attribute in image} == {"src", "alt"}
    assert all(link.startswith(("#", "results/javascript%3Aalert")) for link in read.links)
    text = "".join(read.text)
    for name in NAMES:
        assert "\n".join(map(printable, name.split("\n"))) in text, name
    assert not set(page.read_text() + markdown.read_text()) & set("\x1b\x07\x00\r\u202e\u2028")
    rows = [line for line in markdown.read_text().splitlines() if line.startswith("| ")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[-len(names) :]}
    assert cells == {13}  # 12 columns
    assert "<script" not in re.sub(r"\\<", "", markdown.read_text())


def test_of_many_classes_the_best_are_drawn(tmp_path, monkeypatch):
    """Pictures of thousands of classes would take minutes, and have more pixels than matplotlib can draw."""
    monkeypatch.setattr("maestro_scale.evaluation.report.charts.MAX_CLASSES", 3)
    scores = {f"class {i}": i / 10 for i in range(10)}
    drawn = []
    monkeypatch.setattr("maestro_scale.evaluation.report.charts._png", drawn.append)
    class_bars({"knn": scores}, "F1")
    (axes,) = drawn[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["class 7", "class 8", "class 9"]
    assert axes.get_xlabel() == "F1 (%), the 3 best of 10 classes"


def test_invalid_results_are_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"no results\.json in there"):
        find_results([tmp_path])
    old = tmp_path / "results.json"
    SEGMENTED.write(old)
    old.write_text(old.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(EvaluationError, match=r"format version 0, this maestro-scale reads 1"):
        find_results([tmp_path])


@pytest.mark.slow
def test_a_browser_draws_every_picture(results, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; .ci/run installs it")
    program = str(Path(sys.executable).parent / "maestro-scale")
    page = tmp_path / "report.html"
    made = subprocess.run(
        [program, "report", str(results), f"--out={page}"], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert "7 results in" in made.stdout
    assert "; next: python -m webbrowser " in made.stdout
    # What the browser makes of the page, and a list of pictures it could not draw.
    check = "<script>onload=()=>document.title=JSON.stringify([...document.images].map(i=>i.naturalWidth))</script>"
    page.write_text(page.read_text().replace("</body>", check + "</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    shown = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    widths = json.loads(re.search(r"<title>(.*?)</title>", shown.stdout).group(1))
    assert len(widths) == 5
    assert min(widths) > 100
    assert "CONSOLE" not in shown.stderr, shown.stderr


def listed(*results: EvalResult, tmp_path: Path) -> list[str]:
    """Rows of ours in the Markdown of these results, each in a folder of its own."""
    for i, result in enumerate(results):
        result.write(tmp_path / "listed" / str(i) / "results.json")
    _, text = write_report(find_results([tmp_path / "listed"]), tmp_path / "listed.html")
    return [line for line in text.read_text().splitlines() if line.startswith("| **")]


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"data": {"mixture": [{"crop_m": 80}]}}},
        {"mode": "finetune", "recipe": {"optim": {"base_lr": 1.0}}},
        {"mode": "finetune", "recipe": {"train": {"steps": 7}}},
        {"splits": {"test": ("other",)}},
        {"mode": "scratch", "encoder": "image:vit"},
        {"datasets": {"treesatai_ts": "b" * 64}},  # other tiles under the same name
        {"weights": "c" * 64},  # another model at the same path
        {"mode": "finetune", "recipe": {"data": {"flips": False}}},
        {"value": 0.5},  # of the same seed: another run of it, whatever the reason
        {"mode": "knn", "encoder": "random", "recipe": {"model": {"size": "small"}}},
    ],
)
def test_results_that_differ_in_more_than_seed_and_fold_are_not_averaged(tmp_path, change):
    common = ("mode",) if change.get("encoder") != "random" else ("mode", "encoder")
    one = dataclasses.replace(LABELLED, **{k: v for k, v in change.items() if k in common})
    one = dataclasses.replace(one, datasets={"treesatai_ts": "a" * 64})
    other = {"value": 0.6, "seeds": (1,), **change} if "value" not in change else change
    rows = listed(one, dataclasses.replace(one, **other), tmp_path=tmp_path)
    assert len(rows) == 2
    assert not any("±" in row for row in rows)


def test_other_targets_and_metrics_are_not_scores_of_the_benchmark(tmp_path):
    other = dataclasses.replace(
        LABELLED, benchmark="pastis_hd", target="crops_present", value=0.2, trained_on=("pastis_hd",)
    )
    main = dataclasses.replace(SEGMENTED, target="crop_type")
    (row,) = listed(main, other, tmp_path=tmp_path)
    assert "65.6 (64.0-67.0) [-3.0]" in row
    text = (tmp_path / "listed.md").read_text()
    assert "| pastis_hd: crop_type |" in text
    assert "| pastis_hd: crops_present |" in text


def test_a_copy_counts_once_and_seeds_are_one_line(tmp_path):
    seeds = [dataclasses.replace(LABELLED, seeds=(s,), value=0.7 + s / 100) for s in (0, 2)]
    (row,) = listed(*seeds, seeds[0], tmp_path=tmp_path)
    assert "71.0 ± 1.4" in row


def test_image_encoders_are_shown_next_to_the_published_ones(tmp_path):
    image = dataclasses.replace(
        SEGMENTED, encoder="image:facebook/dinov2-base", architecture=None, trained_on=(), checkpoint_step=0
    )
    listed(image, dataclasses.replace(image, mode="scratch"), tmp_path=tmp_path)
    text = (tmp_path / "listed.md").read_text()
    intra, cross = text.split("## Real data, finetuned: pretrained elsewhere")
    assert "| **dinov2-base, finetune** | – | 65.6 (64.0-67.0) [+1.2] |" in cross
    assert "| **dinov2-base (not pretrained), scratch** |" in intra


@pytest.mark.parametrize(
    ("encoder", "difference"),
    [
        ("image:facebook/dinov2-base", "[+1.2]"),  # to 64.4
        ("image:/weights/dinov2-base/", "[+1.2]"),
        ("image:dinov2-base", "[+1.2]"),
        ("image:facebook/dinov2-small", None),  # another size
        ("image:/weights/dinov2-sat", None),  # other weights
        ("image:/home/dinov2/vit-mae-base", None),
        ("image:/home/dinov2-base/vit-mae-base", None),
        ("presto:/data/dinov2/default_model.pt", None),
        ("presto:/data/dinov2-base", None),
    ],
)
def test_the_published_image_encoder_is_known_by_the_name_of_its_weights(tmp_path, encoder, difference):
    image = dataclasses.replace(SEGMENTED, encoder=encoder, architecture=None, trained_on=())
    listed(image, tmp_path=tmp_path)
    text = (tmp_path / "listed.md").read_text()
    assert re.findall(r"\[[+-][\d.]+\]", text) == ([difference] if difference else [])


def test_folds_of_several_jobs_are_the_official_test_together(tmp_path):
    folds = [
        dataclasses.replace(SEGMENTED, folds=(k,), splits={"test": (f"fold_{(k + 3) % 5 + 1}",)}, maps=None)
        for k in range(1, 6)
    ]
    (row,) = listed(*folds, tmp_path=tmp_path / "all")
    assert "[-3.0]" in row
    (row,) = listed(*folds[:4], tmp_path=tmp_path / "four")
    assert "65.6" in row
    assert "[" not in row


def test_an_oracle_of_other_tiles_is_not_shown(tmp_path):
    score = dataclasses.replace(SEGMENTED, splits={"test": ("fold_5",)})
    oracle = dataclasses.replace(
        score, mode="oracle", encoder="oracle", value=0.9, splits={"test": ("fold_1",)}
    )
    (row,) = listed(score, oracle, tmp_path=tmp_path)
    assert "oracle" not in row
    score, oracle = (
        dataclasses.replace(r, splits={}, datasets={"pastis_hd": digest * 64})
        for r, digest in ((score, "a"), (oracle, "b"))
    )
    (row,) = listed(score, oracle, tmp_path=tmp_path)
    assert "oracle" not in row


def test_a_curve_over_labels_is_of_one_encoder_and_dataset(tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr(charts, "label_curves", lambda found, kind, units: curves.extend(found) or b"png")
    points = [
        ("a/model", "d", 1.0, 0.7),
        ("a/model", "d", 0.1, 0.4),
        ("b/model", "d", 0.1, 0.9),
        ("a/model", "e", 0.5, 0.8),
    ]
    listed(
        *(
            dataclasses.replace(LABELLED, encoder=e, datasets={"treesatai_ts": d}, fraction=f, value=v)
            for e, d, f, v in points
        ),
        tmp_path=tmp_path,
    )
    assert [curve.values for curve in curves] == [[0.4, 0.7]]


def counted(hits: str, encoder: str, seed: int = 0, **changes) -> EvalResult:
    """A result whose wF1 is the share of tiles that are hits."""
    array = np.array([[[1], [0], [0]] if hit == "1" else [[0], [1], [1]] for hit in hits])
    counts = TileCounts(tuple(f"t{i}" for i in range(len(hits))), array)
    value = hits.count("1") / len(hits)
    result = dataclasses.replace(LABELLED, encoder=encoder, value=value, seeds=(seed,), num_tiles=len(hits))
    return dataclasses.replace(result, counts=counts, **changes)


def test_results_on_the_same_tiles_are_compared_in_pairs(tmp_path):
    listed = [
        counted("1110", "runs/ours"),
        counted("1000", "runs/<b>theirs</b>"),
        counted("1111", "oracle", mode="oracle"),
        counted("11101", "runs/more"),
        counted("1110", "runs/other", datasets={"treesatai_ts": "b" * 64}),
        dataclasses.replace(counted("1100", "runs/old"), counts=None),
    ]
    listed[0] = dataclasses.replace(listed[0], datasets={"treesatai_ts": "a" * 64})
    for number, result in enumerate(listed):
        result.write(tmp_path / str(number) / "results.json")
    page, text = write_report(find_results([tmp_path / str(n) for n in range(6)]), tmp_path / "r.html")
    # Differences of the tiles 0, 1, 1, 0: 1/2 ± 3.1824 · √(1/12), see test_paired.py.
    row = r"| treesatai_ts | ours, finetune | b\>, finetune | +50.0 | -41.9 to +141.9 | 4 tiles |"
    section = text.read_text().split("## Differences on the same tiles")[1].split("## Every result")[0]
    assert [line for line in section.splitlines() if line.startswith("| treesat")] == [row]
    words = " ".join(" ".join(Page(page.read_text()).text).split())
    assert (
        "Differences on the same tiles score minus difference 95 % interval over ours, finetune b>, finetune +50.0"
        in words
    )


def test_counts_that_cannot_be_used_are_named(tmp_path, caplog):
    for name, hits in (("a", "1110"), ("b", "1000"), ("old", "1100")):
        result = counted(hits, f"runs/{name}")
        result = dataclasses.replace(result, counts=None) if name == "old" else result
        result.write(tmp_path / name / "results.json")
    (tmp_path / "a" / "counts.npz").write_bytes((tmp_path / "b" / "counts.npz").read_bytes())
    _, text = write_report(find_results([tmp_path / n for n in ("b", "a", "old")]), tmp_path / "r.html")
    assert "minus" not in text.read_text()
    (line,) = caplog.messages
    assert line.startswith("no differences of a, finetune: ")
    assert "counts.npz cannot be read (is not the file of this result)" in line


def test_seeds_of_results_are_compared_in_pairs(tmp_path):
    for seed, (ours, theirs) in enumerate((("1110", "1000"), ("1100", "1000"))):
        counted(ours, "runs/ours", seed).write(tmp_path / "a" / str(seed) / "results.json")
        counted(theirs, "runs/theirs", seed).write(tmp_path / "b" / str(seed) / "results.json")
    _, text = write_report(find_results([tmp_path / "b", tmp_path / "a"]), tmp_path / "r.html")
    assert "theirs, finetune | ours, finetune | -37.5 |" in text.read_text()
    assert "| 2 seeds, 4 tiles |" in text.read_text()


def test_an_unwritable_report_is_named(results, tmp_path):
    found = find_results([results])
    for out in (tmp_path / "report.md", tmp_path):
        with pytest.raises(EvaluationError, match=re.escape(f"--out {out}: name an .html file")):
            write_report(found, out)
    (results / "a" / "maps.npz").write_bytes(b"no archive")
    with pytest.raises(EvaluationError, match=r"maps\.npz cannot be read"):
        write_report(found, tmp_path / "report.html")


def sections(*results: EvalResult, tmp_path: Path) -> dict[str, str]:
    """{title: text} of the Markdown of these results."""
    listed(*results, tmp_path=tmp_path)
    parts = (tmp_path / "listed.md").read_text().split("\n## ")
    return {part.partition("\n")[0]: part for part in parts[1:]}


OWN = "Real data, finetuned: pretrained on the benchmark's own data"


def test_synthetic_data_and_frozen_encoders_have_tables_of_their_own(tmp_path):
    real = dataclasses.replace(SEGMENTED, synthetic=False)
    found = sections(
        real,
        dataclasses.replace(real, mode="probe", value=0.5),
        dataclasses.replace(real, synthetic=True, value=0.4, encoder="toy"),
        dataclasses.replace(real, synthetic=True, mode="knn", value=0.3, encoder="toy"),
        tmp_path=tmp_path,
    )
    assert "65.6 (64.0-67.0) [-3.0]" in found[OWN]
    assert "50.0" in found["Real data, frozen encoder"]
    assert "40.0" in found["Synthetic data, finetuned"]
    assert "30.0" in found["Synthetic data, frozen encoder"]
    others = [text for title, text in found.items() if title != OWN and "pretrained elsewhere" not in title]
    assert not any("[" in text or "AnySat" in text for text in others)
    assert "toy" not in found[OWN]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, "[-3.0]"),
        ({"splits": {"test": ("fold_5",)}}, "[-3.0]"),
        ({"splits": {"test": ("mine",)}}, None),  # other tiles
        ({"synthetic": True}, None),
        ({"mode": "probe"}, None),  # the published are finetuned
        ({"fraction": 0.5}, None),
        ({"mode": "scratch", "trained_on": ()}, "[+1.1]"),  # to the supervised ViT, 64.5
        ({"trained_on": ("pastis_hd", "flair_hub")}, None),
        ({"trained_on": ("flair_hub",)}, "[-2.4]"),  # to 68.0
        (
            {"architecture": dataclasses.replace(PAPER, inter_depth=0)},
            "[-3.2]",
        ),  # no inter-group blocks: 68.8
        ({"architecture": dataclasses.replace(PAPER, inter_depth=1)}, None),
        ({"architecture": dataclasses.replace(PAPER, fusion="mod")}, None),
        ({"architecture": dataclasses.replace(PAPER, width=384)}, None),
        ({"architecture": None}, None),  # of an earlier revision
        ({"architecture": TINY}, None),
        ({"architecture": TINY, "trained_on": ("flair_hub",)}, None),
        ({"architecture": TINY, "mode": "scratch", "trained_on": ()}, None),
        ({"architecture": None, "mode": "scratch", "trained_on": (), "encoder": "image:dinov2-base"}, None),
        ({"folds": (1,), "splits": {"test": ("fold_5",)}}, "[-3.0]"),
        ({"folds": (3,), "splits": {"test": ("fold_2",)}}, None),
        ({"folds": (3,)}, None),
        ({"folds": (1, 2, 3, 4), "splits": {"test": ("fold_5", "fold_1", "fold_2", "fold_3")}}, None),
        ({"folds": (5, 4, 3, 2, 1), "splits": {"test": tuple(f"fold_{k}" for k in range(1, 6))}}, "[-3.0]"),
    ],
)
def test_a_difference_is_to_the_same_data_split_mode_and_metric(tmp_path, change, difference):
    changes = {"splits": {}, "synthetic": False} | change
    listed(dataclasses.replace(SEGMENTED, **changes), tmp_path=tmp_path)
    text = (tmp_path / "listed.md").read_text()
    assert re.findall(r"\[[+-][\d.]+\]", text) == ([difference] if difference else [])


def test_data_that_the_oracle_accepts_is_synthetic(tmp_path):
    old = dataclasses.replace(SEGMENTED, datasets={"pastis_hd": "a" * 64})
    oracle = dataclasses.replace(old, mode="oracle", encoder="oracle", value=0.9)
    found = sections(old, oracle, tmp_path=tmp_path)
    assert "65.6 (64.0-67.0) (oracle 90.0)" in found["Synthetic data, finetuned"]
    assert "65.6" not in found[OWN]


def test_runs_that_agree_by_construction_keep_their_interval(tmp_path):
    (row,) = listed(*(dataclasses.replace(LABELLED, seeds=(s,)) for s in range(3)), tmp_path=tmp_path)
    assert "70.0 (69.0-71.0)" in row
    mean = dataclasses.replace(LABELLED, deviation=0.0, seeds=(0, 1, 2))
    assert score_text(mean) == "wF1 70.0 (69.0-71.0) over 3 seeds"


def test_templates_of_the_paper_are_there_with_empty_cells(tmp_path):
    found = sections(LABELLED, dataclasses.replace(LABELLED, fraction=0.1, value=0.6), tmp_path=tmp_path)
    transfer = found["Real data, finetuned: by pretraining data"].splitlines()
    assert "| s2_naip, finetune | 70.0 (69.0-71.0) | – | – | – | " in transfer
    assert "| the benchmark's own data | – | – | – | – | " in transfer
    assert "| flair_hub | – | – | – | – | " in transfer
    few = found["Real data, few labels: treesatai_ts"]
    assert "| naip from s2_naip, finetune | – | 60.0 (69.0-71.0) | 70.0 (69.0-71.0) | " in few
    empty = sections(SEGMENTED, tmp_path=tmp_path / "other")["Real data, few labels: TreeSatAI-TS"]
    assert "| – | – | – | – | " in empty


def test_a_regression_is_shown_in_its_units_lowest_first(tmp_path):
    one = EvalResult(
        "fuel", "rmse", "probe", 31.2, {}, (29.0, 33.0), 5, scores={"r2": -0.31, "mae": 22.14}, units="%"
    )
    maps = {name: np.full((1, 4, 4), value, np.float32) for name, value in (("truth", 1), ("answer", 2))}
    best = dataclasses.replace(one, value=9.04, interval=(8.0, 10.1), encoder="b", maps=maps, fraction=1.0)
    found = sections(one, best, tmp_path=tmp_path)["fuel (real data, frozen encoder)"]
    assert "| method | RMSE (%) | R² | MAE (%) | " in found
    assert found.index("9.04 (8.00-10.1)") < found.index("31.2 (29.0-33.0) | -0.310 | 22.1")
    assert "lower is better" in found
    assert score_text(one) == "RMSE 31.2 (29.0-33.0) %"
    assert "labels and predictions" in (tmp_path / "listed.html").read_text()


def test_copies_that_mlflow_keeps_beside_the_runs_are_no_results(tmp_path):
    LABELLED.write(tmp_path / "runs" / "a" / "knn" / "results.json")
    LABELLED.write(tmp_path / "runs" / "mlartifacts" / "1" / "artifacts" / "results.json")
    (found,) = find_results([tmp_path / "runs"])
    assert found.path == tmp_path / "runs" / "a" / "knn" / "results.json"
