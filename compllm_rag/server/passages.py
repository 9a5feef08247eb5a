"""One passage as its tokens, and which of them its concepts stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.schema import MetadataMode

from compllm_rag.server.document_schemas import Kept, KeptToken
from compllm_rag.server.failures import Refusal

if TYPE_CHECKING:
    from compllm_rag.compression.segmentation import TokenizedText
    from compllm_rag.llamaindex.index import ConceptIndex


def kept(index: ConceptIndex, node_id: str) -> Kept:
    """What was kept of a passage. Blocks: call it in a thread.

    Of deep concepts the places are read from the store; concepts at the input embeddings start from tokens that the
    compressor names again.

    Raises:
        Refusal: There is no such passage.
        CorruptRecordError: Its concepts are damaged.
    """
    found = index.faiss.get_nodes([node_id])
    if not found:
        raise Refusal(404, "no_such_node", "there is no such passage, or its document has changed since")
    node, library = found[0], index.library
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    passage, config = library.passage(text), library.spec.config
    stored = all(library.store.contains(passage.keys))
    places: set[int] = set()
    if stored and passage.keys and config.deep:
        fetched = library.fetch(text, missing="text").places
        places = set() if fetched is None else set(fetched.tolist())
    elif stored and passage.keys:
        start = 0
        for segment, own in zip(
            passage.segments, library.compressor.kept_places(passage.segments, passage.n_concepts), strict=True
        ):
            places.update(start + place for place in own)
            start += len(segment)
    n_tokens, n_concepts = len(passage.ids), sum(passage.n_concepts)
    rate = n_tokens / n_concepts if n_concepts else 1.0
    return Kept(
        node_id=node_id,
        document_id=node.ref_doc_id or node_id,
        title=str(node.metadata.get("title") or ""),
        kind="deep" if config.deep else "input",
        state="ready" if stored else "waiting",
        rate=rate,
        entry_layer=config.entry_layer,
        prefill_cost=library.spec.prefill_cost(rate) if n_concepts else 1.0,
        n_tokens=n_tokens,
        n_concepts=n_concepts,
        tokens=_tokens(library.spec.segmenter.tokenize(text), places),
    )


def _tokens(tokenized: TokenizedText, places: set[int]) -> list[KeptToken]:
    """Pieces of the text, one a token; what lies between two tokens belongs to the later one."""
    pieces: list[KeptToken] = []
    reached = 0
    for number, (_, end) in enumerate(tokenized.offsets):
        until = max(reached, end)
        pieces.append(KeptToken(text=tokenized.text[reached:until], kept=number in places))
        reached = until
    if reached < len(tokenized.text) and pieces:
        pieces[-1].text += tokenized.text[reached:]
    return pieces
