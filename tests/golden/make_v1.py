"""Made `tests/golden/v1/`, once: a storage of format version 1, with the toy LLM it was made by.

The files are kept as they are, for every later release to open. Never run this again for version 1: a change that it
would show is a change of the format, and belongs into a version of its own.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import toy
from compllm_rag import ConceptIndex, TargetLLM
from compllm_rag.llamaindex.documents import load_documents
from toy_embedder import HashEmbedder
from trained import trained

PARAGRAPHS = toy.TEXT.split("\n\n")


def main() -> None:
    """Make what is not there yet."""
    kept, home = Path(__file__).parent / "v1", Path("/tmp/golden-v1")  # a path that says nothing: it is kept inside
    if kept.exists():
        raise SystemExit(f"{kept} is there already, and must not change")
    toy.save(home / "llm")
    corpus = home / "corpus"
    corpus.mkdir()
    for name, text in zip(("rock.md", "marsh.txt", "today.txt"), PARAGRAPHS, strict=True):
        (corpus / name).write_text(text + "\n", encoding="utf-8")
    compressor = trained(TargetLLM.from_pretrained(home / "llm"))
    with ConceptIndex.create(
        home / "made", compressor=compressor, embedder=HashEmbedder(), chunk_size=60, namespace="golden"
    ) as index:
        index.ingest(load_documents([corpus]), within=[corpus])
        # A change and a deletion, so that there is something to reclaim.
        (corpus / "today.txt").write_text(PARAGRAPHS[2].replace("Sundays", "Mondays") + "\n", encoding="utf-8")
        (corpus / "marsh.txt").unlink()
        index.ingest(load_documents([corpus]), within=[corpus], prune=True)
        expected = {
            "stats": index.stats(),
            "nodes": {node.node_id: node.text for node in index.faiss.iter_nodes()},
            "concepts": {
                node.node_id: index.library.fetch(node.text, missing="error").concepts.numpy().tobytes().hex()
                for node in index.faiss.iter_nodes()
            },
        }
    (home / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    shutil.move(home, kept)


if __name__ == "__main__":
    main()
