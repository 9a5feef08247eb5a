"""What the embedder reads of a node: its metadata, as long as they leave room for its text, and its text.

An embedder reads so many tokens and passes the rest over without a word. Metadata stand in front, so long ones (an
abstract, extracted keywords) would leave nothing of the text, and all chunks of a document the same vector. They are
cut to what the text leaves, but not below an eighth of what the embedder reads: a title stays, however long the chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_LEAST_SHARE = 8  # metadata up to this part of what is read are never cut


class EmbeddingTexts:
    """The texts that nodes are embedded by. Warns once, until `begin`, where metadata are cut.

    Args:
        embedder: One whose tokenizer and limit cannot be told is given everything.

    Attributes:
        discreet: Whether the warning names no document: the logs of a server are kept elsewhere than its documents.
    """

    def __init__(self, embedder: BaseEmbedding) -> None:
        self._limit, self._tokenizer = _reading(embedder)
        self._warned = self.discreet = False

    def begin(self) -> None:
        """Warn again: something else is brought in."""
        self._warned = False

    def of(self, nodes: Sequence[BaseNode]) -> list[str]:
        """The text of each node."""
        return [self._text(node) for node in nodes]

    def _text(self, node: BaseNode) -> str:
        whole = node.get_content(metadata_mode=MetadataMode.EMBED)
        tokenizer, least = self._tokenizer, self._limit // _LEAST_SHARE
        # No tokenizer makes more tokens than there are bytes.
        if tokenizer is None or len(whole.encode("utf-8", "replace")) <= self._limit:
            return whole
        metadata = node.get_metadata_str(MetadataMode.EMBED).strip()
        if len(metadata.encode("utf-8", "replace")) <= least or metadata not in whole:
            return whole
        ends = [end for _, end in tokenizer.encode(metadata, add_special_tokens=False).offsets]
        if len(ends) <= least:
            return whole
        left = self._limit - len(tokenizer.encode(whole.replace(metadata, "", 1), add_special_tokens=False).ids)
        room = max(left, least)
        if len(ends) <= room:
            return whole
        self._warn(node, len(ends), room)
        return whole.replace(metadata, metadata[: ends[room - 1]], 1)

    def _warn(self, node: BaseNode, length: int, room: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "metadata of %s are longer than what the embedder reads beside the text: %d tokens, of %d "
                "that it reads in all; they are embedded up to %d, the text whole. Keep long ones from the embedder by "
                "excluded_embed_metadata_keys. Other documents may be alike; this is said once",
                "a document" if self.discreet else f"document {node.ref_doc_id or node.node_id!r}",
                length,
                self._limit,
                room,
            )


def _reading(embedder: BaseEmbedding) -> tuple[int, Tokenizer | None]:
    """How many tokens a sentence-transformers embedder reads beside its own, and the tokenizer that counts them."""
    model: Any = getattr(embedder, "_model", None)
    limit = getattr(model, "max_seq_length", None)
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if not isinstance(limit, int) or backend is None:
        return 0, None
    # A copy: truncation is a setting of the tokenizer, and other threads embed by the model's own.
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    instruction = getattr(embedder, "text_instruction", None) or ""
    own = tokenizer.num_special_tokens_to_add(False) + len(tokenizer.encode(instruction, add_special_tokens=False).ids)
    return limit - own, tokenizer
