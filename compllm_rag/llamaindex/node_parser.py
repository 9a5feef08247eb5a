"""A node parser whose chunks are runs of whole segments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, TextNode
from llama_index.core.utils import get_tqdm_iterable

from compllm_rag.compression.segmentation import Segmenter, TokenizedText, chunk_bounds
from compllm_rag.fingerprint import tagged_digest


class ConceptNodeParser(NodeParser):
    """Cuts documents into chunks at content-defined boundaries between segments (docs/design.md section 4).

    The chunks of a document joined are its text, to the letter. A node's id depends on the document's id, the chunk's
    text and metadata alone, so chunks that an edit did not touch keep theirs.

    Args:
        segmenter: Of the compressor the chunks are for.
        chunk_size: Tokens of the target LLM per chunk, about.
    """

    chunk_size: int = Field(default=200, ge=20, description="target tokens of a chunk, about")
    segment_length: int = Field(default=20, description="most tokens of a segment")
    _segmenter: Segmenter = PrivateAttr()

    def __init__(self, segmenter: Segmenter, chunk_size: int = 200, **kwargs: Any) -> None:
        # Links between neighbours would change with every edit nearby, and with them nodes that did not.
        kwargs.setdefault("include_prev_next_rel", False)
        kwargs |= {"chunk_size": chunk_size, "segment_length": segmenter.segment_length}
        super().__init__(**kwargs)
        self._segmenter = segmenter

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ConceptNodeParser"

    def _parse_nodes(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        out: list[BaseNode] = []
        for node in get_tqdm_iterable(nodes, show_progress, "Parsing nodes"):
            seen: Counter[str] = Counter()
            tokenized = self._segmenter.tokenize(node.get_content(metadata_mode=MetadataMode.NONE))
            for text, start, end in chunk_texts(tokenized, self.chunk_size):
                seen[text] += 1
                out.append(_chunk_node(node, text, start, end, seen[text]))
        return out


def chunk_texts(tokenized: TokenizedText, chunk_size: int) -> Iterator[tuple[str, int, int]]:
    """Text, first character and character after the last of each chunk; chunks of white space alone are kept."""
    cuts = [0]
    for _, last in chunk_bounds(tokenized, chunk_size)[:-1]:
        # The end of the last token, not the start of the next: some tokenizers leave blanks out of the offsets.
        cuts.append(max(cuts[-1], tokenized.offsets[tokenized.segments[last - 1].end - 1][1]))
    cuts.append(len(tokenized.text))
    for start, end in pairwise(cuts):
        if end > start:
            yield tokenized.text[start:end], start, end


def _chunk_node(source: BaseNode, text: str, start: int, end: int, occurrence: int) -> TextNode:
    metadata = json.dumps(source.metadata, sort_keys=True, default=str)
    return TextNode(
        id_=tagged_digest("compllm-rag/node", doc=source.node_id, text=text, occurrence=occurrence, metadata=metadata)[
            :32
        ],
        text=text,
        start_char_idx=start,
        end_char_idx=end,
        metadata=dict(source.metadata),
        excluded_embed_metadata_keys=source.excluded_embed_metadata_keys,
        excluded_llm_metadata_keys=source.excluded_llm_metadata_keys,
        relationships={NodeRelationship.SOURCE: source.as_related_node_info()},
    )
