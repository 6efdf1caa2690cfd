"""New papers by mail: readers with their words, and letters that each paper is in once a reader.

What a letter holds is written to the outbox before it goes, and marked after: where sending fails or is killed, the next `digest`
sends that same letter, under the same Message-ID, so that one which did arrive is known to be the same.
"""

from __future__ import annotations

import html
import re
import secrets
import smtplib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from patchbay.errors import PatchbayError
from patchbay.papers.feed import views
from patchbay.papers.feed.published import address, runs_here
from patchbay.papers.feed.store import Store, now
from patchbay.signal.port import suggest

EVERY = {"daily": timedelta(hours=20), "weekly": timedelta(days=6, hours=12)}  # the least time between two letters
MOST = 50  # papers in a letter


@dataclass(frozen=True)
class Post:
    """A mail server: `smtp://[USER@]HOST[:PORT]`, `smtps://` for one that starts encrypted; and who letters are from."""

    host: str
    port: int
    user: str
    password: str
    encrypted: str  # "" (STARTTLS where it is offered) or "smtps"
    sender: str

    @classmethod
    def of(cls, server: str, sender: str, password: str = "") -> Post:
        """Read a server's address. Raises PatchbayError, also where a password stands in it: it would be seen by all users."""
        text = server if "://" in server else f"smtp://{server}"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise PatchbayError(f"{server!r} is no mail server: {error}") from error
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.path.strip("/"):
            raise PatchbayError(
                f"{server!r} is no mail server; one is like smtp://mail.example.org:587 or smtps://me@mail.example.org"
            )
        if parts.password:
            raise PatchbayError(
                "a password in the address is seen by other users: leave it out, and set PATCHBAY_SMTP_PASSWORD"
            )
        usual = 465 if parts.scheme == "smtps" else 25
        secure = "smtps" if parts.scheme == "smtps" else ""
        return cls(parts.hostname, port or usual, unquote(parts.username or ""), password, secure, mail_address(sender))


def mail_address(text: str) -> str:
    """An address as it may stand in a header. Raises PatchbayError."""
    try:
        known = Address(addr_spec=text.strip())
        if not known.username or not re.fullmatch(r"[^\s@]+(\.[^\s@]+)*", known.domain) or not text.isprintable():
            raise ValueError("no user or domain")
    except Exception as error:  # the header registry raises errors of many kinds
        raise PatchbayError(f"{text!r} is no mail address; one is like reader@example.org") from error
    return str(known.addr_spec)


def subscribe(store: Store, reader: str, *, every: str = "daily", words: Sequence[str] = ()) -> str:
    """Send a reader papers that come from now on, those with any of the words (all without words). The token that ends it."""
    if every not in EVERY:
        raise PatchbayError(f"letters go {' or '.join(EVERY)}, got {every!r}{suggest(every, list(EVERY))}")
    terms = [word for text in words for word in re.findall(r"\w+", text)]
    if words and not terms:
        raise PatchbayError(f"no word in {' '.join(words)!r}")
    token = secrets.token_urlsafe(16)
    with store.writing():
        store.db.execute(
            "INSERT INTO readers(address, every, words, token, since) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT(address) DO UPDATE SET every = excluded.every, words = excluded.words",
            (mail_address(reader), every, " ".join(terms), token, now()),
        )
        return str(
            store.db.execute("SELECT token FROM readers WHERE address = ?", (mail_address(reader),)).fetchone()[0]
        )


def unsubscribe(store: Store, token: str) -> str:
    """Send no more to the reader of a token, whose address is given back. Raises PatchbayError where there is none."""
    with store.writing():
        row = store.db.execute("DELETE FROM readers WHERE token = ? RETURNING address", (token.strip(),)).fetchone()
    if row is None:
        raise PatchbayError("no reader has this token; each letter holds its reader's own")
    return str(row[0])


def digest(
    store: Store, post: Post, *, at: datetime | None = None, timeout: float = 30.0
) -> list[tuple[str, int, str]]:
    """Write the letters that are due, then send all that are not sent: address, papers, and what went wrong ("" where it went).
    A server that refuses one reader does not stop the others."""
    moment = at or datetime.now(UTC)
    for reader in store.db.execute("SELECT * FROM readers ORDER BY id").fetchall():
        _write(store, dict(reader), moment)
    told = []
    letters = store.db.execute(
        "SELECT letter, readers.* FROM outbox JOIN readers ON readers.id = reader WHERE sent IS NULL GROUP BY letter ORDER BY letter"
    ).fetchall()
    for row in letters:
        papers = [
            views.one_by_id(store, paper)
            for (paper,) in store.db.execute(
                "SELECT paper FROM outbox WHERE letter = ? ORDER BY rowid", (row["letter"],)
            )
        ]
        failed = ""
        try:
            _send(post, letter(post.sender, dict(row), papers, row["letter"]), timeout)
        except (OSError, smtplib.SMTPException) as error:
            failed = " ".join(str(error).split()) or type(error).__name__
        else:
            with store.writing():
                store.db.execute("UPDATE outbox SET sent = ? WHERE letter = ?", (now(), row["letter"]))
        told.append((str(row["address"]), len(papers), failed))
    return told


def _write(store: Store, reader: dict[str, Any], moment: datetime) -> None:
    """Put a reader's new papers into the outbox, where a letter is due."""
    last = store.db.execute("SELECT max(letter) FROM outbox WHERE reader = ?", (reader["id"],)).fetchone()[0]
    if last is not None:
        unsent = store.db.execute("SELECT 1 FROM outbox WHERE reader = ? AND sent IS NULL", (reader["id"],)).fetchone()
        written = datetime.strptime(last.split("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if unsent is not None or moment - written < EVERY[reader["every"]]:
            return
    with store.writing():
        papers = _new(store, reader)
        name = f"{moment:%Y%m%dT%H%M%SZ}-{reader['id']}-{secrets.token_hex(6)}"
        rows = [(reader["id"], paper, name) for paper in papers]
        store.db.executemany("INSERT INTO outbox(reader, paper, letter) VALUES (?, ?, ?)", rows)


def _new(store: Store, reader: dict[str, Any]) -> list[int]:
    """Papers that came since a reader subscribed, have an abstract, and were in none of their letters."""
    words = " OR ".join(f'"{word}"' for word in reader["words"].split())
    found = "AND papers.id IN (SELECT rowid FROM words WHERE words MATCH ?)" if words else ""
    rows = store.db.execute(
        f"""SELECT id FROM papers WHERE added >= ? AND abstract != '' {found}
        AND id NOT IN (SELECT paper FROM outbox WHERE reader = ?) ORDER BY likes DESC, published DESC, id LIMIT ?""",
        (reader["since"], *([words] if words else []), reader["id"], MOST),
    )
    return [paper for (paper,) in rows]


def letter(sender: str, reader: dict[str, Any], papers: Sequence[dict[str, Any]], name: str) -> EmailMessage:
    """The letter, plain and HTML, with what ends the subscription in its head and at its foot."""
    end = f"patchbay papers unsubscribe {reader['token']}"
    made = EmailMessage()
    made["From"], made["To"] = sender, reader["address"]
    made["Subject"] = f"{len(papers)} new paper{'' if len(papers) == 1 else 's'}"
    made["Message-ID"] = f"<{name}@{sender.split('@')[1]}>"
    made["List-Unsubscribe"] = f"<mailto:{sender}?subject={quote('unsubscribe ' + reader['token'])}>"
    plain = [f"{p['title']}\n{address(p)}\n\n{p['abstract']}\n{runs_here(p)}".strip() for p in papers]
    made.set_content("\n\n\n".join([*plain, f"To end this: {end}"]) + "\n")
    safe = [
        f'<h2><a href="{html.escape(address(p))}">{html.escape(p["title"])}</a></h2><p>{html.escape(p["abstract"])}</p>'
        f"<p>{html.escape(runs_here(p))}</p>"
        for p in papers
    ]
    made.add_alternative(
        f"<!doctype html><html><body>{''.join(safe)}<p>To end this: <code>{html.escape(end)}</code></p></body></html>\n",
        subtype="html",
    )
    return made


def _send(post: Post, message: EmailMessage, timeout: float) -> None:
    """Hand one letter to the server."""
    secure = ssl.create_default_context()
    server: smtplib.SMTP = (
        smtplib.SMTP_SSL(post.host, post.port, timeout=timeout, context=secure)
        if post.encrypted
        else smtplib.SMTP(post.host, post.port, timeout=timeout)
    )
    with server:
        if not post.encrypted and server.ehlo()[0] == 250 and server.has_extn("starttls"):
            server.starttls(context=secure)
        if post.user:
            server.login(post.user, post.password)
        server.send_message(message)
