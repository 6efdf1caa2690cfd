"""The page in a real Chromium, on the built-in model: one server and one browser for all tests. Skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch

import patchbay as pb
from patchbay.papers.feed import opened
from patchbay.papers.feed.listed import Listed
from patchbay.results.result import Result

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here (pip install playwright)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]
PROMPT = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is"
AXE = Path(__file__).parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
WAIT = 120_000  # milliseconds, on a machine that does other work
SLOW = "facts_in_context:n=192"

CONTRAST = """() => {
  const light = ([r, g, b]) => { const f = [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * f[0] + .7152 * f[1] + .0722 * f[2] };
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const ground = (node) => { for (let at = node; at; at = at.parentElement) { const c = parse(getComputedStyle(at).backgroundColor); if (c.length && (c.length < 4 || c[3] > .99)) return c; } return [255, 255, 255] };
  const poor = [];
  for (const node of document.querySelectorAll(".pb *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    const look = getComputedStyle(node);
    if (!own || look.visibility === "hidden" || !node.getClientRects().length || node.disabled || node.closest(":disabled, .hidden, .skip")) continue;
    const ink = node instanceof SVGElement ? look.fill : look.color;
    const [a, b] = [light(parse(ink)), light(ground(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(node.className + " " + node.textContent.trim().slice(0, 30) + " " + ratio.toFixed(2));
  }
  return poor;
}"""


def fill(folder: Path) -> None:
    """One Result of every view, and one that is damaged."""
    model = pb.load("tiny")
    pb.find.logit_lens(model, PROMPT).save(folder / "lens")
    pb.run(model, PROMPT, taps=["L1.attn.pattern"]).show("L1.H3.pattern").save(folder / "pattern")
    pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=8)).save(folder / "attribution")
    g = torch.Generator().manual_seed(0)
    effect = torch.linspace(0, 2, 5, dtype=torch.float64)
    dose = {
        name: (effect + shift, ("strength",), "logits")
        for name, shift in (
            ("effect", 0.0),
            ("effect_low", -0.5),
            ("effect_high", 0.5),
            ("chance_low", -1.0),
            ("chance_high", 0.1),
        )
    }
    Result(dose, coords={"strength": [0.0, 0.5, 1.0, 2.0, 4.0]}).save(folder / "dose")
    bars = {
        "effect": ([3.0, -1.0], ("part",), "logits"),
        "low": ([2.0, -2.0], ("part",), "logits"),
        "high": ([4.0, 0.0], ("part",), "logits"),
        "null_mean": ([0.1, 0.1], ("part",), "logits"),
        "joint": (2.5, (), "logits"),
    }
    Result(
        bars, parts=["L1.H3", "L0.mlp"], tables={"draws": [{"draw": 1, "parts": "<b>bold</b>"}]}, notes=["<img src=x>"]
    ).save(folder / "bars")
    tokens = [f" word{i}" for i in range(1024)]
    long = torch.rand(2, 1024, 1024, generator=g).tril()
    Result(long, ("head", "query", "key"), "attention", coords={"query": tokens, "key": tokens}).save(folder / "long")
    Result(torch.randn(32, 32, generator=g), ("layer", "head"), "logits").save(folder / "grid")
    pb.turn.scale("L1.H1", 0.0).save(folder / "off.knob")
    edges = [{"edge": f"L0.H{i} -> L{1 + i % 2}.H{i}.{'qkv'[i % 3]}", "effect": (-1.0) ** i * (i + 1), "p_adjusted": 0.02 * i} for i in range(4)]  # fmt: skip
    Result({"effect": (1.0, (), "logits")}, tables={"edges": edges}).save(folder / "edges")
    Result(torch.randn(32, 32, generator=g), ("layer", "head"), "logits").save(folder / "grid-again")
    ends = {"low": (0.5, (), "share"), "high": (0.875, (), "share"), "null": ([0.0, -0.25, 0.125], ("draw",), "share")}
    groups = [{"group": "short", "value": 0.625, "low": 0.25, "high": 0.75}, {"group": "long", "value": -0.5}]
    Result({"recovered": (0.75, (), "share")} | ends, tables={"groups": groups}).save(folder / "number")
    shutil.copytree(folder / "lens", folder / "cut")
    (folder / "cut" / "arrays.safetensors").write_bytes(b"cut")


def extras(folder: Path) -> list[str]:
    """A dictionary of the model and a store with three papers, as options."""
    rows = torch.eye(128)[:24]
    pb.Dictionary(rows.T, rows, torch.zeros(24), torch.zeros(128), layer=1, reads="resid_out").save(folder / "sae")
    with opened.opened(folder / "papers.sqlite", make=True) as store:
        listed = [
            Listed(f"Zebras {i} <i>run</i>", f"Number {i}.", f"2501.0000{i}", published=date(2025, 1, i), likes=i)
            for i in (1, 2, 3)
        ]
        store.add(listed, "test")
    return ["--dictionary", str(folder / "sae"), "--store", str(folder / "papers.sqlite")]


class Site:
    """A running server, and pages of one browser in it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        env = os.environ | {"PYTHONPATH": str(Path(pb.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-m", "patchbay", "ui", "tiny", "--results", str(folder), "--no-browser", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None
        found = next((m[1] for line in self.process.stdout if (m := re.match(r"open (\S+)", line))), "")
        self.start, self.base = found, found.partition("?")[0]

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("results")
    fill(folder)
    made = Site(folder, *extras(tmp_path_factory.mktemp("extras")))
    yield made
    if made.process.poll() is None:
        made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def context(browser: Any, site: Site) -> Iterator[Any]:
    made = browser.new_context(viewport={"width": 1280, "height": 900})
    made.set_default_timeout(WAIT)
    asked: list[str] = []
    made.on("request", lambda request: asked.append(request.url))
    page = made.new_page()
    page.goto(site.start)
    page.wait_for_selector("text=Results")
    page.close()
    yield made
    strange = [url for url in asked if not url.startswith((site.base, "data:", "blob:", "file:"))]
    made.close()
    assert not strange, "the page asked somebody else"


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    made, faults = context.new_page(), []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on(
        "console",
        lambda said: (
            faults.append(said.text)
            if said.type == "error" and not re.search("400 .Bad Request|ERR_CONNECTION_REFUSED", said.text)
            else None
        ),
    )
    yield made
    made.close()
    assert not faults


VIEWS = {
    "papers": ".paper",
    "papers?view=month": ".paper",
    "papers?words=no+such+words": ".empty",
    "paper/olsson2022": ".claim",
    f"knobs?text={quote(PROMPT)}": ".sides .text span",
    "results/edges": ".cable",
    "features/L1.F3": ".actives li",
    "compare?a=grid&b=grid-again": ".beside canvas",
    "results": ".entries li",
    "results/lens": ".heat canvas",
    "results/pattern": ".tokens button",
    "results/attribution": ".bars li",
    "results/dose": ".curve path.line",
    "results/bars": ".bar-track .whisker",
    "results/number": ".bar-track .draw",
    "results/long": ".heat canvas",
    "results/off.knob": ".edits code",
    "results/cut": "[role=alert]",
    "find": ".methods li",
    "prove/ablation": "form .field",
    "model/L1.H3": "#part table",
    f"prompt?text={quote(PROMPT)}": ".thumbs canvas",
    "runs": "main h1",
    "nowhere": "[role=alert]",
}


def open_(page: Any, site: Site, path: str) -> None:
    page.goto(f"{site.base}#/{path}")
    page.reload()
    page.wait_for_selector(VIEWS.get(path, "main h1"))


@pytest.mark.parametrize("path", list(VIEWS))
def test_every_view_is_drawn_fits_and_can_be_read(path: str, page: Any, site: Site) -> None:
    open_(page, site, path)
    for width, height, scheme in ((1280, 900, "light"), (320, 700, "dark"), (3840, 2160, "light")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == []
    page.set_viewport_size({"width": 1280, "height": 900})
    if AXE.is_file():
        page.evaluate(AXE.read_text(encoding="utf-8"))
        broken = page.evaluate("axe.run(document).then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html))")
        assert broken == []


def test_the_numbers_at_the_pointer_are_the_results(page: Any, site: Site) -> None:
    result = pb.load_result(site.folder / "attribution")
    open_(page, site, "results/attribution")
    page.focus(".heat-scroll")
    page.keyboard.press("ArrowRight")
    told = page.inner_text(".heat .readout")
    value = float(result.values[2, 1])  # it begins in the row on top, the last layer
    assert told.replace("\u2212", "-").startswith(f"{value:.3f}"[:5])
    assert "layer L2 · head H1" in told
    names = page.locator(".bar-name a").all_inner_texts()
    strongest = sorted(result.top(24, by="abs"), key=lambda part: -float(result.values[part.layer, part.index]))
    assert names == [str(part) for part in strongest]
    assert page.locator(".bars").inner_text().count("\u2212") >= sum(
        float(v) < -0.0005 for v in result.values.flatten()
    )


def test_one_number_is_drawn_with_its_interval_its_draws_and_its_groups(page: Any, site: Site) -> None:
    open_(page, site, "results/number")
    told = [row.replace("\u2212", "-").split("\n") for row in page.locator(".bars li").all_inner_texts()]
    assert told == [["all", "0.750"], ["short", "0.625"], ["long", "-0.500"]]
    shape = """() => [...document.querySelectorAll('.bars li .bar-track')].map((track) => { const at = (x) => x.getBoundingClientRect();
      const zero = at(track.querySelector('.zero')).left, bar = at(track.querySelector('.bar')).width;
      return [[...track.querySelectorAll('.whisker')].map((x) => at(x).width / bar), [...track.querySelectorAll('.draw')].map((x) => (at(x).left - zero) / bar)]; })"""
    whiskers, draws = zip(*page.evaluate(shape), strict=True)
    assert whiskers == ([pytest.approx(0.375 / 0.75, abs=0.02)], [pytest.approx(0.5 / 0.625, abs=0.02)], [])
    assert draws == ([pytest.approx(x / 0.75, abs=0.02) for x in (0.0, -0.25, 0.125)], [], [])


def test_what_a_result_says_is_text(page: Any, site: Site) -> None:
    open_(page, site, "results/bars")
    assert page.locator("img").count() == 0
    assert page.get_by_text("<img src=x>").count() == 1
    assert page.get_by_text("<b>bold</b>").count() == 1


def test_a_thousand_tokens_answer_at_once(page: Any, site: Site) -> None:
    open_(page, site, "results/long")
    page.wait_for_timeout(500)
    moved = """async () => { const view = document.querySelector('.heat-scroll'), times = [];
      for (let i = 0; i < 12; i++) { const start = performance.now();
        view.dispatchEvent(new KeyboardEvent('keydown', {key: i % 2 ? 'ArrowDown' : 'ArrowRight', bubbles: true}));
        await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame); times.push(performance.now() - start); }
      return times.sort((a, b) => a - b)[6]; }"""
    page.focus(".heat-scroll")
    print(f"\na step over 1,024 x 1,024 cells: {page.evaluate(moved):.0f} ms")
    assert "query" in page.inner_text(".heat .readout")


def test_the_keyboard_alone_runs_a_method_and_opens_its_result(page: Any, site: Site) -> None:
    open_(page, site, "find")
    page.focus("input[type=search]")
    page.keyboard.type("direct logit")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#field-task")
    page.focus("#field-task")
    page.keyboard.type("facts_in_context:n=4")
    page.focus("#target")
    page.keyboard.type("by-keyboard")
    page.keyboard.press("Enter")
    page.wait_for_selector("a.button >> text=Open by-keyboard")
    page.focus("a.button >> text=Open by-keyboard")
    page.keyboard.press("Enter")
    page.wait_for_selector(".bars li")
    assert pb.load_result(site.folder / "by-keyboard").provenance["method"] == "find.direct_logit_attribution"


def start_sweep(page: Any, site: Site, name: str) -> None:
    open_(page, site, "prove/activation_patching")
    page.fill("#field-task", SLOW)
    page.fill("#target", name)
    page.click("button.primary")
    page.wait_for_selector(".run .state.running")


def test_a_sweep_survives_a_reload_is_seen_in_two_tabs_and_is_cancelled(page: Any, context: Any, site: Site) -> None:
    start_sweep(page, site, "sweep")
    page.reload()
    page.wait_for_selector(".state.running")
    other = context.new_page()
    other.goto(f"{site.base}#/runs")
    other.wait_for_selector(".state.running")
    for tab in (page, other):  # what it has found so far, while it runs
        tab.wait_for_selector(".run .so-far canvas")
    assert page.locator(".state.running").count() > 0
    note = page.inner_text(".so-far .note")
    assert (
        "cells of the map so far" in note or "the sweep, whole" in note
    )  # or all of it, where the rest of the run goes on
    other.click("button >> text=Cancel")
    for tab in (page, other):
        tab.wait_for_selector(".state.cancelled")
        assert tab.locator(".run .so-far canvas").count() == 1, "what was found stays"
    other.close()
    assert not (site.folder / "sweep").exists()


def test_a_method_that_fails_says_why_with_its_call(page: Any, site: Site) -> None:
    open_(page, site, "prove/ablation")
    page.fill("#field-task", "facts_in_context:n=4")
    page.fill("#field-parts", "L9.H9")
    page.click("button.primary")
    page.wait_for_selector(".run .state.failed")
    assert "0..2" in page.inner_text(".run p.failed")
    page.click(".run summary")
    assert "patchbay prove ablation tiny" in page.inner_text(".run pre")


def test_a_prompt_that_is_too_long_is_refused_in_words(page: Any, site: Site) -> None:
    page.goto(f"{site.base}#/prompt?text={quote('The capital of Lolavia is Grerum. ' * 150)}")
    page.reload()
    page.wait_for_selector("[role=alert], .tokens")
    said = page.inner_text("main")
    assert "tokens" in said


def test_a_slider_turns_the_model_as_it_moves_and_the_address_keeps_it(page: Any, site: Site) -> None:
    open_(page, site, f"knobs?text={quote(PROMPT)}")
    slider = page.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("Home")  # as far down as it goes: the head's output, turned round
    page.wait_for_selector(".slider.turned")
    page.wait_for_selector(".panel-aside .note:has-text('KL'):not(:text-is('KL 0 nats'))")
    with pb.load("tiny").edited(pb.scale("L1.H1.z", -1.0)) as model:
        said = model.generate(PROMPT, 24, new_only=True)
    page.wait_for_selector(f".sides > div:last-child .text:has-text({said.strip()!r})")
    assert page.locator(".sides .differs").count() > 0
    page.wait_for_url(re.compile("off[.]knob"))
    page.reload()
    page.wait_for_selector(".slider.turned")
    assert page.locator(".slider-head input").first.input_value() == "-1"
    page.click("button >> text=Save here")
    page.wait_for_selector("text=saved as off-2.knob")
    assert pb.load_knob(site.folder / "off-2.knob").strength == -1.0
    page.locator("button:enabled >> text=Neutral").first.click()
    page.wait_for_selector("text=KL 0 nats")


def test_a_map_of_patches_fills_and_a_cell_shows_what_it_brings(page: Any, site: Site) -> None:
    model = pb.load("tiny")
    task = pb.tasks.facts_in_context(model, n=12)
    text, other = next(
        (model.decode(a), model.decode(b))
        for a, b in zip(task.clean, task.corrupted or (), strict=True)
        if model.generate(model.decode(a), 1) != model.generate(model.decode(b), 1)[: len(model.decode(a))]
        and model.generate(model.decode(a), 1, new_only=True) != model.generate(model.decode(b), 1, new_only=True)
    )
    open_(page, site, f"prompt?text={quote(text)}")
    page.wait_for_selector("#other")
    page.fill("#other", other)
    page.click("text=Patch every cell")
    page.wait_for_selector("text=Choose a cell")
    map_ = page.locator(".panel:has(#other) .heat-scroll")
    map_.focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_selector(".cell-told .nexts li")
    assert model.generate(other, 1, new_only=True).strip() in page.inner_text(".cell-told")
    page.fill("#other", "The capital")
    page.click("text=Patch every cell")
    page.wait_for_selector(".panel:has(#other) [role=alert] >> text=as many")


def test_papers_are_searched_as_one_types_and_a_claim_is_checked(page: Any, site: Site) -> None:
    open_(page, site, "papers")
    assert page.locator(".paper h2").first.inner_text() == "Zebras 3 <i>run</i>", (
        "what was liked most for its age, as text"
    )
    page.fill(".search input", "zebr")
    page.wait_for_selector(".paper mark")
    assert page.locator(".paper").count() == 3
    page.fill(".search input", "induct head")
    page.wait_for_selector(".paper >> text=Induction Heads")
    assert "words=induct" in page.evaluate("location.hash")
    open_(page, site, "paper/olsson2022")
    page.click("button >> text=Check the claim")
    page.wait_for_selector(".run .state.done")
    assert page.inner_text(".run .note").startswith("confirmed")
    page.wait_for_selector(".verdict >> text=confirmed on tiny")
    page.reload()
    page.wait_for_selector(".verdict >> text=confirmed on tiny")
    page.click(".verdict summary")
    assert "untrained, seed" in page.inner_text(".verdict .said")
    page.click("button >> text=Mark")
    page.wait_for_selector("button >> text=Take the mark away")


def test_cables_are_filtered_and_a_part_is_chosen_by_the_keyboard(page: Any, site: Site) -> None:
    open_(page, site, "results/edges")
    assert page.locator(".cable").count() == 4
    page.locator(".wiring .pick select").select_option("keys")
    assert page.locator(".cable").count() == 1
    page.locator(".wiring .pick select").select_option("")
    page.check(".wiring input[type=checkbox]")
    assert page.locator(".cable").count() == 3
    page.focus(".plug[aria-label^='L0.H2']")
    page.keyboard.press("Enter")
    assert page.locator(".cable").count() == 1
    page.hover(".cable .reach", force=True)
    assert page.inner_text(".wiring .readout").startswith("3")


def test_features_are_opened_by_their_number_and_lead_to_a_knob(page: Any, site: Site) -> None:
    open_(page, site, "features/L1.F3")
    page.fill("#jump", "5")
    page.keyboard.press("Enter")
    page.wait_for_selector("#part h2 >> text=L1.F5")
    page.wait_for_selector("#part table")
    page.click("text=Make a knob of it")
    page.wait_for_selector("#field-parts")
    assert page.input_value("#field-parts") == "L1.F5"


def test_two_results_are_compared(page: Any, site: Site) -> None:
    open_(page, site, "compare?a=grid&b=grid-again")
    page.wait_for_selector(".panel .panel canvas")
    a, b = (pb.load_result(site.folder / name) for name in ("grid", "grid-again"))
    page.locator(".panel .panel .heat-scroll").focus()
    page.keyboard.press("ArrowRight")
    value = float(a.values[31, 1] - b.values[31, 1])
    told = page.inner_text(".panel .panel .readout").replace("\u2212", "-")
    assert told.startswith(f"{value:.3f}"), told


def test_a_saved_file_opens_without_a_server(page: Any, site: Site, tmp_path: Path) -> None:
    for name in ("lens", "dose", "bars"):
        path = pb.load_result(site.folder / name).save_html(tmp_path / f"{name}.html")
        page.goto(path.as_uri())
        page.wait_for_selector(VIEWS[f"results/{name}"])
        assert page.locator("img").count() == 0


def test_a_server_that_stops_is_said(page: Any, site: Site) -> None:
    """The last of the file: it ends the server."""
    open_(page, site, "results/lens")
    site.close()
    page.wait_for_selector(".lost")
    assert page.locator(".heat canvas").count() == 1
    time.sleep(0.1)
