"""The lineage as text, JSON and a page."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from artifacts import lineage, page
from artifacts.record import InputReference, Record
from artifacts.store import Store


@pytest.fixture
def published(local_store: Store, maker: Any) -> Record:
    """A small run whose documents and tokenizer are used in several places."""
    make = maker(local_store)
    documents = make("documents")
    tokenizer = make("tokenizer", documents=documents)
    tokens = make("tokens", documents=documents, tokenizer=tokenizer)
    fields = {**make.fields("pretrain", tokens=tokens), "metrics": {"summary": "12,000 steps", "loss": 1.23456}}
    with local_store.workspace(fields["key"]) as folder:
        (folder / "weights").write_bytes(b"w")
        model = local_store.commit(folder, **fields)
    record: Record = make("publish", model=model, tokenizer=tokenizer)
    local_store.set_name("models/arithmetic", record.key)
    return record


def test_the_text_is_a_tree_that_shows_what_is_shared_once(local_store: Store, published: Record) -> None:
    text = lineage.to_text(lineage.tree(local_store, published))
    # Keys change with the content of this test; their place does not.
    assert re.sub(r"  [0-9a-f]{8}", "  <key>", text).splitlines() == [
        "models/arithmetic  publish  <key>",
        "├─ model: pretrain  pretrain  <key>  (12,000 steps)",
        "│  └─ tokens: tokens  tokens  <key>",
        "│     ├─ documents: documents  documents  <key>",
        "│     └─ tokenizer: tokenizer  tokenizer  <key>",
        "│        └─ documents: documents  documents  <key>  (see above)",
        "└─ tokenizer: tokenizer  tokenizer  <key>  (see above)",
    ]


def test_the_json_holds_every_artifact_once(local_store: Store, published: Record) -> None:
    found = json.loads(json.dumps(lineage.to_json(lineage.tree(local_store, published))))
    assert found["root"] == published.key
    assert len(found["artifacts"]) == 5
    root = found["artifacts"][published.key]
    assert root["names"] == ["models/arithmetic"]
    assert set(root["inputs"]) == {"model", "tokenizer"}
    for artifact in found["artifacts"].values():
        assert all(source["key"] in found["artifacts"] for source in artifact["inputs"].values())


class Reader(HTMLParser):
    """Collects a page's tags, what they refer to, and whether they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "rect", "path") or (tag == "path" and self.get_starttag_text()[-2:] != "/>"):  # type: ignore[index]
            self.open.append(tag)
        for name, value in attributes:
            if name in ("href", "src", "xlink:href", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_stands_alone_and_its_links_lead_somewhere(local_store: Store, published: Record) -> None:
    text = page.to_html(lineage.tree(local_store, published))
    reader = read(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert len(reader.ids) == len(set(reader.ids)) == 5
    assert {link.removeprefix("#") for link in reader.links} == set(reader.ids)
    assert reader.tags.count("rect") == 5
    # Two uses of the tokenizer, two of the documents, and one of each other.
    assert reader.tags.count("path") == 6


def test_what_comes_from_records_is_escaped(local_store: Store, maker: Any) -> None:
    make = maker(local_store)
    bad = '"><script>alert(1)</script>\x1b[31m'
    source = make("source")
    fields: Any = {
        **make.fields("evil", {bad: bad}, **{bad: source}),
        "name": bad,
        "stage": bad,
        "metrics": {bad: 1, "text": bad},
        "notes": [bad],
        "engine": bad,
        "git_commit": bad,
        "packages": {bad: bad},
        "hardware": {bad: bad},
    }
    with local_store.workspace(fields["key"]) as folder:
        (folder / '"><script>').write_bytes(b"x")
        record = local_store.commit(folder, **fields)
    root = lineage.tree(local_store, record)
    assert "script" not in read(page.to_html(root)).tags
    assert "\x1b" not in lineage.to_text(root)


def test_a_source_whose_record_is_gone_is_shown_as_gone(local_store: Store, maker: Any) -> None:
    make = maker(local_store)
    source = make("documents")
    record = make("tokens", documents=source)
    local_store.backend.remove(f"records/{source.key}.json")
    root = lineage.tree(local_store, record)
    assert "documents: missing  record is gone" in lineage.to_text(root)
    assert "record is gone" in page.to_html(root)
    assert lineage.to_json(root)["artifacts"][source.key]["record"] is None


def test_a_source_that_was_made_again_with_other_content_is_marked(local_store: Store, maker: Any) -> None:
    make = maker(local_store)
    source = make("documents", {"a": b"first"})
    record = make("tokens", documents=source)
    local_store.backend.remove(f"objects/{source.output}")
    make("documents", {"a": b"second"})
    root = lineage.tree(local_store, record)
    assert f"made again since; used was {source.output[:8]}" in lineage.to_text(root)
    assert "made again since" in page.to_html(root)


def test_records_that_form_a_ring_end(local_store: Store, maker: Any) -> None:
    record = maker(local_store)("one")
    other = maker(local_store)("other")
    for this, that in ((record, other), (other, record)):
        ring = this.model_copy(update={"inputs": {"x": InputReference(digest=that.output, key=that.key)}})
        local_store.backend.write(f"records/{this.key}.json", ring.to_json())
    root = lineage.tree(local_store, local_store.resolve(record.key))
    assert len(list(lineage.walk(root))) == 2
    read(page.to_html(root))
