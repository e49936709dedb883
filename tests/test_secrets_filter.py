"""The secrets filter hides credentials in URLs, settings and commands, and nothing else."""

import time

import pytest

from maestro_scale.secrets_filter import (
    HIDDEN,
    is_secret_name,
    scrub,
    scrub_command,
    scrub_document,
    scrub_mapping,
    scrub_tree,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("s3://key:sec/ret@bucket/a", "s3://bucket/a"),
        ("https://user:p@ss@host:5000/x", "https://host:5000/x"),
        ("https://token@host", "https://host"),
        ("https://h/x?a=1&X-Amz-Signature=ab12&b=2", f"https://h/x?a=1&X-Amz-Signature={HIDDEN}&b=2"),
        ("https://h/x?sv=1&sig=ab%2B&b=2", f"https://h/x?sv=1&sig={HIDDEN}&b=2"),
        (
            "http://h/#/x?viewStateShareKey=maestro-runs&key=ab",
            f"http://h/#/x?viewStateShareKey=maestro-runs&key={HIDDEN}",
        ),
        ("hf_abcdefghijklmnopqrstuvwxyz", HIDDEN),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", f"Authorization: Basic {HIDDEN}"),
        (
            "AccountName=a;AccountKey=ab/cd==;EndpointSuffix=b",
            f"AccountName=a;AccountKey={HIDDEN};EndpointSuffix=b",
        ),
        ("github_pat_11ABCDEFG0abcdefghijklm", HIDDEN),
        ("glpat-abcdefghij1234567890", HIDDEN),
        # innocent
        ("http://127.0.0.1:9000/path@2", "http://127.0.0.1:9000/path@2"),
        ("s3://bucket/tiles/a@2x.tar", "s3://bucket/tiles/a@2x.tar"),
        ("sqlite:////data/runs/mlflow.db", "sqlite:////data/runs/mlflow.db"),
        ("mail someone@host", "mail someone@host"),
    ],
)
def test_urls_and_tokens(text, left):
    assert scrub(text) == left


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "aws_secret_access_key",
        "data.s3.secret_key",
        "a.password",
        "x.api_key",
        "DB_PASS",
        "MYSQL_PWD",
        "SSH_PASSPHRASE",
        "AZURE_STORAGE_CONNECTION_STRING",
    ],
)
def test_secret_names(name):
    assert is_secret_name(name)
    assert scrub_mapping({name: "value"}) == {name: HIDDEN}


@pytest.mark.parametrize(
    "name",
    ["model.norm", "token_groups", "num_tokens", "checkpoint.keep", "train.audit", "key", "PWD", "OLDPWD"],
)
def test_innocent_names(name):
    assert scrub_mapping({name: 3}) == {name: "3"}


def test_values_of_secret_variables_are_hidden_anywhere(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "0123456789abc")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    assert scrub("x=0123456789abc, enabled: true") == f"x={HIDDEN}, enabled: true"


def test_a_secret_that_is_part_of_another_one(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-ijklmnop")
    assert scrub("abcdefgh-ijklmnop abcdefgh") == f"{HIDDEN} {HIDDEN}"


@pytest.mark.parametrize("text", ["://a:" * 50_000, "?" + "key" * 50_000, "a@b" + "://a:" * 50_000])
def test_long_texts_are_searched_in_linear_time(text):
    started = time.process_time()
    assert scrub(text) == text
    assert time.process_time() - started < 1


def test_documents_keep_their_form():
    text = "name: run\nstore:\n  secret_key: abc\n  region: eu\ncredentials:\n  user: me\n"
    assert scrub_document(text) == text.replace("abc", f'"{HIDDEN}"')
    assert (
        scrub_document('{\n "password": "abc",\n "n": 1\n}') == f'{{\n "password": "{HIDDEN}",\n "n": 1\n}}'
    )


def test_trees_keep_their_form():
    tree = {
        "name": "run",
        "comet": {"api_key": "abc", "n": 1, "token": None},
        "shards": ["s3://k:s@b/x?token=1"],
    }
    assert scrub_tree(tree) == {
        "name": "run",
        "comet": {"api_key": HIDDEN, "n": 1, "token": None},
        "shards": [f"s3://b/x?token={HIDDEN}"],
    }


def test_a_command_is_shown_without_its_secrets():
    words = [
        "train.py",
        "--set",
        "deepspeed.comet.api_key=abc",
        "train.steps=3",
        "--token",
        "abc",
        "--password=abc",
    ]
    words += ["deepspeed={comet: {enabled: false, api_key: abc}}", "data.mixture=[{token: abc}]"]
    shown = scrub_command([*words, "--out", "a b"])
    assert "abc" not in shown
    assert shown.startswith("train.py --set")
    assert "deepspeed.comet.api_key=" in shown
    assert " '--password=(hidden)' " in shown
    assert shown.endswith(" --out 'a b'")
    assert "train.steps=3" in shown
    assert '"enabled": false' in shown
