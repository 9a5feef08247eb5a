"""Documents and nodes that can be kept, checked and cleaned at every way in, before anything else reads them.

So that catalog, embedder and LLM see the same text: half characters are replaced (see `unicode_text`), metadata becomes
plain values (see `metadata`). An id must stay what it is, so one with half a character is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from llama_index.core.schema import BaseNode, Document, MetadataMode, RelatedNodeInfo, RelatedNodeType

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.metadata import plain_metadata
from compllm_rag.unicode_text import is_whole, whole

N = TypeVar("N", bound=BaseNode)


def sound_documents(documents: Iterable[Document] | Document) -> Iterator[Document]:
    """Documents that can be kept, one by one.

    Args:
        documents: Documents, or a single one.

    Raises:
        ConfigurationError: Something else is among them, or see `sound_node`.
    """
    given: Any = documents  # whatever a caller has: letters of a text, and fields of a node, would be iterated over
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise _no_document(given)
    for document in [given] if isinstance(given, BaseNode) else given:
        if not isinstance(document, Document):
            raise _no_document(document)
        yield sound_node(document)


def sound_nodes(nodes: Iterable[BaseNode] | BaseNode) -> list[BaseNode]:
    """Nodes that can be kept.

    Args:
        nodes: Nodes, or a single one.

    Raises:
        ConfigurationError: Something else is among them, or see `sound_node`.
    """
    given: Any = nodes
    out = []
    for node in [given] if isinstance(given, BaseNode) else given:
        if not isinstance(node, BaseNode):
            raise ConfigurationError(
                "this is no node",
                got=f"a {type(node).__name__}",
                expected="LlamaIndex nodes",
                next_step="make a TextNode of it",
            )
        out.append(sound_node(node))
    return out


def sound_node(node: N) -> N:
    """A node or document that can be kept: the very one, or a copy of it with the changes it needs.

    Raises:
        ConfigurationError: Its id is no text or holds half a character, it is a document and has none, or its metadata
            cannot be kept.
    """
    kind = "document" if isinstance(node, Document) else "node"
    owner = f"{kind} {node.node_id!a:.80}"
    if not isinstance(node.node_id, str) or not is_whole(node.node_id):
        raise ConfigurationError(
            f"the id of a {kind} holds half a character",
            got=ascii(node.node_id)[:80],
            expected="an id in Unicode",
            next_step="give it another id",
        )
    if not node.node_id and isinstance(node, Document):
        # Its nodes would be kept under their own ids, and nothing that is done to the document would find them.
        raise ConfigurationError("the id of a document is empty", got="''", next_step="give it one")
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    cleaned, metadata = whole(text), plain_metadata(node.metadata, owner)
    relations = {kind: _sound_relation(other, owner) for kind, other in node.relationships.items()}
    same_relations = all(relations[kind] is node.relationships[kind] for kind in relations)
    if cleaned is text and metadata is node.metadata and same_relations:
        return node
    made = node.model_copy(update={"metadata": metadata, "relationships": relations})
    if cleaned is not text:
        made.set_content(cleaned)
    return made


def _sound_relation(related: RelatedNodeType, owner: str) -> RelatedNodeType:
    if isinstance(related, list):
        made = [_sound_info(info, owner) for info in related]
        return related if all(a is b for a, b in zip(made, related, strict=True)) else made
    return _sound_info(related, owner)


def _sound_info(info: RelatedNodeInfo, owner: str) -> RelatedNodeInfo:
    if not is_whole(info.node_id):
        raise ConfigurationError(
            f"{owner} names a node whose id holds half a character",
            got=ascii(info.node_id)[:80],
            expected="an id in Unicode",
            next_step="give that one another id",
        )
    metadata = plain_metadata(info.metadata, f"a relation of {owner}")
    return info if metadata is info.metadata else info.model_copy(update={"metadata": metadata})


def _no_document(given: object) -> ConfigurationError:
    node = isinstance(given, BaseNode)
    return ConfigurationError(
        "this is no document",
        got=f"a {type(given).__name__}",
        expected="LlamaIndex documents",
        next_step="insert nodes with `insert_nodes`" if node else "make one: Document(text=..., id_=...)",
    )
