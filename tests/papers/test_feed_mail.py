"""Letters through a real mail server: once a paper and reader, through refusals, slow answers and a kill in the middle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from patchbay.errors import PatchbayError
from patchbay.papers.feed import mail
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Store

DAY = timedelta(days=1)


class Box:
    """What a server received; it refuses addresses that start with `no`, and answers after `slow` seconds."""

    def __init__(self) -> None:
        self.got: list[EmailMessage] = []
        self.slow = 0.0

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address.startswith("no"):
            return "550 nobody of this name"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        import asyncio

        self.got.append(message_from_bytes(envelope.content, policy=policy.default))  # type: ignore[arg-type]
        await asyncio.sleep(self.slow)
        return "250 OK"


@pytest.fixture
def server() -> Iterator[tuple[Box, mail.Post]]:
    box = Box()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    yield box, mail.Post.of(f"smtp://127.0.0.1:{port}", "papers@example.org")
    controller.stop()


def filled(store: Store, *numbers: int, word: str = "circuits") -> None:
    store.add([Listed(f"Paper {n}", f"About {word}, <b>bold</b>.", f"2401.{n:05d}") for n in numbers], "a")


def test_a_reader_gets_each_paper_once_and_only_those_with_the_words(server: tuple[Box, mail.Post]) -> None:
    box, post = server
    with Store() as store:
        mail.subscribe(store, "all@example.org")
        token = mail.subscribe(store, "some@example.org", every="weekly", words=["probing, sinks"])
        filled(store, 1, 2)
        filled(store, 3, word="probing")
        moment = datetime.now(UTC)
        assert sorted(mail.digest(store, post, at=moment)) == [("all@example.org", 3, ""), ("some@example.org", 1, "")]
        assert mail.digest(store, post, at=moment + DAY) == []  # nothing new
        filled(store, 4, word="sinks")
        assert mail.digest(store, post, at=moment + DAY) == [("all@example.org", 1, "")]  # a week is not over
        assert mail.digest(store, post, at=moment + 8 * DAY) == [("some@example.org", 1, "")]
        assert mail.unsubscribe(store, token) == "some@example.org"
        filled(store, 5, word="sinks")
        assert mail.digest(store, post, at=moment + 30 * DAY) == [("all@example.org", 1, "")]
    assert [len(one["To"].addresses) for one in box.got] == [1] * 5
    some = next(one for one in box.got if one["To"] == "some@example.org")
    assert some["List-Unsubscribe"].strip() == f"<mailto:papers@example.org?subject=unsubscribe%20{token}>"
    plain, page = (some.get_body((kind,)).get_content() for kind in ("plain", "html"))  # type: ignore[union-attr]
    assert "https://arxiv.org/abs/2401.00003" in plain
    assert token in plain
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page


def test_who_subscribes_gets_what_comes_from_then_on(server: tuple[Box, mail.Post]) -> None:
    _, post = server
    with Store() as store:
        filled(store, 1)
        time.sleep(1.01)
        mail.subscribe(store, "all@example.org")
        assert mail.digest(store, post) == []


def test_a_refusal_stops_nobody_else_and_the_same_letter_goes_again(server: tuple[Box, mail.Post]) -> None:
    box, post = server
    with Store() as store:
        for reader in ("a@example.org", "nobody@example.org", "z@example.org"):
            mail.subscribe(store, reader)
        filled(store, 1)
        told = {address: failed for address, _, failed in mail.digest(store, post)}
        assert told["a@example.org"] == told["z@example.org"] == ""
        assert "nobody of this name" in told["nobody@example.org"]
        filled(store, 2)
        ((address, papers, _),) = mail.digest(store, post)  # the others got theirs today
        assert (address, papers) == ("nobody@example.org", 1)  # the first letter, as it was
    assert len(box.got) == 2


def test_a_server_that_hangs_is_left_and_the_letter_keeps_its_name(server: tuple[Box, mail.Post]) -> None:
    box, post = server
    with Store() as store:
        mail.subscribe(store, "a@example.org")
        filled(store, 1)
        box.slow = 1.0
        ((_, _, failed),) = mail.digest(store, post, timeout=0.2)
        assert "timed out" in failed
        box.slow = 0.0
        assert mail.digest(store, post) == [("a@example.org", 1, "")]
        assert mail.digest(store, post) == []
    assert len({one["Message-ID"] for one in box.got}) == 1  # so that a reader's program sees one letter


@pytest.mark.parametrize("after", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_a_server_that_dies_in_the_middle_is_said_and_the_letter_goes_again(
    after: str, server: tuple[Box, mail.Post]
) -> None:
    box, post = server
    dying = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        line, _ = dying.accept()
        with line, line.makefile("rwb") as file:
            if after == "connect":
                return
            file.write(b"220 here\r\n")
            file.flush()
            reading = False
            for said in file:
                verb = "." if said == b".\r\n" else said[:4].decode("ascii", "replace").strip()
                if verb == after and (after == "." or not reading):
                    return
                if not reading or verb == ".":
                    file.write(b"354 go on\r\n" if verb == "DATA" else b"250 OK\r\n")
                    file.flush()
                reading = verb == "DATA" or (reading and verb != ".")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with Store() as store:
        mail.subscribe(store, "a@example.org")
        filled(store, 1)
        away = mail.Post.of(f"smtp://127.0.0.1:{dying.getsockname()[1]}", "papers@example.org")
        ((address, papers, failed),) = mail.digest(store, away, timeout=5)
        assert (address, papers) == ("a@example.org", 1)
        assert failed, "it is said that it was not sent"
        thread.join(5)
        dying.close()
        assert mail.digest(store, post) == [("a@example.org", 1, "")]
        assert mail.digest(store, post) == []
    assert len(box.got) == 1


SENDER = """
import sys
from patchbay.papers.feed import mail
from patchbay.papers.feed.store import Store
with Store(sys.argv[1]) as store:
    mail.digest(store, mail.Post.of(sys.argv[2], "papers@example.org"))
"""


def test_a_kill_between_writing_and_sending_loses_no_letter(server: tuple[Box, mail.Post], tmp_path: Path) -> None:
    box, post = server
    file = tmp_path / "papers.sqlite"
    with Store(file) as store:
        for n in range(3):
            mail.subscribe(store, f"{n}@example.org")
        filled(store, 1, 2)
    box.slow = 2.0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(file), f"smtp://{post.host}:{post.port}"], env=environment
    )
    while not box.got:
        time.sleep(0.05)
    running.kill()
    running.wait()
    box.slow = 0.0
    with Store(file) as store:
        assert {address for address, _, failed in mail.digest(store, post) if not failed} == {
            f"{n}@example.org" for n in range(3)
        }
        assert mail.digest(store, post, at=datetime.now(UTC) + DAY) == []
    names = {(str(one["To"]), str(one["Message-ID"])) for one in box.got}
    assert len(names) == 3  # the one that arrived before the kill came again under its own name


def test_what_is_no_address_or_server_is_refused() -> None:
    with Store() as store:
        for text in ("", "a", "a@", "@b", "a@b\nBcc: c@d", "a b@c", "a@b@c"):
            with pytest.raises(PatchbayError, match="no mail address"):
                mail.subscribe(store, text)
        with pytest.raises(PatchbayError, match="daily or weekly, got 'weekley'"):
            mail.subscribe(store, "a@b.org", every="weekley")
        with pytest.raises(PatchbayError, match="no word"):
            mail.subscribe(store, "a@b.org", words=["?!"])
        with pytest.raises(PatchbayError, match="no reader has this token"):
            mail.unsubscribe(store, "x")
    for server in ("", "http://x", "smtp://", "smtp://x:port", "smtp://x/path"):
        with pytest.raises(PatchbayError, match="no mail server"):
            mail.Post.of(server, "a@b.org")
    with pytest.raises(PatchbayError, match="PATCHBAY_SMTP_PASSWORD"):
        mail.Post.of("smtp://me:secret@x", "a@b.org")
    assert mail.Post.of("smtps://me%40x@mail.example.org", "a@b.org", "p").port == 465


def test_subscribing_again_changes_the_wishes_and_keeps_the_token() -> None:
    with Store() as store:
        first = mail.subscribe(store, "a@b.org", words=["sinks"])
        assert mail.subscribe(store, "a@b.org", every="weekly") == first
        assert store.db.execute("SELECT every, words FROM readers").fetchone()[:] == ("weekly", "")
