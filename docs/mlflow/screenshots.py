"""The pictures of docs/mlflow.md: MLflow's own pages on real runs, drawn by headless Chromium.

    maestro-scale quickstart --out /tmp/quickstart
    cd /tmp/quickstart/runs
    python MAESTRO_SCALE/evaluate.py --recipe quickstart/recipe.yaml --checkpoint quickstart --out ../results
    maestro-scale export quickstart ../exported --register quickstart
    python docs/mlflow/screenshots.py /tmp/quickstart/runs

Starts `maestro-scale dashboard` on the runs, opens each page, waits until what it must show is there, and writes
docs/mlflow/*.png. Exit code 1 where a page does not show it, or the browser's console tells of an error.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from PIL import Image

from maestro_scale.training.distributed import free_port

WIDTH, HEIGHT = 1440, 900
WAIT_S = 60.0
# Whoever comes first is asked about language models, with a chat panel over the page.
_SETTLE = """if (location.protocol === 'http:') {
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
}"""


_UNFOLD = """(() => {
    const folded = document.querySelector('button[aria-label="Expand"], .ag-cell [role="button"], .ag-row button');
    folded?.click();
    return Boolean(folded);
})()"""
_SEARCH = """(() => {
    const field = document.querySelector('input[placeholder="Search metric charts"]');
    if (!field) return false;
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, 'loss');
    field.dispatchEvent(new Event('input', {bubbles: true}));
    const shown = document.body.innerText;
    return shown.includes('aerial') && !shown.includes('downloaded_bytes');
})()"""


@dataclass(frozen=True)
class Page:
    """``path``: behind the address; ``shows``: texts that must be on it; ``selector``: what must be drawn on it.
    ``script``: JavaScript that changes what is shown; tried until it is true."""

    name: str
    path: str
    shows: tuple[str, ...]
    selector: str = "body"
    script: str = "true"


class Browser:
    """Chromium, spoken to in its DevTools protocol over a pair of pipes (--remote-debugging-pipe)."""

    def __init__(self, program: str, profile: str) -> None:
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads descriptor 3 and writes descriptor 4.
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._count, self._session, self.errors = b"", 0, "", []
        (target,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = {"targetId": target["targetId"], "flatten": True}
        self._session = self._call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=_SETTLE)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)

    def open(self, url: str) -> None:
        """Go to a page; from one to another of a single-page application too."""
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; None where it cannot be had yet."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer.get("result", {}).get("value")

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") == "Runtime.exceptionThrown":
                details = answer["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._from, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser is gone")
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


def pages(client: MlflowClient, model: str) -> Iterator[Page]:
    """What to show, of the newest training run that was evaluated."""
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"][:1]
    runs = client.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY, 100)
    parents = {r.data.tags.get("mlflow.parentRunId") for r in runs} - {None}
    run = next(r for r in runs if r.info.run_id in parents)
    nested = next(r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id)
    here = f"#/experiments/{experiment.experiment_id}/runs"
    picture = client.list_artifacts(run.info.run_id, "pictures")[-1].path
    yield Page("runs", here, (run.info.run_name, nested.info.run_name), script=_UNFOLD)
    yield Page(
        "charts",
        f"{here}/{run.info.run_id}/model-metrics",
        ("total", "aerial"),
        ".js-plotly-plot .trace",
        _SEARCH,
    )
    yield Page("system", f"{here}/{run.info.run_id}/system-metrics", ("system",), ".js-plotly-plot .trace")
    yield Page("pictures", f"{here}/{run.info.run_id}/artifacts/{picture}", (Path(picture).name,), "img[src]")
    classes = f"{here}/{nested.info.run_id}/artifacts/pictures/classes.png"
    yield Page("evaluation", classes, ("classes.png", "report.html"), "img[src]")
    yield Page("models", f"#/models/{model}", (model, "Version 1"))


@contextmanager
def dashboard(runs: Path) -> Iterator[str]:
    """`maestro-scale dashboard` on the runs, once it answers; its address."""
    port = free_port()
    program = str(Path(sys.executable).parent / "maestro-scale")
    server = subprocess.Popen(
        [program, "dashboard", str(runs), f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def draw(browser: Browser, address: str, page: Page) -> Image.Image:
    """The page's picture, once it shows what it must. SystemExit where it does not within a minute."""
    browser.open(f"{address}/{page.path}")
    deadline = time.monotonic() + WAIT_S
    while not browser.evaluate(page.script) and time.monotonic() < deadline:
        time.sleep(0.5)
    while True:
        text = browser.evaluate("document.body.innerText") or ""
        drawn = browser.evaluate(f"document.querySelectorAll({page.selector!r}).length") or 0
        if all(words in text for words in page.shows) and drawn:
            time.sleep(2.0)  # charts move into place
            return Image.open(io.BytesIO(browser.picture()))
        if time.monotonic() > deadline:
            raise SystemExit(f"{page.name} does not show {page.shows} and {page.selector}; it shows:\n{text}")
        time.sleep(0.5)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, help="folder with run directories, one of them evaluated and registered"
    )
    parser.add_argument("--model", default="quickstart", help="name in the registry")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("no Chromium on PATH")
    client = MlflowClient(f"sqlite:///{args.runs.resolve() / 'mlflow.db'}")
    wanted = list(pages(client, args.model))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, dashboard(args.runs) as address:
        browser = Browser(program, profile)
        try:
            for page in wanted:
                picture = draw(browser, address, page).convert("RGB")
                picture.quantize(96).save(args.out / f"{page.name}.png", optimize=True)
                print(args.out / f"{page.name}.png")
        finally:
            browser.close()
    for error in browser.errors:
        print(f"the browser's console: {error}", file=sys.stderr)
    return 1 if browser.errors else 0


if __name__ == "__main__":
    sys.exit(main())
