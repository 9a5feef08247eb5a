"""Parts of the server by themselves: conversations, uploads by number, shared models, places, what was kept."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage

import toy
from compllm_rag import ConceptIndex
from compllm_rag.errors import StoreLockedError
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.llamaindex.readers import kinds
from compllm_rag.llamaindex.readers.found import Piece
from compllm_rag.server import documents, files
from compllm_rag.server import registry as registry_module
from compllm_rag.server.answer_schemas import Plan, Retrieved
from compllm_rag.server.answering import Asked, Conversation, answer, converse
from compllm_rag.server.documents import upload
from compllm_rag.server.failures import Refusal
from compllm_rag.server.files import Read, file_name, read_files
from compllm_rag.server.jobs import Jobs
from compllm_rag.server.passages import kept
from compllm_rag.server.registry import Registry
from compllm_rag.server.sessions import Sessions, memory_of
from compllm_rag.server.work import Cancelled, Workers
from tests.server.server_samples import registry
from toy_embedder import save_sentence_transformer
from trained import trained, trained_deep


def test_conversations_are_bounded_and_forgotten() -> None:
    now = [0.0]
    sessions = Sessions(most=2, idle_s=10, clock=lambda: now[0])
    first, other = sessions.begin("a"), sessions.begin("b")
    sessions.end_turn(first), sessions.end_turn(other)
    with pytest.raises(Refusal, match="no such conversation"):
        sessions.go_on(first.id, "b")
    assert sessions.go_on(first.id, "a") is first
    with pytest.raises(Refusal, match="still being answered"):
        sessions.go_on(first.id, "a")
    for _ in range(3):  # while a turn of the first is being answered
        sessions.end_turn(sessions.begin("a"))
    assert len(sessions) == 4  # the busy one stays, two more of its namespace, and that of the other
    first.memory.set([ChatMessage(role="user", content=str(number)) for number in range(300)])
    sessions.end_turn(first)
    assert [message.content for message in first.memory.get_all()] == [str(number) for number in range(200, 300)]
    assert sessions.go_on(other.id, "b") is other
    now[0] = 11.0
    assert len(sessions) == 1  # the busy one
    sessions.end_turn(other)
    now[0] = 30.0
    assert len(sessions) == 0


def test_uploads_are_remembered_for_their_namespace() -> None:
    jobs = Jobs(most=2)
    made = [jobs.add("a", (str(number),)) for number in range(3)]
    assert jobs.get(made[2].id, "a").documents == ("2",)
    for job, namespace in ((made[0], "a"), (made[2], "b")):
        with pytest.raises(Refusal, match="no such upload"):
            jobs.get(job.id, namespace)


async def test_places_are_given_back() -> None:
    workers, held = Workers("tests", 1, 1), threading.Event()
    first = workers.admit()
    running = asyncio.create_task(first.run(lambda: held.wait(30)))
    while not workers.running:
        await asyncio.sleep(0.01)
    second = workers.admit()
    with pytest.raises(Refusal) as refused:
        workers.admit()
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert int(refused.value.headers["Retry-After"]) >= 1
    second.leave(), second.leave()
    third = workers.admit()
    ended = []
    third.ended = lambda: ended.append(True)
    waiting = asyncio.create_task(third.run(lambda: "never"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert workers.waiting == 0 and ended == [True]
    fourth = workers.admit()
    pieces = fourth.stream(lambda: iter(["a"]))
    workers.refuse_new()
    with pytest.raises(Refusal, match="shutting down"):
        await anext(pieces)
    with pytest.raises(Refusal, match="shutting down"):
        workers.admit()
    held.set()
    assert await running is True
    assert workers.close(10) and workers._admitted == 0


async def test_a_job_that_nobody_waits_for_is_not_begun() -> None:
    workers = Workers("tests", 1, 1)
    ticket = workers.admit()
    ticket.cancel.set()
    with pytest.raises(Cancelled):
        await ticket.run(lambda: pytest.fail("it was begun"))
    assert workers.close(10)


def test_names_of_files_are_ids_and_never_paths() -> None:
    assert file_name("a\\b/c d.md") == "a/b/c d.md"
    assert (
        file_name("/etc/passwd") == "etc/passwd" and file_name("\x00\n") == "\ufffd\ufffd" and file_name("") == "file"
    )
    assert len(file_name("x" * 9999 + ".md")) == 500


def test_a_new_namespace_can_be_opened_by_the_names_of_its_models(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    monkeypatch.setattr(registry_module, "_CACHING", 1)
    made = Registry(tmp_path / "s", create={"llm": str(toy_folder), "embedder": str(embedder), "chunk_size": 60})
    made.start()
    two = made.get("two", create=True)
    assert two.embedder is made.get(None).embedder
    assert isinstance(made.get(None).generator.prefixes, PrefixCache) and two.generator.prefixes is None
    two.upload([Document(id_="rock.md", text=toy.TEXT)])
    made.close()
    with pytest.raises(Refusal, match="shutting down"):
        made.get("three")
    with ConceptIndex.load(tmp_path / "s", namespace="two") as index:
        assert list(index.ref_doc_info) == ["rock.md"] and index.config.chunk_size == 60
        assert str(index.manifest.embedder) == str(embedder)
    again = Registry(tmp_path / "s")
    again.start()
    assert again.opened("two") is None or again.opened("two").uploads.wait(60)
    assert again.get("two").embedder is again.get(None).embedder
    again.close()


def test_who_goes_away_at_the_passages_costs_no_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = registry(tmp_path / "s", trained_deep(toy.llm(layers=4)))
    index = made.get(None)
    index.ingest([Document(id_="a", text=toy.TEXT)])
    monkeypatch.setattr(type(index.generator), "stream", lambda *args, **kwargs: pytest.fail("it was read"))
    ticket = Workers("tests", 1, 1).admit()
    said = Conversation(memory_of([]))
    for events in (
        answer(index, Asked("Who?", "concepts", 2, index.generation), ticket),
        converse(index, Asked("Who?", "concepts", 2, index.generation), said, ticket),
    ):
        ticket.cancel.clear()
        assert [type(next(events)) for _ in range(2)] == [Retrieved, Plan]
        ticket.cancel.set()
        with pytest.raises(Cancelled):
            next(events)
    made.close()


def test_pages_that_a_file_has_no_longer_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = registry(tmp_path / "s", trained_deep(toy.llm(layers=4)))
    index = made.get(None)

    def pages(n: int) -> Read:
        pieces = [Piece(f"Page {i} of the book.", "Book", part=f"#page={i}") for i in range(1, n + 1)]
        monkeypatch.setitem(kinds._READERS, ".pdf", lambda source: iter(pieces))
        return read_files([("book.pdf", io.BytesIO(b"%PDF"))])

    index.upload([Document(id_="book.pdf#page=900", text="This came by itself.")])
    assert upload(index, pages(250), Jobs()).removed == []
    assert len(upload(index, pages(3), Jobs()).removed) == 247
    assert sorted(index.ref_doc_info) == [f"book.pdf#page={i}" for i in (1, 2, 3, 900)]
    made.close()


def test_an_upload_waits_for_another_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = trained_deep(toy.llm(layers=4))
    made = registry(tmp_path / "s", compressor)
    index = made.get(None)
    options = {"compressor": compressor, "embedder": index.embedder, "resume": False}
    with ConceptIndex.load(tmp_path / "s", **options) as other:
        other.faiss.catalog.claim()
        ending = threading.Timer(0.5, other.faiss.catalog.rollback)
        ending.start()
        assert upload(index, Read([Document(id_="a", text="One boat.")], []), Jobs()).changed == 1
        ending.join()
        monkeypatch.setattr(documents, "_PATIENCE_S", 0.2)
        other.faiss.catalog.claim()
        with pytest.raises(StoreLockedError):
            documents.delete(index, "a")
        other.faiss.catalog.rollback()
    documents.delete(index, "a")
    made.close()


def test_an_archive_that_unpacks_to_too_much_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 3_000_000)
    monkeypatch.setattr(files, "_UNPACKED", 1 << 20)
    with pytest.raises(Refusal, match="it unpacks to 2 MB, more than 1"):
        read_files([("bomb.docx", made)])


def test_a_damaged_archive_leaves_the_other_files() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("word/document.xml", b"<a/>")
    damaged = bytearray(made.getvalue())
    at = damaged.rindex(b"PK\x01\x02")  # the list of what is in it
    damaged[at : at + 4] = b"XXXX"
    assert zipfile.is_zipfile(io.BytesIO(damaged))
    read = read_files([("bad.docx", io.BytesIO(damaged)), ("good.txt", io.BytesIO(b"The ferry leaves at nine."))])
    assert [document.id_ for document in read.documents] == ["good.txt"]
    assert [(one.name, "no DOCX" in one.reason) for one in read.skipped] == [("bad.docx", True)]


@pytest.mark.parametrize("kind", ["deep", "input"])
def test_what_was_kept_of_a_passage(tmp_path: Path, kind: str) -> None:
    compressor = trained_deep(toy.llm(layers=4)) if kind == "deep" else trained(toy.llm())
    made = registry(tmp_path / "s", compressor)
    index = ConceptIndex.create(
        tmp_path / "rate2", compressor=compressor, embedder=made.get(None).embedder, rate=2.0, chunk_size=60
    )
    index.ingest([Document(id_="rock.md", text=toy.TEXT + " Größe 日本語.", metadata={"title": "Gull Rock"})])
    for node_id in index.faiss.node_ids("rock.md"):
        [node] = index.faiss.get_nodes([node_id])
        found = kept(index, node_id)
        assert "".join(token.text for token in found.tokens) == node.get_content()
        assert (found.kind, found.state, found.title) == (kind, "ready", "Gull Rock")
        assert len(found.tokens) == found.n_tokens
        assert sum(token.kept for token in found.tokens) == found.n_concepts < found.n_tokens
        assert found.prefill_cost == pytest.approx((0.5 if kind == "deep" else 1.0) / found.rate)
    index.close()
    made.close()
