"""docs/steering.md runs from top to bottom, and its numbers bear out what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.tolerance import close

PAGE = (Path(__file__).parents[1] / "docs" / "steering.md").read_text(encoding="utf-8")


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    steering = names["knob"].evidence["steering"]
    assert steering["p"].nan_to_num(1.0).min() < 0.05
    assert "it tells the held-out groups apart" in capsys.readouterr().out
    direction = names["knob"].edits[0].value
    stream = pb.Port("resid_out", names["model"].n_layers - 1)
    with names["model"].edited(names["without"]):
        left = pb.run(names["model"], names["asked"], taps=[stream])[stream] @ direction
    held = pb.run(names["model"], names["asked"], taps=[stream])[stream] @ direction
    real = ~held.isnan()
    assert close(left[real], torch.zeros(int(real.sum())), of=held[real])
    assert held[real].abs().max() > 1
    assert names["plain"] - names["changed"] > 0.1  # some of the answers' lead went with it
    dose = names["dose"]
    assert any("on which the knob was fitted, are left out" in note for note in dose.notes)
    if "chosen" in dose:
        assert float(dose["test_kl"]) <= 1.0
    task, model = names["asked"][:4], names["model"]
    columns = pb.run(model, task, edits=[pb.zero("L1.H3.z")]).last_logits[:, names["lead"].tokens]
    assert close(names["swept"].values[0], columns[:, 0] - columns[:, 1], of=columns)
    assert close(names["lost"]["score"], names["swept"]["base"].double().mean(), of=columns)
    fired = [
        sum(map(len, names[side])) / sum(len(ids) for ids in model.encode(names[text]))
        for side, text in (("inside", "positive"), ("outside", "negative"))
    ]
    assert fired[0] > 2 * fired[1]
    assert fired[1] == pytest.approx(0.02, abs=0.005)
    assert pb.load_knob("careful.knob").edits == names["careful"].edits
    assert names["both"].labels_of("condition") == [names["towards"].name, names["whole"].name]
