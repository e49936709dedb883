"""The script in docs/shards.md writes a valid dataset."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.read.verify import verify

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"


def block(name: str) -> str:
    return re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


def test_the_documented_script_writes_a_valid_dataset(tmp_path):
    example = Manifest.loads(block("manifest"))
    (tmp_path / "example.json").write_text(block("manifest"))
    (tmp_path / "write.py").write_text(block("script"))
    folder = tmp_path / "orchards"
    folder.mkdir()
    command = [sys.executable, str(tmp_path / "write.py"), str(folder), str(tmp_path / "example.json")]
    subprocess.run(command, check=True)
    assert verify(str(folder)) == []
    manifest = Manifest.load(str(folder))
    assert manifest.spec == example.spec
    (split,) = summarize(str(folder)).splits
    assert split.classes["fruit"] == {"apple": 40, "pear": 40, "plum": 0}
    assert split.months["s2"][0] == 2 * 40
    with Store(str(folder), tmp_path / "cache", 0).shard(manifest.shards[0]) as shard:
        assert sorted(shard.keys) == sorted(f"orchard.{i}" for i in range(40))
        assert shard[0].array("s2").shape == (12, 2, 6, 6)
    # verify has compared the index with the tar, if there is one; here: there is one.
    index = ShardIndex.loads((folder / "train-000000.index.json").read_text(), "index")
    assert len(index.keys) == 40
    (folder / "train-000000.index.json").unlink()
    assert verify(str(folder)) == []
    listed = json.loads(block("manifest"))["shards"][0]
    assert listed["samples"] == manifest.shards[0].samples
    assert listed["bytes"] == manifest.shards[0].bytes
