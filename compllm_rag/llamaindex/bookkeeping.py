"""What must stay true of every node that comes or goes, whichever of LlamaIndex's ways it takes.

The vector store tells of nodes in the step that writes them: an index, an ingestion pipeline and a bare `add` then
leave the same accounts behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.schema import BaseNode, MetadataMode

from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.accounts import Accounts
from compllm_rag.llamaindex.awaiting import Awaiting


class Bookkeeper:
    """Accounts, reference counts, and the nodes that came without their concepts.

    Args:
        library: Cuts nodes up as it does for the LLM.
        accounts: Counts by document.
        awaiting: Nodes that lack concepts.
    """

    def __init__(self, library: ConceptLibrary, accounts: Accounts, awaiting: Awaiting) -> None:
        self._library, self._accounts, self._awaiting = library, accounts, awaiting

    def coming(self, nodes: Sequence[BaseNode]) -> None:
        """Count nodes that are added, and note which of them lack concepts."""
        self._accounts.change(self._library, nodes, 1)
        passages = [self._library.passage(node.get_content(metadata_mode=MetadataMode.NONE)) for node in nodes]
        keys = list(dict.fromkeys(key for passage in passages for key in passage.keys))
        absent = {key for key, there in zip(keys, self._library.store.contains(keys), strict=True) if not there}
        if absent:
            lacking = {
                node.node_id: [key for key in dict.fromkeys(passage.keys) if key in absent]
                for node, passage in zip(nodes, passages, strict=True)
                if not absent.isdisjoint(passage.keys)
            }
            self._awaiting.add(lacking)

    def going(self, nodes: Sequence[BaseNode]) -> None:
        """Count nodes that are taken away."""
        self._accounts.change(self._library, nodes, -1)
        self._awaiting.forget(node.node_id for node in nodes)

    def cleared(self) -> None:
        """All nodes are taken away."""
        self._accounts.clear()
        self._awaiting.clear()
