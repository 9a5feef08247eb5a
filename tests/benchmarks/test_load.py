"""The benchmark of many users, at a toy server in this process; and the page of what was measured at servers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

import benchmarks
import toy
from benchmarks import report
from benchmarks.common import environment
from benchmarks.server import load
from compllm_rag.server.registry import Registry
from tests.server.server_samples import registry, running
from trained import trained_deep

RECORDS = ("batching", "load", "editors", "editors_http")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    made = registry(tmp_path_factory.mktemp("load") / "s", trained_deep(toy.llm(layers=4)))
    from llama_index.core import Document

    made.get(None).ingest([Document(id_="rock.md", text=toy.TEXT)])
    return made


def measured(made: Registry) -> dict[str, Any]:
    args = argparse.Namespace(users=6, seconds=2.0, max_tokens=3)
    with running(made) as (url, _):
        result = asyncio.run(load.measure(url, os.getpid(), args))
    result["lost"] = len(result.pop("missing"))
    command = "compllm-rag bench load --users 6 --seconds 2"
    return {"command": command, "environment": environment(), "generations": 8, "waiting": 32, **result}


def test_many_users_of_one_server(made: Registry) -> None:
    record = measured(made)
    assert record["answered"] == sum(found["n"] for found in record["latency_s"].values()) > 6
    assert {"query", "stream"} <= set(record["latency_s"]) <= {"query", "stream", "list", "upload"}
    assert record["failed"] == record["refused"] == {} and record["lost"] == 0 < record["documents_accepted"]
    for found in (record["ttft_s"], *record["latency_s"].values()):
        assert 0 < found["p50"] <= found["p95"] <= found["most"]
    memory = record["rss_bytes"]
    assert 0 < memory["start"] <= memory["most"] and memory["end"] <= memory["most"]
    page = "\n".join(benchmarks.page("load").tables(record))
    assert f"{record['latency_s']['stream']['n']} |" in page and "Refused: none. Failed: none." in page
    assert f"Of {record['documents_accepted']} documents that were accepted 0 were lost." in page


def test_the_page_shows_what_was_measured_at_servers(tmp_path: Path) -> None:
    """Each section stands there when its file does, and else says how to run it."""
    none = page_of(tmp_path)
    assert all(f"`compllm-rag bench {name}`" in none for name in RECORDS) and "## Many" not in none
    for name, record in samples().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    page = page_of(tmp_path)
    assert not any(f"`compllm-rag bench {name}`\n" in page for name in RECORDS)
    assert "| question, streamed to its end | 40 | 1.50 | 3.25 | 4.00 |" in page
    assert "Refused: 3 (503 overloaded). Failed: none. Of 7 documents that were accepted 0 were lost." in page
    assert "100 at the start, 110 after a third of the time, 111 at the end, 112 at most" in page
    assert "| concepts | 8 together | 9.0 s | 0.90 |" in page
    assert page.count("## Many editors of one document\n") == 1  # one section of two files
    assert page.index("### Within one process") < page.index("### Through the HTTP server")
    assert "the chunks of the document hold it, s: median (95th percentile, most) of 9 | 0.20 (0.40, 0.50) |" in page
    assert "| sentences lost | 2 of 211 |" in page and "| text as the edits give it | NO |" in page


def page_of(results: Path) -> str:
    """What `python -m benchmarks.report` makes of some results; in this process, because starting one takes longer."""
    head, names = report.PAGES["benchmarks.md"]
    return report._page(head, names, {name: report._load(results / name) for name in names.split()})


def samples() -> dict[str, dict[str, Any]]:
    """Records of all four, with numbers that nobody measured."""
    where = {"commit": "0" * 40, "gpu": None, "cpu": "C", "torch_threads": 1, "cores": 2, "versions": {"torch": "2"}}
    spread = {"n": 40, "p50": 1.5, "p95": 3.25, "most": 4.0}
    wait = {"n": 9, "p50": 0.2, "p95": 0.4, "most": 0.5}
    one = {"seconds": 10.0, "queries": 4, "cpu_s": 9.0, "ttft_s": 1.0}
    many = {
        "seconds": 9.0, "of_sequential": 0.9, "cpu_of_sequential": 0.8, "per_query_of_sequential": 0.4,
        "rows_per_step": 7.5,
    }  # fmt: skip
    editors = {
        "editors": 9, "source_tokens": 4731, "seconds": 60.0, "edits": 9, "uploads": 3,
        "chunks_uploaded_per_edit": 12.0, "chunks_embedded_per_edit": 1.0, "units_compressed_per_edit": 0.5,
        "concepts_after_s": 1.0, "sentences": 211, "server_cpu_s_per_edit": 0.4,
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        "batching": {
            "top_k": 2, "tokens": 128, "modes": {"concepts": {"sequential": one, "concurrent": {"8": many}}},
        },
        "load": {
            "users": 50, "seconds": 121.0, "max_tokens": 16, "generations": 8, "waiting": 64, "answered": 90,
            "answered_per_s": 0.75, "latency_s": {"stream": spread}, "ttft_s": wait, "refused": {"503 overloaded": 3},
            "failed": {}, "documents_accepted": 7, "lost": 0,
            "rss_bytes": {
                name: n << 20 for name, n in (("start", 100), ("after_a_third", 110), ("end", 111), ("most", 112))
            },
        },
        "editors": {
            **editors, "answerable_s": {"median": 3.6, "p95": 5.5, "most": 6.9}, "sentences_lost": 0,
            "text_is_as_replayed": True, "sentences_retrieved": 211,
        },
        "editors_http": {
            **editors, "accepted_s": wait, "answerable_s": wait, "found_s": wait, "answered_s": wait, "top_k": 2,
            "asking": 10, "edits_replaced_before_a_look": 1, "edits_not_met": 0, "looks_stale": 0, "looks_again": 0,
            "sentences_lost": 2,
            "uploads_not_whole": 0, "text_is_as_replayed": False, "last_writer_wins": True, "refused": {},
            "at_the_same_time": {"writers": 4, "whole": True, "next_upload_wins": True},
        },
    }  # fmt: skip
    return {
        name: {"command": f"compllm-rag bench {name} --made-up", "environment": where, **own}
        for name, own in found.items()
    }
