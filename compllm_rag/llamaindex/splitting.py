"""How documents become nodes: by the `ConceptNodeParser`, or by somebody's own transformations.

Which ones made the nodes of a storage is remembered in it: a document that did not change is then skipped, one that was
split otherwise is split again, and whoever opens the storage without saying how is told, rather than have every
document split anew by the default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llama_index.core.ingestion import run_transformations
from llama_index.core.ingestion.pipeline import remove_unstable_values
from llama_index.core.schema import BaseNode, Document, NodeRelationship, TransformComponent

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.kv import KeyValues
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.fingerprint import tagged_digest
from compllm_rag.llamaindex.node_parser import ConceptNodeParser, layout_of

_META = "transformations"
_UNSEEN = "compllm/unseen"


class Splitting:
    """Makes nodes of documents.

    Args:
        catalog: Remembers how.
        parser: The default.

    Attributes:
        transformations: What makes nodes.
        own: Whether they are somebody's own.
    """

    def __init__(self, catalog: Catalog, parser: ConceptNodeParser) -> None:
        self._catalog, self._parser, self._values = catalog, parser, KeyValues(catalog)
        self.transformations: list[TransformComponent] = [parser]
        self._given = self.own = False

    def use(self, transformations: Sequence[TransformComponent]) -> None:
        """Make nodes by these from now on; the index's own parser alone is the default again."""
        self.transformations, self._given = list(transformations), True
        self.own = not (len(self.transformations) == 1 and self.transformations[0] is self._parser)

    def knows(self, document: Document, kept: str | None) -> bool:
        """Whether a document is as it was when this hash was remembered of it, and what the hash does not see.

        Of documents that a pipeline of LlamaIndex brought in, and of storages of before, there is the hash alone.
        """
        if kept != self.hash_of(document):
            return False
        row = self._values.get(document.id_, _UNSEEN)
        return row is None or row.get("hash") != kept or row.get("digest") == _unseen(document)

    def note(self, document: Document) -> None:
        """Remember what the hash of a document does not see, beside it; it commits with the hash."""
        row = {"hash": self.hash_of(document), "digest": _unseen(document)}
        self._values.put(document.id_, row, _UNSEEN)

    def forget(self, doc_id: str) -> None:
        """Forget what `note` remembered of a document."""
        self._values.delete(doc_id, _UNSEEN)

    def hash_of(self, document: Document) -> str:
        """What a document is known by: its hash and, with transformations of one's own, theirs."""
        if not self.own:
            return str(document.hash)
        return tagged_digest("compllm-rag/split-document", document=document.hash, by=_identity(self.transformations))

    def nodes(self, documents: Sequence[Document], *, show_progress: bool = False) -> list[BaseNode]:
        """Nodes of documents, each with its document as its source.

        Raises:
            StorageMismatchError: The storage was made by other transformations, and none were given.
            ConfigurationError: A node does not say which document it comes from.
        """
        self.check()
        if not self.own:
            return self._parser.get_nodes_from_documents(documents, show_progress=show_progress)
        made = list(run_transformations(list(documents), self.transformations, show_progress=show_progress))
        _attribute(made, documents)
        return made

    def check(self) -> None:
        """Refuse to split by the default what was split otherwise.

        Raises:
            StorageMismatchError: Naming the transformations that the storage was made by.
        """
        kept = self._catalog.get_meta(_META)
        if kept is not None and not self._given and json.loads(kept)["names"]:
            raise StorageMismatchError(
                "the documents of this storage were split by transformations of your own",
                got="none now",
                expected=", ".join(json.loads(kept)["names"]),
                next_step="pass transformations= to ConceptIndex.load or create, or split all of them anew by "
                "index.use_transformations([index.parser])",
            )

    def remember(self) -> None:
        """Note how documents are split; it commits with the nodes."""
        names = [type(t).__name__ for t in self.transformations] if self.own else []
        wanted = json.dumps({"names": names, "identity": _identity(self.transformations) if self.own else None})
        kept = self._catalog.get_meta(_META)
        if kept != wanted and (self.own or kept is not None):
            self._catalog.set_meta(_META, wanted)


def _identity(transformations: Sequence[TransformComponent]) -> str:
    """What a document's nodes depend on, as LlamaIndex's pipelines tell transformations apart."""
    return tagged_digest(
        "compllm-rag/transformations",
        steps="\n".join(remove_unstable_values(str(t.to_dict())) for t in transformations),
    )


def _unseen(document: Document) -> str:
    """A digest of what LlamaIndex's hash of a document does not see, and its nodes or their embeddings depend on.

    The hash is of text and metadata as they are written out: 1871 and "1871" are the same to it, and it knows nothing
    of what is kept from embedder and LLM.
    """
    metadata = json.dumps(document.metadata, sort_keys=True, default=str)
    return tagged_digest("compllm-rag/document-unseen", metadata=metadata, layout=json.dumps(layout_of(document)))[:16]


def _attribute(nodes: Sequence[BaseNode], documents: Sequence[Document]) -> None:
    """Give every node its document as source: splitters of several levels name the node above.

    Raises:
        ConfigurationError: It cannot be told.
    """
    sources = {document.id_: document for document in documents}
    by_id = {node.node_id: node for node in nodes}
    for node in nodes:
        above, seen = node.ref_doc_id, set[str]()
        while above is not None and above not in sources and above in by_id and above not in seen:
            seen.add(above)
            above = by_id[above].ref_doc_id
        if above is None and len(documents) == 1:
            above = documents[0].id_
        if above not in sources:
            raise ConfigurationError(
                "a transformation made a node that names no document as its source",
                got=f"node {node.node_id!r:.80} of {node.ref_doc_id!r:.80}",
                expected="NodeRelationship.SOURCE with the id of a document that was given",
                next_step="keep the relationships of the nodes that come in",
            )
        if above != node.ref_doc_id:
            node.relationships[NodeRelationship.SOURCE] = sources[above].as_related_node_info()
