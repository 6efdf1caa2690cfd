"""Sources as they answer over the network, on loopback: pages, ids, versions, refusals, and going on where a sync ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from patchbay.errors import PatchbayError
from patchbay.papers.feed import sources

Answer = tuple[int, bytes]
WAITED: list[float] = []


@contextmanager
def served(answer: object) -> Iterator[str]:
    """A server on loopback whose every answer `answer(path, query)` gives."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            status, body = answer(parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()})  # type: ignore[operator]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client asks although the tests run offline: it asks loopback."""
    WAITED.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False, raising=False)


def of_hub(n: int) -> dict[str, object]:
    """A paper as the hub's API answers it."""
    paper = {
        "id": f"2410.{n:05d}",
        "authors": [{"name": "Ada Lovelace", "hidden": False}, {"name": "Emmy Noether", "hidden": False}],
        "publishedAt": "2024-10-17T00:00:00.000Z",
        "summary": f"About\n  thing {n}.",
        "upvotes": n,
    }
    return {"paper": paper, "title": f"Paper\n {n}", "publishedAt": "2024-10-18T00:00:00.000Z", "numComments": 2}


def test_daily_papers_are_read_page_by_page_and_go_on() -> None:
    asked: list[dict[str, str]] = []

    def answer(path: str, query: dict[str, str]) -> Answer:
        assert path == "/api/daily_papers"
        asked.append(query)
        first = int(query.get("p", 0)) * 100
        return 200, json.dumps([of_hub(n) for n in range(first, min(first + 100, 130))]).encode()

    with served(answer) as endpoint:
        pages = list(sources.hugging_face(day="2024-10-18", endpoint=endpoint, wait=WAITED.append))
        again = list(
            sources.hugging_face(day="2024-10-18", endpoint=endpoint, place=pages[0].place, wait=WAITED.append)
        )
    assert [len(page.listed) for page in pages] == [100, 30]
    assert again == pages[1:]
    assert {query["date"] for query in asked} == {"2024-10-18"}
    paper = pages[0].listed[7]
    assert (paper.title, paper.abstract, paper.arxiv) == ("Paper 7", "About thing 7.", "2410.00007")
    assert (paper.authors, paper.likes, paper.comments) == (("Ada Lovelace", "Emmy Noether"), 7, 2)
    assert paper.published == date(2024, 10, 17)


ENTRY = """<entry><id>http://arxiv.org/abs/2410.{n:05d}v{version}</id><title>Paper
 {n}</title><summary>About &lt;b&gt; {n}</summary><published>2024-10-17T17:59:59Z</published>
<updated>2024-11-01T00:00:00Z</updated><author><name>Ada Lovelace</name></author><category term="cs.CL"/></entry>"""
ATOM = '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom"><title>ArXiv Query</title><id>x</id>{}</feed>'


def atom(numbers: range, version: int = 2) -> bytes:
    return ATOM.format("".join(ENTRY.format(n=n, version=version) for n in numbers)).encode()


def test_arxiv_is_asked_slowly_oldest_first_and_goes_on() -> None:
    asked: list[dict[str, str]] = []

    def answer(_: str, query: dict[str, str]) -> Answer:
        asked.append(query)
        return 200, atom(range(int(query["start"]), min(int(query["start"]) + 100, 230)))

    with served(answer) as endpoint:
        pages = list(sources.arxiv("cat:cs.CL", endpoint=endpoint, wait=WAITED.append))
        later = list(sources.arxiv("cat:cs.CL", endpoint=endpoint, place="229", wait=WAITED.append))
    assert [page.place for page in pages] == ["100", "200", "230"]
    assert WAITED == [sources.BETWEEN] * 2  # between requests, not before the first
    assert asked[0]["sortOrder"] == "ascending"
    assert [paper.title for page in later for paper in page.listed] == ["Paper 229"]
    paper = pages[0].listed[0]
    assert (paper.arxiv, paper.version, paper.abstract) == ("2410.00000", 2, "About <b> 0")
    assert (paper.published, paper.authors, paper.keywords) == (date(2024, 10, 17), ("Ada Lovelace",), ("cs.CL",))


def test_a_server_that_fails_is_asked_again_and_what_it_refuses_is_not() -> None:
    answers = iter([(503, b"busy"), (200, atom(range(3)))])
    with served(lambda *_: next(answers)) as endpoint:
        assert len(next(sources.arxiv("x", endpoint=endpoint, wait=WAITED.append)).listed) == 3
    assert WAITED == [3.0]
    with served(lambda *_: (400, b"no")) as endpoint, pytest.raises(PatchbayError, match="arXiv did not answer.*400"):
        next(sources.arxiv("x", endpoint=endpoint, wait=WAITED.append))
    assert WAITED == [3.0]
    with served(lambda *_: (500, b"no")) as endpoint, pytest.raises(PatchbayError, match="Hugging Face did not answer"):
        next(sources.hugging_face(endpoint=endpoint, wait=WAITED.append))
    assert WAITED == [3.0, 3.0, 6.0]
    with pytest.raises(PatchbayError, match="arXiv did not answer"):  # nobody listens there
        next(sources.arxiv("x", endpoint="http://127.0.0.1:9", wait=WAITED.append))


def test_feeds_that_are_cut_wrong_or_huge_are_refused() -> None:
    whole = atom(range(3))
    error = ATOM.format(
        "<entry><id>http://arxiv.org/api/errors#x</id><title>Error</title><summary>bad query</summary></entry>"
    )
    for content, said in (
        (whole[: len(whole) // 2], "no whole Atom feed"),
        (b"", "no whole Atom feed"),
        (b"<html><body>hello</body></html>", "no whole Atom feed"),
        (error.encode(), "refuses the query: bad query"),
        (b"x" * (sources.LONGEST + 1), "more than"),
    ):
        with pytest.raises(PatchbayError, match=said):
            sources.read_atom(content)
    assert sources.read_atom(ATOM.format("").encode()) == []


def test_markup_in_a_feed_stays_text() -> None:
    hostile = atom(range(1)).replace(b"About &lt;b&gt;", b"A &lt;script&gt;alert(1)&lt;/script&gt; B")
    assert sources.read_atom(hostile)[0].abstract == "A <script>alert(1)</script> B 0"  # what shows it escapes it


def test_saved_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(PatchbayError, match="no plain text in UTF-8"):
        next(sources.saved(tmp_path / "page.txt"))
    with pytest.raises(PatchbayError, match="cannot be read"):
        next(sources.saved(tmp_path / "absent.txt"))


def test_days_are_all_days_from_one_to_another() -> None:
    assert list(sources.days(date(2024, 2, 28), date(2024, 3, 1))) == ["2024-02-28", "2024-02-29", "2024-03-01"]
    assert list(sources.days(date(2024, 3, 2), date(2024, 3, 1))) == []
