"""What must stay true of every node that comes or goes, whichever of LlamaIndex's ways it takes.

The vector store tells of nodes in the step that writes them: an index, an ingestion pipeline and a bare `add` then
leave the same accounts behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llama_index.core.schema import BaseNode, MetadataMode

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.library import ConceptLibrary, Passage


class AccountsObserver:
    """Accounts, reference counts, and the nodes that came without their concepts.

    Args:
        library: Cuts nodes up as it does for the LLM.
        accounts: Counts by document.
        pending: Nodes that lack concepts.
    """

    def __init__(self, library: ConceptLibrary, accounts: Accounts, pending: PendingChunks) -> None:
        self._library, self._accounts, self._pending = library, accounts, pending

    def added(self, nodes: Sequence[BaseNode]) -> None:
        """Count nodes that are added, and note which of them lack concepts."""
        chunks = list(passages_of(self._library, nodes))
        self._accounts.change(chunks, 1)
        keys = list(dict.fromkeys(key for _, passage in chunks for key in passage.all_keys))
        absent = {key for key, there in zip(keys, self._library.store.contains(keys), strict=True) if not there}
        if absent:
            lacking = {
                node.node_id: [key for key in dict.fromkeys(passage.all_keys) if key in absent]
                for node, (_, passage) in zip(nodes, chunks, strict=True)
                if not absent.isdisjoint(passage.all_keys)
            }
            self._pending.add(lacking)

    def removed(self, nodes: Sequence[BaseNode]) -> None:
        """Count nodes that are taken away."""
        self._accounts.change(passages_of(self._library, nodes), -1)
        self._pending.forget(node.node_id for node in nodes)

    def passages(self, nodes: Sequence[BaseNode]) -> list[Passage]:
        """The text of each node as the LLM gets it."""
        return [passage for _, passage in passages_of(self._library, nodes)]

    def gone(self, nodes: Mapping[str, tuple[str, Passage]]) -> None:
        """Count nodes that are taken away and whose text is not at hand: document and passage by node id."""
        self._accounts.change(nodes.values(), -1)
        self._pending.forget(nodes)

    def complete(self, nodes: Sequence[BaseNode]) -> None:
        """Have the concepts of nodes, on the disk; their commit must not come first."""
        self._library.ensure(node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes)
        self._library.store.flush()

    def recheck(self, keys: Mapping[str, Sequence[str]]) -> None:
        """Note which nodes lack concepts by now: what was made may have been lost before it was on the disk.

        Args:
            keys: Of the concepts of each node, by its id.
        """
        wanted = list(dict.fromkeys(key for each in keys.values() for key in each))
        there = self._library.store.contains(wanted)
        absent = {key for key, kept in zip(wanted, there, strict=True) if not kept}
        lacking = {node_id: [key for key in each if key in absent] for node_id, each in keys.items()}
        self._pending.add({node_id: each for node_id, each in lacking.items() if each})

    def flush(self) -> None:
        """Have the concepts that were made on the disk."""
        self._library.store.flush()

    def cleared(self) -> None:
        """All nodes are taken away."""
        self._accounts.clear()
        self._accounts.choices.prune()
        self._pending.clear()


def passages_of(library: ConceptLibrary, nodes: Iterable[BaseNode]) -> Iterable[tuple[str, Passage]]:
    """For each node its document's id and its text as a passage."""
    for node in nodes:
        yield node.ref_doc_id or "", library.passage(node.get_content(metadata_mode=MetadataMode.NONE))
