"""Every form of HTML that Patchbay makes, as pictures by a headless Chromium: `python docs/pictures.py FOLDER [NAME ...]`.

`python docs/pictures.py docs/pictures kept` makes those that lie here. `forms` makes the pages and the notebook views on the built-in models; `picture` opens one in a window of some width, light or dark, and
writes a PNG of few colours, cut below the last thing shown. docs/pictures/ holds a few of them.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import patchbay as pb

PROMPT = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is"
NOTEBOOK = """<!doctype html><html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
body{margin:1rem;font:14px system-ui,sans-serif;background:#fff;color:#111}
table{border-collapse:collapse;font-size:12px;margin:.3rem 0;display:block;max-width:100%;overflow-x:auto}
td,th{padding:.25rem .5rem;text-align:right;border:none}tbody tr:nth-child(odd){background:#f5f5f5}
.cell{border-left:3px solid #ccd;padding-left:.7rem;margin:0 0 1.1rem;overflow-x:auto}
@media (prefers-color-scheme: dark){body{background:#111;color:#e4e4e4}tbody tr:nth-child(odd){background:#1d1d1d}}
</style></head><body>%s</body></html>"""  # as a notebook shows tables, light and dark
BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TALL = 6000  # the window, before what is empty is cut away


def chromium() -> str | None:
    """The browser that is there, or None."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


def forms() -> dict[str, Callable[[], str]]:
    """Name -> what makes its HTML."""
    from patchbay.draw import result_page

    model = pb.load("tiny")
    task = pb.tasks.facts_in_context(model, n=24)
    neutral = [model.decode(ids) for ids in pb.tasks.laundry_list(model, n=6).clean]
    texts = [model.decode(ids) for ids in task.clean[:8]]

    def knob() -> pb.Knob:
        return pb.turn.steer(model, task)

    def dose(made: pb.Knob) -> pb.Result:
        return pb.measure.dose_response(model, task, made, neutral, strengths=[0.0, 0.5, 1.0, 2.0, 4.0])

    def compared() -> pb.Result:
        knobs = [pb.turn.steer(model, task, way=way) for way in ("mean", "probe")]
        return pb.compare(model, task, knobs, neutral, strengths=[0.0, 0.5, 1.0, 2.0])

    def trace() -> pb.Trace:
        return pb.run(model, PROMPT, taps=["L1.attn.pattern", "L2.resid_out"], edits=[pb.zero("L1.H3.z", positions=-1)])

    def view(*shown: object) -> str:
        return NOTEBOOK.replace("%s", "".join(f'<div class="cell">{one._repr_html_()}</div>' for one in shown))  # type: ignore[attr-defined]

    return {
        "why": lambda: result_page.page_of(pb.why(model, PROMPT)),
        "map": lambda: result_page.page_of(pb.prove.activation_patching(model, task[:8], positions="marks")),
        "heads": lambda: result_page.page_of(pb.find.direct_logit_attribution(model, task)),
        "lens": lambda: result_page.page_of(pb.find.logit_lens(model, PROMPT)),
        "dose": lambda: result_page.page_of(dose(knob())),
        "compare": lambda: result_page.page_of(compared()),
        "knob": lambda: result_page.page_of(knob()),
        "side-effects": lambda: result_page.page_of(_side_effects(model)),
        "demo": _demo,
        "notebook-model": lambda: view(
            model, model.layers[1].heads[3], pb.Port("attn.z", 1, 3), model.tokens(PROMPT[:40]), trace(), task
        ),
        "notebook-results": lambda: view(
            knob(),
            pb.find.direct_logit_attribution(model, task),
            pb.find.logit_lens(model, PROMPT),
            trace().show("L1.H3.pattern"),
        ),
        "notebook-card": lambda: view(model.card("L1.N5", texts=texts), pb.load("tiny-moe").card("L1.E2", texts=texts)),
    }


def _side_effects(model: pb.Model) -> pb.Result:
    """What the demo's knob, one head silenced, does to three meters."""
    meters = {
        "facts_in_context": {"meter": "answer_choices", "items": "facts_in_context:n=300"},
        "arithmetic": {"meter": "answer_choices", "items": "arithmetic:n=300"},
        "text_loss": {"items": [model.decode(ids) for ids in pb.tasks.laundry_list(model, n=60).clean]},
    }
    return pb.measure.side_effects(model, pb.turn.scale(["L1.H1"], 0.0, model=model), meters, draws=19)


def _demo() -> str:
    from patchbay.stories import demo

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "demo.html"
        demo.tell(pb.load("tiny"), report=str(page), quiet=True, n=24)
        return page.read_text(encoding="utf-8")


def picture(html: str, target: Path, *, width: int = 1100, dark: bool = False, height: int | None = None) -> Path:
    """A PNG of a document as Chromium shows it, whole or its first `height` pixels."""
    browser = chromium()
    if browser is None:
        raise FileNotFoundError(f"no Chromium here: none of {', '.join(BINARIES)}")
    with tempfile.TemporaryDirectory() as folder:
        page, raw = Path(folder) / "page.html", Path(folder) / "raw.png"
        page.write_text(html, encoding="utf-8")
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile", *scheme,
             f"--window-size={width},{height or TALL}", "--virtual-time-budget=2000", f"--screenshot={raw}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        return _small(raw, target)


def _small(raw: Path, target: Path) -> Path:
    """Cut what is empty below, and write with few colours."""
    from PIL import Image, ImageChops

    image = Image.open(raw).convert("RGB")
    ground = Image.new("RGB", image.size, image.getpixel((0, image.size[1] - 1)))
    box = ImageChops.difference(image, ground).getbbox()
    bottom = image.size[1] if box is None else min(image.size[1], box[3] + 16)
    image = image.crop((0, 0, image.size[0], bottom))
    image.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(target, optimize=True)
    return target


SHOWN = {  # what docs/pictures/ holds: name -> width, height, dark
    "why": (900, 1000, True),
    "compare": (900, 900, False),
    "lens": (320, 900, False),
    "knob": (900, 900, False),
    "side-effects": (1150, 980, False),
    "notebook-results": (900, 900, False),
}


ASKED = quote(PROMPT)
PAGE = {  # those of `patchbay ui`: name -> address, what to wait for, width, height, dark
    "ui-papers": ("papers?view=all&state=works", ".paper", 1100, 800, False),
    "ui-knobs": (f"knobs?text={ASKED}&knobs=head-off.knob@0.1", ".sides .differs", 1100, 800, False),
    "ui-wiring": ("results/channels", ".cable", 1100, 620, True),
    "ui-features": ("features/L1.F3", "#part table", 1100, 1000, True),
    "ui-prompt": (f"prompt?text={ASKED}", ".nested canvas", 1100, 1000, False),
    "ui-compare": ("compare?a=heads&b=heads-again", ".panel .panel canvas", 1100, 1000, False),
    "ui": ("results/heads", ".bars li", 1280, 780, True),
    "ui-pattern": ("results/pattern", ".tokens button", 1280, 1130, False),
}


def of_the_page(folder: Path) -> None:
    """Pictures of `patchbay ui` on the built-in model, by playwright."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        model = pb.load("tiny")
        pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=48)).save(Path(place) / "heads")
        pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=48, seed=1)).save(
            Path(place) / "heads-again"
        )
        pb.run(model, PROMPT, taps=["L1.attn.pattern"]).show("L1.H3.pattern").save(Path(place) / "pattern")
        pb.find.channels(model).save(Path(place) / "channels")
        pb.turn.scale("L1.H1", 0.0).save(Path(place) / "head-off.knob")
        pb.turn.steer(model, pb.tasks.facts_in_context(model, n=24)).save(Path(place) / "text-over-memory.knob")
        texts = [model.decode(ids) for ids in pb.tasks.facts_in_context(model, n=60).clean]
        sparse = f"{place}/.sparse"
        pb.train.dictionary(model, texts, "L1.resid_out", n_features=128, steps=120, folder=sparse)
        words = [
            sys.executable,
            "-m",
            "patchbay",
            "ui",
            "tiny",
            "--results",
            place,
            "--dictionary",
            sparse,
            "--no-browser",
        ]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            start = next(line.split()[1] for line in server.stdout if line.startswith("open "))
            browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(start)
            for name, (address, wait, width, height, dark) in PAGE.items():
                page.set_viewport_size({"width": width, "height": height})
                page.emulate_media(color_scheme="dark" if dark else "light")
                page.goto(f"{start.partition('?')[0]}#/{address}")
                page.wait_for_selector(wait, timeout=300_000)
                page.wait_for_timeout(500)
                raw = Path(place) / f"{name}.png"
                page.screenshot(path=raw)
                print(_small(raw, folder / f"{name}.png"))
            browser.close()
            server.send_signal(signal.SIGINT)


def kept(folder: Path) -> None:
    """The few pictures of docs/pictures/, their first lines, small."""
    of_the_page(folder)
    made = forms()
    for name, (width, height, dark) in SHOWN.items():
        print(picture(made[name](), folder / f"{name}.png", width=width, height=height, dark=dark))


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    if names == ["kept"]:
        kept(folder)
        return
    for name, make in forms().items():
        if names and name not in names:
            continue
        html = make()
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
        for mark, width, dark in (("", 1100, False), ("-dark", 1100, True), ("-narrow", 320, False)):
            print(picture(html, folder / f"{name}{mark}.png", width=width, dark=dark))


if __name__ == "__main__":
    main()
