"""lm-evaluation-harness: its tasks on a model under a knob, its tasks as items of meters, and tasks of ours as its files.

`--model patchbay --model_args pretrained=NAME,knob=x.knob@2` runs any task of the harness with a knob turned. The harness has no entry
points, so its own command finds this class only once this module is imported: `patchbay harness ...` imports it and runs theirs.

Requests are tokenised as the harness does it, and scored by `_answers`: equal contexts are run once. A request that is longer than the
model reads is refused, where the harness would cut it. Its `--use_cache` keeps answers by the text of a request alone: a
cache must not be shared between knobs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchbay.measure._answers import Spelled, score
from patchbay.measure._harness import Turned, device_there, lacking, new_text
from patchbay.measure._runs import token_logprobs
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

try:
    from lm_eval import utils as _utils
    from lm_eval.api import model as _api
    from lm_eval.api import registry as _registry
    from lm_eval.models import utils as _options
except ModuleNotFoundError as error:
    raise lacking("lm-eval", error) from error


@_registry.register_model("patchbay")  # type: ignore[untyped-decorator]
class PatchbayLM(_api.TemplateLM):  # type: ignore[misc,name-defined]
    """A model behind Patchbay, under a knob or none, as a model of the harness."""

    def __init__(
        self,
        pretrained: Any,
        knob: Any = None,
        batch_size: int | str = 64,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """`pretrained`: a name, a path or a Model. `knob`: a Knob, or x.knob@2, a file and a strength."""
        super().__init__()
        lost = [name for name, value in unknown.items() if value is not None and name not in ("max_batch_size",)]
        if lost:
            raise PatchbayError(
                f"model_args {', '.join(lost)}: not taken; possible are pretrained, knob, batch_size, device, dtype, trust_remote_code"
            )
        import torch

        how = {
            "device": device_there(device),
            "dtype": None if dtype in (None, "auto") else getattr(torch, str(dtype)),
            "trust_remote_code": trust_remote_code,
        }
        self.turned = Turned(pretrained, knob, **how)
        self._spelled: dict[tuple[str, bool | None], list[int]] = {}  # while requests are answered
        self.size = int(batch_size) if str(batch_size).isdigit() else 64

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self._tokenizer.eos_token_id if self._tokenizer.eos_token_id is not None else self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the start token, else the end token."""
        found = self._tokenizer.bos_token_id
        found = self._tokenizer.eos_token_id if found is None else found
        if found is None:
            raise PatchbayError(
                "the tokenizer has neither a start nor an end token, so nothing stands before a text without a context"
            )
        return int(found)

    @property
    def _tokenizer(self) -> Any:
        return self.turned.model._need_tokenizer()

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps caches of requests under."""
        return self.turned.model.source or type(self._tokenizer).__name__

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.turned.model.longest_prompt or self.turned.model.max_positions or 2048

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, as the tokenizer gives them."""
        if (string, add_special_tokens) in self._spelled:
            return self._spelled[string, add_special_tokens]
        return self._encoded([string], add_special_tokens)[0]

    def _encoded(self, strings: list[str], add_special_tokens: bool | None) -> list[list[int]]:
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [list(ids) for ids in self._tokenizer(strings, **how)["input_ids"]]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether each token is the likeliest) of every (context, continuation); texts are tokenised all at once."""
        wanted: dict[tuple[str, bool | None], None] = {}
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()
            wanted |= dict.fromkeys(
                [(bare, None), (context + continuation, None)] if context else [(continuation, False)]
            )
        for special in (None, False):
            strings = [string for string, its in wanted if its is special]
            ids = self._encoded(strings, special) if strings else []
            self._spelled |= {(string, special): one for string, one in zip(strings, ids, strict=True)}
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._spelled.clear()
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p, whether each token is the likeliest) of every (texts, context, continuation)."""
        places: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for (context, continuation), before, after in requests:
            if len(before) + len(after) - 1 > self.max_length:
                raise PatchbayError(
                    f"the request {context[-40:]!r} + {continuation[:40]!r} has {len(before) + len(after)} tokens and the model reads {self.max_length}: "
                    "nothing is cut off in silence; leave it out, or take fewer shots"
                )
            places.setdefault(tuple(before), {})[tuple(after)] = None
        prompts = list(places)
        answers = [list(each) for each in places.values()]
        spelled = Spelled(
            prompts, answers, [[None] * len(each) for each in answers], [f"request {i}" for i in range(len(prompts))]
        )
        with self.turned.on() as model:
            found = score(model, spelled, batch_size=self.size)
        at = {
            (p, a): (i, j) for i, (p, each) in enumerate(zip(prompts, answers, strict=True)) for j, a in enumerate(each)
        }
        pairs = [at[tuple(before), tuple(after)] for _, before, after in requests]
        return [(float(found.logp[i, j]), bool(found.greedy[i, j])) for i, j in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows as the harness cuts them; the tokenizer's own start token is no text."""
        rows: list[list[int]] = []
        reads: list[list[tuple[int, int]]] = []
        of: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = _utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for before, after in map(_utils.make_disjoint_window, windows):
                rows.append([*before, *after][: len(before) + len(after)])
                reads.append([(len(before) - 1 + k, token) for k, token in enumerate(after)])
                of.append(i)
        with self.turned.on() as model:
            found = token_logprobs(model, rows, reads, batch_size=self.size)
        totals = [0.0] * len(requests)
        for values, i in zip(found, of, strict=True):
            totals[i] += float(values.sum())
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a text that ends them; greedy where the task does not ask to sample."""
        said = []
        for request in requests:
            context, told = request.args[0], dict(_options.normalize_gen_kwargs(dict(request.args[1])))
            until, n = told.pop("until"), told.pop("max_gen_toks")
            if not told["do_sample"]:
                told.pop("temperature", None)
            ids = self.tok_encode(context)
            with self.turned.on() as model:
                [row] = model.generate([ids], n, **told)  # whatever else the task asks of transformers' generate
            text = new_text(model, ids, row)
            for end in until:
                text = text.split(end)[0] if end else text
            said.append(text)
        return said


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    kept = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = kept


# --- their tasks as items, ours as their files ----------------------------------------------------------


def items(
    name: str, *, include_path: str | None = None, limit: int | None = None, trust: bool = False
) -> list[dict[str, Any]]:
    """The documents of a multiple-choice task of the harness as items of our meters: prompt, choices, answer.

    `include_path`: a folder with the task's YAML. `limit`: so many documents. `trust`: YAML that names Python functions runs them; without,
    such a file is refused."""
    from lm_eval import tasks

    if include_path is not None and not trust:
        for path in sorted(Path(include_path).rglob("*.yaml")):
            if "!function" in path.read_text(encoding="utf-8"):
                raise PatchbayError(
                    f"{path} names Python functions (!function), which reading it would run: trust=True, if you trust it"
                )
    manager = tasks.TaskManager(include_path=include_path, include_defaults=include_path is None)
    loaded = tasks.get_task_dict([name], manager)
    [task] = [one for one in loaded.values() if hasattr(one, "build_all_requests")]
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    docs: dict[int, list[Any]] = {}
    for one in task.instances:
        docs.setdefault(one.doc_id, []).append(one)
    found = []
    for doc, each in docs.items():
        if any(one.request_type != "loglikelihood" for one in each) or len(each) < 2:
            raise PatchbayError(
                f"task {name} is no multiple choice ({each[0].request_type}): its documents have no choices"
            )
        each = sorted(each, key=lambda one: one.idx)
        target = task.doc_to_target(each[0].doc)
        choices = [one.args[1] for one in each]
        found.append(
            {
                "prompt": each[0].args[0],
                "choices": choices,
                "answer": int(target) if isinstance(target, int) else choices.index(target),
                "id": doc,
            }
        )
    return found


def write_task(task: Task, folder: str | Path, model: Any) -> Path:
    """A Task of ours as a task of the harness: NAME.yaml and NAME.jsonl, scored by the same log-probabilities of whole answers."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    name = task.name.replace("-", "_")
    rows = []
    for ids, answers in zip(task.clean, task.whole_answers, strict=True):
        added = len(model.encode([""])[0]) if model.encode(["a"])[0][:1] == list(ids[:1]) else 0
        rows.append(
            {
                "prompt": model.decode(list(ids[added:])),
                "choices": [model.decode(list(a)) for a in answers],
                "answer": 0,
            }
        )
    data = where / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    path = where / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data.resolve()}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1.0\n",
        encoding="utf-8",
    )
    return path
