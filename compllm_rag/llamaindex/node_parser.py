"""A node parser whose chunks are runs of whole segments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, TextNode
from llama_index.core.utils import get_tqdm_iterable

from compllm_rag.compression.segmentation import Segmenter, chunk_texts
from compllm_rag.errors import ConfigurationError, FingerprintMismatchError
from compllm_rag.fingerprint import tagged_digest
from compllm_rag.models.llm import IN_MEMORY
from compllm_rag.models.tokenizer import load_tokenizer, vocabulary_digest

_FIELDS = "excluded_embed_metadata_keys excluded_llm_metadata_keys text_template metadata_template metadata_separator"
# What LlamaIndex has where nobody says otherwise.
_LAYOUT = {name: TextNode.model_fields[name].get_default(call_default_factory=True) for name in _FIELDS.split()}


class ConceptNodeParser(NodeParser):
    """Cuts documents into chunks at content-defined boundaries between segments (docs/design.md section 4).

    The chunks of a document joined are its text, to the letter. A node's id depends on the document's id, the chunk's
    text and metadata alone, so chunks that an edit did not touch keep theirs.

    `from_dict` loads the tokenizer of the LLM that the dictionary names, and nothing else of it.

    Args:
        segmenter: Of the compressor the chunks are for.
        chunk_size: Tokens of the target LLM per chunk, about.
        llm: How the LLM is named whose tokenizer it is (alias, folder or `org/name@revision`); for `to_dict`.
    """

    chunk_size: int = Field(default=200, ge=20, description="target tokens of a chunk, about")
    segment_length: int = Field(default=20, description="most tokens of a segment")
    llm: str | None = Field(default=None, description="the LLM whose tokenizer cuts")
    rules: dict[str, int] = Field(default_factory=dict, description="what the segmenter is made with")
    _segmenter: Segmenter = PrivateAttr()

    def __init__(self, segmenter: Segmenter, chunk_size: int = 200, *, llm: str | None = None, **kwargs: Any) -> None:
        # Links between neighbours would change with every edit nearby, and with them nodes that did not.
        kwargs.setdefault("include_prev_next_rel", False)
        kwargs |= {"chunk_size": chunk_size, "segment_length": segmenter.segment_length}
        kwargs |= {"llm": None if llm == IN_MEMORY else llm, "rules": _rules_of(segmenter)}
        super().__init__(**kwargs)
        self._segmenter = segmenter

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ConceptNodeParser"

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_digest(self._segmenter.tokenizer)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Settings, and the LLM whose tokenizer cuts, by its name."""
        return {**super().to_dict(**kwargs), "vocabulary": self._vocabulary}

    @classmethod
    def from_dict(cls, data: dict[str, Any], segmenter: Segmenter | None = None, **kwargs: Any) -> Self:
        """What `to_dict` described.

        Args:
            data: The description.
            segmenter: Cuts; None loads the tokenizer that `data` names.
            **kwargs: Fields to change.

        Raises:
            ConfigurationError: No LLM is named: it was an object in memory.
            FingerprintMismatchError: The tokenizer, or the rules of `segmenter`, are not those of then.
            UnknownModelError, ModelFetchError, UnsupportedModelError: See `load_tokenizer`.
        """
        fields = {name: value for name, value in (data | kwargs).items() if name not in ("class_name", "id_func")}
        vocabulary, rules = fields.pop("vocabulary", ""), fields.pop("rules", {})
        if segmenter is None and not (fields.get("llm") and rules):
            raise ConfigurationError(
                "this dictionary names no LLM whose tokenizer could be loaded",
                got="a parser whose LLM was given as an object",
                expected="the parser of a ConceptIndex over a named LLM",
                next_step="pass segmenter= to from_dict",
            )
        segmenter = segmenter or Segmenter(load_tokenizer(fields["llm"]), **rules)
        made = cls(segmenter, **fields)
        if (made._vocabulary, made.rules) != (vocabulary, rules):
            raise FingerprintMismatchError(
                "another tokenizer, or other rules, than this parser was made with",
                got=f"{made.llm or 'the given one'} with {made.rules}",
                expected=f"the tokens of then, with {rules}",
                next_step="make the parser anew; chunks of the former one are told apart by their ids",
            )
        return made

    def _parse_nodes(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        out: list[BaseNode] = []
        for node in get_tqdm_iterable(nodes, show_progress, "Parsing nodes"):
            seen: Counter[str] = Counter()
            tokenized = self._segmenter.tokenize(node.get_content(metadata_mode=MetadataMode.NONE))
            for text, start, end in chunk_texts(tokenized, self.chunk_size):
                seen[text] += 1
                out.append(_chunk_node(node, text, start, end, seen[text]))
        return out


def _rules_of(segmenter: Segmenter) -> dict[str, int]:
    """What a segmenter is made with, beside its tokenizer."""
    return {name: value for name, value in vars(segmenter).items() if isinstance(value, int)}


def layout_of(node: BaseNode) -> dict[str, Any]:
    """How a node's text and metadata are laid out for embedder and LLM; what is LlamaIndex's default is left out."""
    return {name: mine for name, usual in _LAYOUT.items() if (mine := getattr(node, name, None)) not in (None, usual)}


def _chunk_node(source: BaseNode, text: str, start: int, end: int, occurrence: int) -> TextNode:
    metadata = json.dumps(source.metadata, sort_keys=True, default=str)
    return TextNode(
        id_=tagged_digest("compllm-rag/node", doc=source.node_id, text=text, occurrence=occurrence, metadata=metadata)[
            :32
        ],
        **layout_of(source),
        text=text,
        start_char_idx=start,
        end_char_idx=end,
        metadata=dict(source.metadata),
        relationships={NodeRelationship.SOURCE: source.as_related_node_info()},
    )
