"""What a server is told of how passages are read: heeded by all answers, told by each, refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from llama_index.core import Document
from typer.testing import CliRunner

import toy
from compllm_rag import ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.errors import ConfigurationError, NotCalibratedError
from compllm_rag.generation.costs import CostModel, Curve
from compllm_rag.reading.choice import FixedReadPolicy
from compllm_rag.server import serving
from compllm_rag.server.registry import Registry
from tests.server.server_samples import QUESTION, client, events, registry
from toy_embedder import save_sentence_transformer
from trained import trained, trained_deep

ASK = {"query": QUESTION, "max_tokens": 3, "top_k": 3}


def served(folder: Path, reading: dict[str, Any]) -> Registry:
    made = registry(folder / "s", trained_deep(toy.llm(layers=4)), reading=reading)
    parts = toy.TEXT.split("\n\n")
    documents = [Document(id_=f"{n}.md", text=part, metadata={"title": f"Part {n}"}) for n, part in enumerate(parts)]
    made.get(None).ingest(documents)
    return made


async def post(asking: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await asking.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_budget_holds_for_all_answers(tmp_path: Path) -> None:
    made = served(tmp_path, {"prefill_budget": 60.0, "read_policy": None, "missing": "text"})
    async with client(made) as asking:
        for mode in ("concepts", "text"):
            options = {"prefill_budget": 60.0} | ({"missing": "text"} if mode == "concepts" else {})
            whole = await post(asking, "/v1/query", **ASK, mode=mode)
            reading = whole["reading"]
            assert reading["options"] == options and reading["bypassed"] == 0
            policy = reading["outcome"]["read_policy"]
            assert policy["name"] == "budgeted" and policy["taken"]["prefill_budget"] <= 60
            assert len(policy["left_out"]) + len(whole["citations"]) == 3
            told = events((await asking.post("/v1/query", json={**ASK, "mode": mode, "stream": True})).text)
            plan = dict(told)["plan"]
            assert plan["reading"] == reading == told[-1][1]["reading"]
            assert all(node["parts"] and node["parts"][0]["why"] for node in plan["nodes"])
            assert {part["used"] for node in plan["nodes"] for part in node["parts"]} <= {"text", "left out", mode}
        chat = await post(asking, "/v1/chat", message=QUESTION, max_tokens=3)
        assert chat["reading"]["outcome"]["read_policy"]["taken"]["prefill_budget"] <= 60
        messages = [{"role": "user", "content": QUESTION}]
        openai = await post(asking, "/v1/chat/completions", model="compllm-rag", messages=messages, max_tokens=3)
        assert openai["compllm"]["reading"]["options"] == {"prefill_budget": 60.0, "missing": "text"}
        info = (await asking.get("/v1/info")).json()
        assert info["reading"] == {"prefill_budget": 60.0, "missing": "text"}
    made.close()


async def test_a_rate_is_none_of_text(tmp_path: Path) -> None:
    made = served(tmp_path, {"rate": 2.0})
    async with client(made) as asking:
        concepts = await post(asking, "/v1/query", **ASK)
        assert concepts["reading"] == {"options": {"rate": 2.0}, "outcome": {}, "bypassed": 0}
        assert all(cited["n_concepts"] < cited["n_tokens"] for cited in concepts["citations"])
        text = await post(asking, "/v1/query", **ASK, mode="text")
        assert text["reading"] is None and all(cited["mode"] == "text" for cited in text["citations"])
    made.close()


async def test_narrowed_answers_say_what_was_read(tmp_path: Path) -> None:
    whole, made = served(tmp_path / "whole", {}), served(tmp_path / "narrowed", {"narrowing": "3:0.1"})
    plans = []
    for each in (whole, made):
        async with client(each) as asking:
            told = events((await asking.post("/v1/query", json={**ASK, "stream": True})).text)
            plans.append(dict(told)["plan"])
        each.close()
    [all_of_them, plan] = plans
    narrowed = plan["reading"]["outcome"]["narrowing"]
    concepts = sum(node["n_concepts"] for node in plan["nodes"])
    assert narrowed == {"layer": 3, "share": 0.1, "by": "attention", "concepts": round(0.1 * concepts)}
    assert plan["prefill_cost"] < all_of_them["prefill_cost"] and plan["kv_bytes"] < all_of_them["kv_bytes"]
    # Entry layer 2 of 4: a concept passes layer 2, a tenth of them layer 3 as well.
    assert all(node["prefill_cost"] == pytest.approx(0.275, abs=0.01) for node in plan["nodes"])
    assert all(node["prefill_cost"] == 0.5 for node in all_of_them["nodes"])


async def test_a_request_says_otherwise(tmp_path: Path) -> None:
    made = served(tmp_path, {"narrowing": "3:0.1", "position_budget": 80})
    async with client(made) as asking:
        whole = await post(asking, "/v1/query", **ASK, reading={"narrowing": None, "rate": 2.0, "position_budget": 60})
        assert whole["reading"]["options"] == {"position_budget": 60, "rate": 2.0}
        assert "narrowing" not in whole["reading"]["outcome"]
        assert whole["reading"]["outcome"]["read_policy"]["taken"]["position_budget"] <= 60
        chat = await post(asking, "/v1/chat", message=QUESTION, max_tokens=3, reading={"narrowing": "3:0"})
        assert chat["reading"]["outcome"]["narrowing"] == {
            "layer": 3, "share": 0.0, "by": "attention", "concepts": 0,
        }  # fmt: skip
        messages = [{"role": "user", "content": QUESTION}]
        body = {
            "model": "compllm-rag",
            "messages": messages,
            "max_tokens": 3,
            "reading": {"relevance": "bm25", "relevance_cutoff": 0.5},
        }
        openai = await post(asking, "/v1/chat/completions", **body)
        assert openai["compllm"]["reading"]["options"]["relevance"] == "bm25"
        assert openai["compllm"]["reading"]["options"]["relevance_cutoff"] == 0.5
        untouched = await post(asking, "/v1/query", **ASK, reading={})
        assert untouched["reading"]["options"] == {"narrowing": "3:0.1", "position_budget": 80}
    made.close()


@pytest.mark.parametrize(
    ("mode", "reading", "said"),
    [
        ("concepts", {"position_budget": 81}, "can only be lowered"),
        ("concepts", {"position_budget": None}, "can only be lowered"),
        ("concepts", {"ttft_budget_s": 50.0}, "no budget of time"),
        ("concepts", {"rate": 999.0}, "out of reach"),
        ("concepts", {"narrowing": "nine"}, "narrowing"),
        ("text", {"rate": 2.0}, "text has no compression rate"),
        ("text", {"narrowing": "auto"}, "mode text"),
        ("concepts", {"read_policy": "fixed", "relevance": "bm25"}, "belongs to the budgeted"),
        ("concepts", {"missing": "recompress"}, "missing"),
        ("concepts", {"rate": float("inf")}, "rate"),
    ],
)
async def test_a_request_is_refused_before_its_stream(
    tmp_path: Path, mode: str, reading: dict[str, Any], said: str
) -> None:
    made = served(tmp_path, {"narrowing": "3:0.1", "position_budget": 80})
    async with client(made) as asking:
        body = json.dumps({**ASK, "mode": mode, "stream": True, "reading": reading})
        response = await asking.post("/v1/query", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request"), response.text
        assert said in str(response.json())
        assert (await post(asking, "/v1/query", **ASK))["answer"] is not None  # nothing is held
    made.close()


async def test_nothing_was_said(tmp_path: Path) -> None:
    made = served(tmp_path, {"rate": None})
    async with client(made) as asking:
        told = events((await asking.post("/v1/query", json={**ASK, "stream": True})).text)
        assert dict(told)["plan"]["reading"] is told[-1][1]["reading"] is None
        assert (await asking.get("/v1/info")).json()["reading"] == {}
    made.close()


async def test_objects_are_heeded_and_told_by_name(tmp_path: Path) -> None:
    """From Python; options that no flag gives go the same way."""
    curve = Curve(0.001, 0.001, 0.0)
    costs = CostModel("toy", "", 2, 4, "float32", "cpu", 1, curve, curve, curve, 0.001, 1000)
    made = served(tmp_path, {"ttft_budget_s": 0.32, "costs": costs, "read_policy": FixedReadPolicy()})
    async with client(made) as asking:
        told = (await post(asking, "/v1/query", **ASK))["reading"]
    assert told["options"] == {"ttft_budget_s": 0.32, "costs": "CostModel", "read_policy": "fixed"}
    assert told["outcome"]["read_policy"]["taken"]["ttft_budget_s"] <= 0.32
    assert told["outcome"]["read_policy"]["left_out"]
    made.close()


async def test_what_cannot_be_kept_is_told_to_who_asks(tmp_path: Path) -> None:
    made = served(tmp_path, {"position_budget": 3})
    async with client(made) as asking:
        response = await asking.post("/v1/query", json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "prompt_too_long")
        assert "position_budget of at least" in response.json()["error"]["message"]
    made.close()
    made = served(tmp_path / "other", {"rate": 3.0, "missing": "error"})
    async with client(made) as asking:
        response = await asking.post("/v1/query", json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "concepts_missing")
    made.close()


@pytest.mark.parametrize(
    ("reading", "error", "said"),
    [
        ({"read_policy": "budgeted"}, ConfigurationError, "nothing to spend"),
        ({"relevance": "maxsim", "read_policy": "fixed"}, ConfigurationError, "belongs to the budgeted read policy"),
        ({"rate": 999.0}, ConfigurationError, "out of reach"),
        ({"narrowing": "9:0.1"}, ConfigurationError, "cannot be narrowed at this layer"),
        ({"narrowing": "auto", "ttft_budget_s": 50.0}, ConfigurationError, "no budget of time"),
        ({"prefill_budget": 0.5}, ConfigurationError, "it is no share"),
        ({"ttft_budget_s": 1.0}, NotCalibratedError, "compllm-rag calibrate"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_start(
    tmp_path: Path, reading: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        registry(tmp_path / "s", trained_deep(toy.llm(layers=4)), reading=reading)


def test_states_are_of_deep_concepts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max-sim compares states"):
        registry(tmp_path / "s", trained(toy.llm()), reading={"relevance": "maxsim", "prefill_budget": 50.0})


@pytest.fixture(scope="module")
def storage(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    embedder = save_sentence_transformer(folder / "embedder", toy.TEXT)
    with ConceptIndex.create(folder / "s", llm=str(toy_folder), embedder=str(embedder)) as index:
        index.ingest([Document(id_="rock.md", text=toy.TEXT)])
    return folder / "s"


def serve(storage: Path, *words: object) -> Any:
    return CliRunner().invoke(app, ["serve", str(storage), "--port", "0", *map(str, words)])


def test_the_flags_of_serve(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []

    def listen(registry: Registry, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(run=lambda sockets: heard.append(registry.reading.shown()))

    monkeypatch.setattr(serving, "make_server", listen)
    flags = ("--rate", 2, "--read-policy", "budgeted", "--relevance", "bm25", "--position-budget", 80)
    flags = (*flags, "--relevance-cutoff", 0.8)
    done = serve(storage, *flags, "--prefill-budget", 70, "--missing", "text")
    assert done.exit_code == 0, done.output
    assert serve(storage).exit_code == 0
    given = {"rate": 2.0, "read_policy": "budgeted", "relevance": "bm25", "position_budget": 80, "prefill_budget": 70.0}
    given["relevance_cutoff"] = 0.8
    assert json.loads(json.dumps(heard)) == [{**given, "missing": "text"}, {}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--read-policy", "clever"), "unknown read policy: got clever, expected fixed, budgeted"),
        (("--missing", "guess"), "expected recompress, text, error, auto"),
        (("--relevance", "maxsim", "--read-policy", "fixed"), "relevance belongs to the budgeted read policy"),
        (("--read-policy", "budgeted"), "nothing to spend"),
        (("--narrow", "much"), "narrowing is not understood"),
    ],
)
def test_what_the_command_line_refuses_is_one_line(
    storage: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], said: str
) -> None:
    monkeypatch.setattr(serving, "make_server", lambda *args, **kwargs: pytest.fail("it would have listened"))
    done = serve(storage, *options)
    assert done.exit_code == 2 and "error: " in done.output and said in done.output
