"""Rates that follow the text, several rates side by side, a guard and a budget: in a whole storage, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores import SimpleVectorStore

import toy
from compllm_rag import ConceptIndex, GenerationConfig
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.rate_policies.guard import EXACT_LIMIT, guard_words
from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rate_policies.measures import FEATURES
from compllm_rag.compression.rate_policies.policies import InformationRate, PricedRate
from compllm_rag.errors import BudgetError, ConfigurationError, RateOutOfReachError, StorageMismatchError
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.llamaindex.transform import ConceptTransform
from compllm_rag.storage.manifest import META_KEY
from compllm_rag.storage.stats import rate_notes, storage_stats
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import QUESTION, check_whole, documents, execute, sound
from toy_embedder import HashEmbedder
from trained import trained, trained_deep

SHORT = GenerationConfig(max_new_tokens=4)
TABLE = "\n".join(f"{i},2024-03-{i:02d},{i * 7919 % 1000}.{i * 31 % 100},{i * 104729 % 9999}" for i in range(10, 28))


@pytest.fixture(scope="module")
def deep() -> DeepCompressor:
    return trained_deep(toy.llm(layers=4))


def learned(compressor: DeepCompressor) -> LossPredictor:
    """Loss rises with the rate alone."""
    width = len(FEATURES)
    return LossPredictor(
        mean=(0.0,) * width,
        scale=(1.0,) * width,
        weights=((0.0,) * width,) * len(RATES),
        offsets=tuple(0.05 * (rate - 1) for rate in RATES),
        units=10,
        compressor=compressor.fingerprint,
    )


def open_index(path: Path | None, compressor: Any, **options: Any) -> ConceptIndex:
    return ConceptIndex.create(
        path, compressor=compressor, embedder=HashEmbedder(), **{"chunk_size": 60, "generation": SHORT, **options}
    )


def ask(index: ConceptIndex) -> tuple[str, dict[str, Any]]:
    response = index.as_query_engine(similarity_top_k=4).query(QUESTION)
    return str(response), response.metadata["compllm"]


def rows(index: ConceptIndex, what: str = "text") -> list[Any]:
    with index.faiss.catalog.reading() as connection:
        return [row[0] for row in connection.execute(f"SELECT {what} FROM choices ORDER BY text")]


@pytest.mark.parametrize(
    "options",
    [
        {"rate": "information"},
        {"rate": "learned", "rate_options": {"most_loss": 0.06}},
        {"rates": (1, 2)},
        {"rates": ("auto", 4), "guard": "exact"},
        {"budget": 400},
    ],
    ids=str,
)
def test_what_was_chosen_is_kept_and_never_chosen_again(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = trained_deep(toy.llm(layers=4))
    deep.losses = learned(deep) if options.get("rate") == "learned" else None
    with open_index(tmp_path / "s", deep, **options) as index:
        index.ingest([*documents(), Document(id_="t", text=TABLE)])
        check_whole(index)
        before, account = ask(index)
        assert account["store"]["misses"] == 0
        stats = index.stats()
        assert sum(stats["chunks_by_rate"].values()) + sum(stats["chunks_as_text"].values()) == stats["chunks"]
    sound(tmp_path / "s")
    assert storage_stats(tmp_path / "s") == stats

    def never(*_: object) -> Any:
        pytest.fail("it is known what was chosen")

    for policy in (InformationRate, PricedRate):
        monkeypatch.setattr(policy, "n_concepts", never)
        monkeypatch.setattr(policy, "rates", never)
    monkeypatch.setattr("compllm_rag.compression.rate_policies.losses.LearnedLosses.of", never)
    with ConceptIndex.load(
        tmp_path / "s", compressor=deep, embedder=HashEmbedder(), read_only=True, generation=SHORT
    ) as index:
        after, again = ask(index)
        assert (after, again["nodes"]) == (before, account["nodes"])


def test_rates_follow_the_text_and_each_chunk_has_those_it_is_asked_for(deep: DeepCompressor) -> None:
    index = open_index(None, deep, rates=("information", 4))
    index.ingest(documents())
    texts = [node.text for node in index.faiss.iter_nodes()]
    for text in texts:
        achieved, other = index.library.rates_held(text)
        passage = index.library.passage(text)
        assert other == 4.0 and 1 <= achieved <= 4
        assert achieved == pytest.approx(passage.achieved_rate)
        assert index.library.fetch(text, missing="error", rate=4).hits == len(passage.segments)
        assert index.library.passage(text, rate=achieved) is passage


def test_a_deleted_document_leaves_no_choice_behind(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rate="information", guard="exact") as index:
        index.ingest([*documents(2), Document(id_="t", text=TABLE)])
        kept = rows(index)
        assert kept and sum(rows(index, "n")) == index.stats()["chunks"]
        index.refresh_ref_docs(documents(2, version=1))
        check_whole(index)
        assert sum(rows(index, "n")) == index.stats()["chunks"] and rows(index) != kept
        for doc in ("d0", "d1", "t"):
            index.delete_ref_doc(doc)
        assert rows(index) == [] and index.stats()["chunks_as_text"] == {}
        index.ingest(documents(1))
        index.vector_store.clear()
        assert rows(index) == []


def index_of_before(path: Path, compressor: DeepCompressor) -> ConceptIndex:
    """The storage as a release would have left it that did not keep what the guard measured."""
    with Catalog.open(path) as catalog:
        rows_ = [(json.loads(value), text) for text, value in _choices(catalog)]
        for held, _ in rows_:
            held.pop("expected", None)
        with catalog.writing() as connection:
            changed = [(json.dumps(held), text) for held, text in rows_]
            connection.executemany("UPDATE choices SET value = ? WHERE text = ?", changed)
        catalog.commit()
    return open_index(path, compressor, guard="exact")


def _choices(catalog: Catalog) -> list[tuple[str, str]]:
    with catalog.reading() as connection:
        return connection.execute("SELECT text, value FROM choices").fetchall()


def test_a_table_stays_text_is_counted_and_explained(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, guard="exact") as index:
        index.ingest([*documents(1), Document(id_="t", text=TABLE)])
        table = [node for node in index.faiss.iter_nodes() if node.ref_doc_id == "t"]
        for node in table:
            fetched = index.library.fetch(node.text, missing="error")
            assert (fetched.concepts, fetched.reason) == (None, "guard")
            assert index.library.rates_held(node.text) == ()
            with pytest.raises(ConfigurationError, match="as the guard decided"):
                index.library.fetch(node.text, rate=1)
        _, account = ask(index)
        used = {facts["used"]: facts.get("why") for facts in account["nodes"].values()}
        assert used == {"concepts": None, "text": "kept as text by the guard"}
        values = {node.node_id: index.library.passage(node.text).expected for node in table}
        assert min(values.values()) > EXACT_LIMIT
        budgeted = index.as_query_engine(similarity_top_k=4, position_budget=900).query(QUESTION).metadata["compllm"]
        for told in (account, budgeted):
            found = {name: facts["guard"] for name, facts in told["nodes"].items() if "guard" in facts}
            assert found and {*found} <= {*values}
            for name, guard in found.items():
                assert guard == {"by": "exact", "expected": values[name], "limit": EXACT_LIMIT}
        # Whatever decides how passages are read, and at whatever rate, a table stays text, and is there.
        for reading in ({"read_policy": "fixed"}, {"rate": 2}, {"rate": 2, "read_policy": "fixed"}):
            told = index.as_query_engine(similarity_top_k=9, **reading).query(QUESTION).metadata["compllm"]
            kept = [facts for name, facts in told["nodes"].items() if name in values]
            assert 0 < len(kept) < len(told["nodes"])
            for facts in kept:
                assert (facts["used"], facts["why"], facts["n_concepts"]) == ("text", "kept as text by the guard", 0)
                assert facts["positions"] >= facts["n_tokens"] > 0 and facts["guard"]["by"] == "exact"
            assert {facts["used"] for name, facts in told["nodes"].items() if name not in values} == {"concepts"}
        for node in table:
            assert index.library.at_rate(2).fetch(node.text, missing="error").reason == "guard"
        values = list(values.values())
        stats = index.stats()
        assert stats["guard_limit"] == EXACT_LIMIT
        assert stats["guard_expected"] == {
            "least": min(values), "mean": pytest.approx(sum(values) / len(values)), "most": max(values)
        }  # fmt: skip
        assert stats["chunks_as_text"] == {"guard": len(table)}
        assert stats["tokens_as_text"] == sum(len(index.library.passage(node.text).ids) for node in table)
        assert stats["achieved_rate"] == 1.0 and stats["prefill_cost"] is not None and 0.5 < stats["prefill_cost"] < 1
        [note] = [note for note in rate_notes(stats) if "stay text (guard)" in note]
        assert f"({min(values):.2f} to {max(values):.2f})" in note and "limit 0.25" in note
        check_whole(index)
    sound(tmp_path / "s")
    with index_of_before(tmp_path / "s", deep) as index:
        stats = index.stats()
        assert stats["chunks_as_text"] == {"guard": len(table)} and stats["guard_expected"] is None
        [note] = [note for note in rate_notes(stats) if "stay text (guard)" in note]
        assert note.endswith("at the cost of text")
        found = [facts["guard"] for facts in ask(index)[1]["nodes"].values() if facts["used"] == "text"]
        assert found and all(guard == {"by": "exact", "expected": None, "limit": EXACT_LIMIT} for guard in found)
        assert "not kept, limit 0.25" in guard_words(found[0])
    all_text = open_index(None, deep, guard="exact", guard_limit=0.0)
    all_text.ingest(documents(1) + [Document(id_="t", text=TABLE)])
    assert ask(all_text)[0] is not None and all_text.stats()["guard"] == "exact"


def test_a_guard_by_predicted_loss(deep: DeepCompressor) -> None:
    with pytest.raises(ConfigurationError, match="train rates"):
        open_index(None, deep, guard="loss")
    own = trained_deep(toy.llm(layers=4))
    own.losses = learned(own)
    kept, left = (open_index(None, own, rate=2, guard="loss", guard_limit=limit) for limit in (0.1, 0.01))
    for index in (kept, left):
        index.ingest(documents(2))
    assert kept.stats()["chunks_as_text"] == {}
    assert left.stats()["chunks_as_text"] == {"guard": left.stats()["chunks"]}
    assert left.stats()["prefill_cost"] == 1.0


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_a_budget_is_kept_whatever_comes(codec: str, tmp_path: Path, deep: DeepCompressor) -> None:
    compressor = deep if codec == "deep" else trained(toy.llm())
    whole = open_index(None, compressor, rate=1)
    whole.ingest(documents())
    most = whole.accounts.choices.concepts()
    with open_index(tmp_path / "s", compressor, budget=most // 2) as index:
        report = index.ingest(documents(2))
        assert report.segments_compressed > 0
        first = index.store.stats().concepts
        assert first <= index.accounts.choices.concepts() <= most // 2  # segments are shared, chunks are not
        assert codec == "input" or first == index.accounts.choices.concepts()
        index.ingest(documents())
        check_whole(index)
        assert most * 0.35 < index.accounts.choices.concepts() <= most // 2
        assert len(index.pending) == 0
        assert ask(index)[1]["store"]["misses"] == 0
        stats = index.stats()
        assert stats["budget"] == most // 2 and stats["rate"] == "budget"
        index.insert(Document(id_="late", text=toy.TEXT.replace("Ada", "Eva")))
        check_whole(index)
        assert index.accounts.choices.concepts() <= most // 2
        index.compact()
        assert index.store.stats().concepts <= index.accounts.choices.concepts()
    sound(tmp_path / "s")
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), generation=SHORT) as index:
        assert index.library.policy.price > 0  # type: ignore[attr-defined]
        assert ask(index)[1]["store"]["misses"] == 0


def test_a_budget_is_changed_by_giving_another_one(tmp_path: Path, deep: DeepCompressor) -> None:
    kept = []
    for budget in (300, 200, 400, "1GB"):
        with open_index(tmp_path / "s", deep, budget=budget) as index:
            index.ingest(documents())
            kept.append(index.accounts.choices.concepts())
            check_whole(index)
            assert len(index.pending) == 0 and ask(index)[1]["store"]["misses"] == 0
    assert kept[0] <= 300 and kept[1] <= 200 < kept[0] < kept[2] <= 400 < kept[3]
    with open_index(tmp_path / "s", deep) as index:
        assert (index.config.budget_positions, index.config.budget_bytes) == (None, 10**9)
        assert index.stats()["achieved_rate"] == 1.0
    sound(tmp_path / "s")


def test_uploads_keep_to_a_budget(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, budget=300) as index:
        index.ingest(documents(2))
        index.upload(documents())
        assert index.uploads.wait(60)
        assert index.accounts.choices.concepts() <= 300 and len(index.pending) == 0
        check_whole(index)
    sound(tmp_path / "s")


def test_a_budget_that_nothing_fits_says_the_least_that_would_do(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, budget=30) as index:
        with pytest.raises(BudgetError, match=r"got 30 positions, expected at least (\d+) positions") as caught:
            index.ingest(documents())
        assert index.stats()["chunks"] == 0 and rows_or_none(index) == 0
    least = int(str(caught.value).split("at least ")[1].split()[0])
    index = open_index(None, deep, budget=least)
    index.ingest(documents())
    assert index.accounts.choices.concepts() == least
    size = index.store.encoding.nbytes(1, index.library.spec.width)
    with pytest.raises(BudgetError, match=f"at least {least * size} bytes"):
        open_index(None, deep, budget="1kb").ingest(documents())
    of_bytes = open_index(None, deep, budget=f"{(least + 40) * size / 1000}kB")
    of_bytes.ingest(documents())
    assert of_bytes.store.stats().payload_bytes <= (least + 40) * size


def rows_or_none(index: ConceptIndex) -> int:
    return index.accounts.choices.summary().chunks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": "fast"}, "auto, information, learned, budget"),
        ({"rate": "learned"}, "train rates"),
        ({"rates": (1, 1)}, "named twice"),
        ({"rate": 1, "budget": 100}, "chooses the rates itself"),
        ({"rate": "information", "rate_options": {"bands": (4, 3, 2, 1)}}, "rise from dense"),
        ({"rate": "information", "rate_options": {"speed": 1}}, "speed"),
        ({"rate": "information", "rate_options": 3}, "RateOptions"),
        ({"guard": "exact", "guard_limit": -1}, "guard limit"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    options: dict[str, Any], said: str, tmp_path: Path, deep: DeepCompressor
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        open_index(tmp_path / "s", deep, **options)
    assert not (tmp_path / "s").exists()


def test_rates_out_of_reach_are_refused(deep: DeepCompressor) -> None:
    with pytest.raises(RateOutOfReachError, match="at most 6"):
        open_index(None, trained(toy.llm()), rates=(2, 8))
    with pytest.raises(RateOutOfReachError):
        open_index(None, trained(toy.llm()), rate="information", rate_options={"bands": (1, 2, 3, 8)})


def test_a_storage_keeps_the_rates_it_was_made_with(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rates=("auto", 2), guard="exact") as index:
        index.ingest(documents(1))
    with open_index(tmp_path / "s", deep, rate="auto", guard="exact") as index:
        assert (index.config.rate, index.config.also_rates) == ("information", (2.0,))
    with open_index(tmp_path / "s", deep) as index:
        assert index.config.also_rates == (2.0,)
    for other in ({"rate": 2}, {"rates": ("auto", 3)}, {"guard": "off"}, {"budget": 10}, {"rate": "learned"}):
        with pytest.raises(StorageMismatchError):
            open_index(tmp_path / "s", deep, **other)


def test_a_storage_of_before_loads_and_answers_as_before(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rate=2.0) as index:
        index.ingest(documents())
        before = ask(index)
    database = tmp_path / "s" / "catalog.db"
    with ConceptIndex.load(tmp_path / "s", compressor=deep, embedder=HashEmbedder(), read_only=True) as index:
        manifest = json.loads(index.faiss.catalog.get_meta(META_KEY) or "")
    for name in set(manifest["ingest"]) - {"rate", "chunk_size", "namespace", "encoding"}:
        del manifest["ingest"][name]
    execute(database, "UPDATE meta SET value = ? WHERE key = ?", json.dumps(manifest), META_KEY)
    execute(database, "DROP TABLE choices")
    with ConceptIndex.load(tmp_path / "s", compressor=deep, embedder=HashEmbedder(), generation=SHORT) as index:
        after = ask(index)
        assert (after[0], after[1]["nodes"]) == (before[0], before[1]["nodes"])
        assert index.stats()["chunks_by_rate"] is None and index.stats()["rate_fluctuation"] is None
        index.insert(Document(id_="new", text="A new tower stands on Gull Rock."))
        index.delete_ref_doc("d0")
        check_whole(index)
    sound(tmp_path / "s")


def test_a_repaired_storage_keeps_what_was_chosen(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rates=("information", 3), guard="exact") as index:
        index.ingest([*documents(3), Document(id_="t", text=TABLE)])
        before, chosen, stats = ask(index), rows(index, "value"), index.stats()
    pack = max((tmp_path / "s" / "concepts").rglob("*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    report = repair_storage(tmp_path / "s", compressor=deep, embedder=HashEmbedder())
    assert report.sound and report.records_dropped and report.segments_compressed
    with ConceptIndex.load(tmp_path / "s", compressor=deep, embedder=HashEmbedder(), generation=SHORT) as index:
        check_whole(index)
        assert rows(index, "value") == chosen
        assert ask(index)[1]["nodes"] == before[1]["nodes"]
        assert index.stats()["chunks_as_text"] == stats["chunks_as_text"]


def test_a_damaged_choice_is_made_anew_and_no_wrong_concept_is_read(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rate="information") as index:
        index.ingest(documents(2))
        before = ask(index)
    for value in ("{", '{"rates": [1.0], "k": [[9999]], "reason": null}', "[]"):
        execute(tmp_path / "s" / "catalog.db", "UPDATE choices SET value = ?", value)
        with ConceptIndex.load(tmp_path / "s", compressor=deep, embedder=HashEmbedder(), generation=SHORT) as index:
            assert ask(index)[1]["nodes"] == before[1]["nodes"]
    check = verify_storage(tmp_path / "s", deep=True)
    assert [finding.part for finding in check.findings] == ["counts"] and "cannot be read" in check.findings[0].what
    assert repair_storage(tmp_path / "s", compressor=deep, embedder=HashEmbedder()).sound
    sound(tmp_path / "s")
    execute(tmp_path / "s" / "catalog.db", "UPDATE choices SET n = n + 5")
    assert "are known, and" in verify_storage(tmp_path / "s").findings[0].what


def test_a_transform_of_a_storage_finds_what_was_chosen(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rates=("information", 2)) as index:
        index.ingest(documents(2))
        described = ConceptTransform(index.library).to_dict()
        nodes = list(index.faiss.iter_nodes())
        assert ConceptTransform.from_dict(described, index.library)(nodes) == nodes
    assert described["rate"].startswith("information(") and described["rate"].endswith("+2")
    other = open_index(None, deep, rate="information")
    with pytest.raises(StorageMismatchError, match="another rate"):
        ConceptTransform.from_dict(described | {"storage": None}, other.library)


def test_other_vector_stores_keep_several_rates_and_refuse_a_budget(deep: DeepCompressor) -> None:
    options: dict[str, Any] = {"compressor": deep, "chunk_size": 60, "generation": SHORT}
    with pytest.raises(ConfigurationError, match="keeps its own text"):
        ConceptIndex.from_vector_store(SimpleVectorStore(), HashEmbedder(), budget=100, **options)
    index = ConceptIndex.from_vector_store(
        SimpleVectorStore(), HashEmbedder(), rates=("information", 2), guard="exact", **options
    )
    index.ingest([*documents(2), Document(id_="t", text=TABLE)])
    assert ask(index)[1]["store"]["misses"] == 0
    assert index.stats()["chunks_as_text"]["guard"] > 0
    for doc in ("d0", "d1", "t"):
        index.delete_ref_doc(doc)
    assert rows(index) == []
    with index.faiss.catalog.reading() as connection:
        assert connection.execute("SELECT count(*) FROM refs").fetchone()[0] == 0


def test_slow_chunks_and_unstable_rates_are_told(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep, rate=2) as index:
        index.ingest(documents(2))
        assert all(seconds > 0 for seconds in rows(index, "seconds"))
        assert index.stats()["slow_chunks"] == 0 or index.stats()["slowest_chunks"]
    execute(tmp_path / "s" / "catalog.db", "UPDATE choices SET seconds = 0.25")
    stats = storage_stats(tmp_path / "s")
    assert stats["slow_chunks"] == len({node for node in range(stats["slow_chunks"])}) > 0
    worst = stats["slowest_chunks"][0]
    assert worst["seconds"] == 0.25 and worst["doc_id"] in ("d0", "d1") and worst["tokens"] > 0
    assert any("took longer than 100 ms" in note and "250 ms" in note for note in rate_notes(stats))
    assert 0 < stats["rate_fluctuation"] < 0.05
    short = open_index(None, deep, rate=4)
    short.ingest([Document(id_="x", text="A tower."), Document(id_="y", text="It burns well.")])
    assert short.stats()["rate_fluctuation"] > 0.05
    assert any("chunks are too short" in note for note in rate_notes(short.stats()))


def test_metadata_alone_does_not_make_a_chunk_text(deep: DeepCompressor) -> None:
    index = open_index(None, deep, guard="exact")
    index.insert(Document(id_="d", text=toy.TEXT, metadata={"ids": "123456789 " * 20}))
    assert index.stats()["chunks_as_text"] == {}
    assert all(n.get_content(metadata_mode=MetadataMode.NONE) in toy.TEXT for n in index.faiss.iter_nodes())
