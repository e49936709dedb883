"""Makes the screenshots of docs/mlflow.md: the MLflow UI on real runs, rendered by headless Chromium.

    maestro-scale quickstart --out /tmp/quickstart
    python docs/mlflow/screenshots.py /tmp/quickstart/runs

First runs what the screenshots need beyond quickstart, if it is missing (minutes): evaluations with fractions of the
labels, a registered model. Then starts `maestro-scale dashboard` on the runs, opens
each page, waits until it shows the expected content, and writes docs/mlflow/*.png. Exit code 1 if it does not, or if
the browser's console reports an error.
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
from urllib.parse import quote

from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from PIL import Image

import maestro_scale
from maestro_scale.parent_death import end_with_parent
from maestro_scale.quickstart import num_threads
from maestro_scale.tracking.views import write_views
from maestro_scale.training.distributed import free_port

RUN = "quickstart"
OTHER, OTHER_SETTING = "quickstart scratch", "train.steps"  # the same network, trained on the labels
FRACTIONS = (1, 0.3, 0.1)
PROBES = 'tags.mode = "probe"'
WIDTH, HEIGHT = 1440, 900
WAIT_S = 60.0
# Runs on every page before it loads: skips the questions and the chat panel that MLflow shows to new users, hides the
# toolbar of charts, and defines helper functions for the scripts below.
_PAGE_SETUP = """if (location.protocol === 'http:') {
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
document.addEventListener('DOMContentLoaded', () => {
    document.head.appendChild(document.createElement('style')).textContent = '.modebar {display: none}';
});
window.pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
window.type = (field, text) => {
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, text);
    field.dispatchEvent(new Event('input', {bubbles: true}));
};
window.findByText = (selector, text) =>
    [...document.querySelectorAll(selector)].find((e) => e.innerText.trim() === text);
}"""


def _expand(parent: str, name: str) -> str:
    """JavaScript that shows the runs nested in ``parent``; true once the run ``name`` is visible."""
    return f"""(async () => {{
    const isVisible = () => document.body.innerText.includes({name!r});
    if (!isVisible()) {{
        const row = [...document.querySelectorAll('.ag-row')].find((e) => e.innerText.includes({parent!r}));
        row?.querySelector('button[data-component-id*="runnamecellrenderer"]')?.click();
        await pause(2000);
    }}
    return isVisible();
}})()"""


def _search(pattern: str, shown: str, hidden: str) -> str:
    """JavaScript that filters the charts; true once ``shown`` is on the page and ``hidden`` is not."""
    return f"""(() => {{
    const field = document.querySelector('input[placeholder="Search metric charts"]');
    if (!field) return false;
    type(field, {pattern!r});
    const text = document.body.innerText;
    return text.includes({shown!r}) && !text.includes({hidden!r});
}})()"""


# Collapses the plots, which cover the page, and shows differing parameters only.
_DIFFERENCES = """(() => {
    const plots = findByText('[role="button"]', 'Visualizations');
    const switches = document.querySelectorAll('button[role="switch"][aria-label$="Show diff only"]');
    if (!plots || !switches.length) return false;
    plots.click();
    switches.forEach((s) => s.click());
    return true;
})()"""
_SCATTER = """(async () => {
    const tab = findByText('[role="tab"]', 'Scatter Plot');
    if (!tab) return false;
    tab.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
    await pause(1000);
    for (const [axis, name] of [['x', 'fraction'], ['y', 'eval/wf1']]) {
        document.querySelector(`#${axis}-axis-selector`)?.click();
        await pause(1000);
        findByText('[role="option"]', name)?.click();
        await pause(1000);
    }
    const titles = [...document.querySelectorAll('.xtitle, .ytitle')].map((title) => title.textContent);
    return titles.includes('fraction') && titles.includes('eval/wf1');
})()"""
_COLUMNS = """(async () => {
    const columns = findByText('button', 'Columns');
    if (!columns) return false;
    columns.click();
    await pause(1000);
    const missing = [];
    for (const name of ['Dataset', 'Source', 'Models', 'fraction', 'eval/wf1']) {
        const field = document.querySelector('input[placeholder="Search columns"]');
        if (field) type(field, name);
        await pause(1000);
        const box = findByText('[class*="tree-treenode"]', name)?.querySelector('[class*="tree-checkbox"]');
        if (!box) missing.push(name);
        else if (box.className.includes('-checked') === /[A-Z]/.test(name)) box.click();
        await pause(500);
    }
    columns.click();
    await pause(1000);
    return !missing.length;
})()"""


@dataclass(frozen=True)
class Page:
    """A page of the MLflow UI.

    ``path``: appended to the server's address; ``expected``: texts that must be visible; ``selector``: an element that
    must exist; ``script``: JavaScript that prepares the page, repeated until true; ``height``: of the window.
    """

    name: str
    path: str
    expected: tuple[str, ...]
    selector: str = "body"
    script: str = "true"
    height: int = HEIGHT


class Browser:
    """Headless Chromium, controlled with the DevTools protocol over a pair of pipes (--remote-debugging-pipe)."""

    def __init__(self, program: str, profile: str) -> None:
        browser_in, self._write_fd = os.pipe()
        self._read_fd, browser_out = os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads descriptor 3 and writes descriptor 4.
        shell = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(browser_in, browser_out),
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(browser_in)
        os.close(browser_out)
        self._buffer, self._last_id, self._session = b"", 0, ""
        self.errors: list[str] = []
        (target,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = {"targetId": target["targetId"], "flatten": True}
        self._session = self._call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=_PAGE_SETUP)

    def close(self) -> None:
        """Terminate the browser."""
        self._process.terminate()
        self._process.wait(20)

    def open(self, url: str, height: int = HEIGHT) -> None:
        """Open a URL with empty local storage. The blank page in between reloads the single-page application."""
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url="about:blank")
        origin = "/".join(url.split("/")[:3])
        self._call("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; None if it raises, e.g. before the page has loaded."""
        reply = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return reply.get("result", {}).get("value")

    def screenshot(self) -> bytes:
        """The visible part of the page, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        request = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(request).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            if message.get("id") == self._last_id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read_fd, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has exited")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


def missing_commands(client: MlflowClient, model: str) -> Iterator[list[str]]:
    """The commands that still have to be run, in the folder of the runs, for all screenshots."""
    programs, scripts = Path(sys.executable).parent, Path(maestro_scale.__file__).parent
    runs = _runs(client)
    evaluated = {float(r.data.params["fraction"]) for r in runs if r.data.tags.get("mode") == "probe"}
    recipe = f"--recipe={RUN}/recipe.yaml"
    for fraction in FRACTIONS:
        if fraction not in evaluated:
            evaluate = [sys.executable, str(scripts / "evaluate.py"), recipe, f"--checkpoint={RUN}"]
            yield [*evaluate, f"--fraction={fraction}", "--out=../fractions"]
    if not client.search_registered_models(f"name = '{model}'"):
        yield [str(programs / "maestro-scale"), "export", RUN, "../exported", "--register", model]


def run_missing(runs: Path, client: MlflowClient, model: str) -> None:
    """Run the missing commands. Raises SystemExit if one fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(num_threads())}
    for command in missing_commands(client, model):
        print(*command, flush=True)
        if subprocess.run(command, cwd=runs, env=env, check=False).returncode:
            raise SystemExit("the command above failed; run it in the folder of the runs for details")


def _runs(client: MlflowClient) -> list[Run]:
    """All runs of the only experiment, newest first."""
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"][:1]
    return list(client.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY, 100))


def pages(client: MlflowClient, model: str) -> Iterator[Page]:
    """The pages to show, of the pretraining of quickstart and its evaluations."""
    runs = _runs(client)
    parents = {r.data.tags.get("mlflow.parentRunId") for r in runs} - {None}
    run = next(r for r in runs if r.info.run_id in parents and r.info.run_name == RUN)
    evaluations = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    experiment = run.info.experiment_id
    here = f"#/experiments/{experiment}/runs"
    chart = ".js-plotly-plot .trace"

    def compare(chosen: list[Run]) -> str:
        ids = json.dumps([r.info.run_id for r in chosen])
        return f"#/compare-runs?runs={quote(ids)}&experiments={quote(json.dumps([experiment]))}"

    views = {view.id: view.link("", experiment).lstrip("/") for view in write_views(client, experiment)}
    yield Page("runs", views["maestro-runs"], (run.info.run_name, "brief/loss", "device"), ".ag-row")
    yield Page("training", views["maestro-training"], ("brief/loss",), chart, height=1300)
    yield Page("evaluations", views["maestro-evaluations"], ("eval/wf1",), chart, height=1300)
    losses = _search("loss", shown="aerial", hidden="downloaded_bytes")
    yield Page("charts", f"{here}/{run.info.run_id}/model-metrics", ("brief", "aerial"), chart, losses, 1300)
    speed = _search("speed/", shown="samples_per_s", hidden="downloaded_bytes")
    shown = ("data_wait_s", "samples_per_s", "tokens_per_s", OTHER)
    yield Page("throughput", f"{here}?compareRunsMode=CHART", shown, chart, speed, height=1030)
    trained = [next(r for r in runs if r.info.run_name == name) for name in (RUN, OTHER)]
    yield Page("compare", compare(trained), (OTHER_SETTING, RUN, OTHER), script=_DIFFERENCES)
    probes = [r for r in evaluations if r.data.tags["mode"] == "probe"]
    nested = next(r for r in probes if float(r.data.params["fraction"]) == 1)
    filtered = f"{here}?searchFilter={quote(PROBES)}"
    shown = ("fraction", "eval/wf1", *(r.data.params["fraction"] for r in probes))
    script = f"(async () => await {_COLUMNS} && await {_expand(RUN, probes[0].info.run_name)})()"
    yield Page("labels", filtered, shown, script=script)
    yield Page("scatter", compare(probes), ("fraction", "eval/wf1"), ".js-plotly-plot canvas", _SCATTER)
    yield Page("system", f"{here}/{run.info.run_id}/system-metrics", ("system",), chart)
    slider = _search("reconstruction", shown="reconstruction", hidden="brief/loss")
    yield Page("pictures", views["maestro-training"], ("reconstruction",), "img[src]", slider)
    classes = f"{here}/{nested.info.run_id}/artifacts/pictures/classes.png"
    yield Page("evaluation", classes, ("classes.png", "report.html"), "img[src]")
    version = f"#/models/{model}/versions/1"
    yield Page("models", version, ("newest", "treesatai_ts/probe/wf1", "score"), height=1100)


@contextmanager
def dashboard(runs: Path) -> Iterator[str]:
    """Start `maestro-scale dashboard` on the runs; yields its address once it responds."""
    port = free_port()
    program = str(Path(sys.executable).parent / "maestro-scale")
    server = subprocess.Popen(
        [program, "dashboard", str(runs), f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent(),
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


def capture(browser: Browser, address: str, page: Page) -> Image.Image:
    """A screenshot of the page, once it shows the expected content. Raises SystemExit after WAIT_S seconds."""
    browser.open(f"{address}/{page.path}", page.height)
    deadline = time.monotonic() + WAIT_S
    while not browser.evaluate(page.script) and time.monotonic() < deadline:
        time.sleep(0.5)
    while True:
        text = browser.evaluate("document.body.innerText") or ""
        drawn = browser.evaluate(f"document.querySelectorAll({page.selector!r}).length") or 0
        if all(phrase in text for phrase in page.expected) and drawn:
            time.sleep(2.0)  # charts are animated
            return Image.open(io.BytesIO(browser.screenshot()))
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{page.name} does not show {page.expected} and {page.selector}; it shows:\n{text}"
            )
        time.sleep(0.5)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder runs/ in the output of quickstart")
    parser.add_argument("--model", default="quickstart", help="name in the model registry")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="make only these screenshots")
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("no Chromium on PATH")
    client = MlflowClient(f"sqlite:///{args.runs.resolve() / 'mlflow.db'}")
    run_missing(args.runs, client, args.model)
    wanted = [page for page in pages(client, args.model) if page.name in args.only or not args.only]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, dashboard(args.runs) as address:
        browser = Browser(program, profile)
        try:
            for page in wanted:
                image = capture(browser, address, page).convert("RGB")
                image.quantize(96).save(args.out / f"{page.name}.png", optimize=True)
                print(args.out / f"{page.name}.png")
        finally:
            browser.close()
    for error in browser.errors:
        print(f"the browser's console: {error}", file=sys.stderr)
    return 1 if browser.errors else 0


if __name__ == "__main__":
    sys.exit(main())
