"""LlamaIndex nodes as rows of a catalog, and back."""

from __future__ import annotations

import json

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    TextNode,
)

from compllm_rag.catalog.rows import NodeRow, StoredNode, make_row
from compllm_rag.errors import ConfigurationError

_KINDS: dict[str, type[BaseNode]] = {
    kind.__name__: kind for kind in (TextNode, Node, IndexNode, ImageNode, Document, ImageDocument)
}
_RESOURCES = ("text_resource", "image_resource", "audio_resource", "video_resource")  # of `Node`; data is base64


def encode_node(node: BaseNode) -> NodeRow:
    """Make the row of a node. A class of somebody's own is kept as the LlamaIndex class it derives from.

    Raises:
        ConfigurationError: Its metadata is not JSON, or a text in it is not valid Unicode.
    """
    kind = next((cls.__name__ for cls in type(node).__mro__ if cls.__name__ in _KINDS), "")
    if not kind:
        raise ConfigurationError("this kind of node cannot be kept", got=type(node).__name__, expected=sorted(_KINDS))
    try:
        fields = node.model_dump(mode="json", exclude={"embedding"})
        if isinstance(node, TextNode):
            del fields["text"]
        for name in _RESOURCES:
            resource = getattr(node, name, None)
            if resource is not None and resource.data is not None:  # LlamaIndex leaves it out of what it writes
                fields[name]["data"] = resource.data.decode("ascii")
        body = json.dumps({"kind": kind, "fields": fields}, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # pydantic's own derive from ValueError
        raise ConfigurationError(
            f"node {node.node_id!r:.80} cannot be kept as JSON",
            got=str(error)[:200],
            expected="texts, numbers, lists and dicts in its metadata",
            next_step="drop what is no plain value from the metadata; vectors do not belong there",
        ) from error
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    return make_row(node.node_id, node.ref_doc_id or node.node_id, text, body)


def decode_node(row: StoredNode) -> BaseNode:
    """The node of a row, complete but for its embedding."""
    kind = _KINDS[row.kind]
    extra = {"text": row.text} if issubclass(kind, TextNode) else {}
    return kind.from_dict({**row.fields, **extra})
