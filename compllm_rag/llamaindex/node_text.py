"""What of a node stands in a prompt beside its body: number, title, metadata, and templates of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import DEFAULT_METADATA_TMPL, DEFAULT_TEXT_NODE_TMPL, BaseNode, MetadataMode, NodeWithScore

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.shown import hidden_keys
from compllm_rag.prompt import PromptTemplate, Span, TextSpan


class CitedNode(NodeWithScore):
    """A node that a prompt calls `Source n:`, as LlamaIndex's prompts for citations do, in place of `[n]`.

    The number is that of the sources that are read, through all prompts of an answer: `source_nodes[n - 1]`.
    """


def text_of_node(node: BaseNode) -> str:
    """The text of a node without its metadata: what concepts are made of."""
    return node.get_content(metadata_mode=MetadataMode.NONE)


def shown_metadata(node: BaseNode) -> tuple[str, dict[str, Any]]:
    """Title of a node, and whatever other metadata the LLM may see."""
    shown = _shown(node)
    title = shown.pop("title", None) or shown.pop("file_name", "")
    return str(title), shown


def _shown(node: BaseNode) -> dict[str, Any]:
    hidden = hidden_keys(node)
    return {key: value for key, value in node.metadata.items() if key not in hidden}


def found_spans(template: PromptTemplate, number: int, found: NodeWithScore, body: Sequence[Span]) -> list[Span]:
    """Spans of a retrieved node in a prompt; see `node_spans`, and `CitedNode` for those that are cited."""
    return node_spans(template, number, found.node, body, cited=isinstance(found, CitedNode))


def node_spans(
    template: PromptTemplate, number: int, node: BaseNode, body: Sequence[Span], *, cited: bool = False
) -> list[Span]:
    """Spans of one node in a prompt.

    A node with LlamaIndex's own templates is laid out as everywhere in this package: `[number] title`, a line for each
    further piece of metadata, the body. One whose `text_template`, `metadata_template` or `metadata_separator` was set
    is laid out by them below its number, with the body in place of `{content}`.

    Args:
        template: Of the prompt.
        number: Counted from 1.
        node: The node.
        body: Its text, as tokens, concepts, or both in turn.
        cited: Name it `Source n:`, with title and metadata below.

    Raises:
        ConfigurationError: The node's `text_template` has not exactly one `{content}`.
    """
    if has_own_templates(node):
        before, after = _around(node)
    else:
        title, metadata = shown_metadata(node)
        if not cited:
            return template.passage(number, title, body, metadata)
        lines = [title] if title else []
        lines += [f"{key}: {value}" for key, value in metadata.items()]
        before, after = "".join(f"{line}\n" for line in lines), ""
    head = f"Source {number}:\n{before}" if cited else f"[{number}]\n{before}"
    return [TextSpan(tuple(template.plain(head))), *body, TextSpan(tuple(template.plain(f"{after}\n\n")))]


def has_own_templates(node: BaseNode) -> bool:
    """Whether a node says itself how it is to be shown."""
    return (
        _text_template(node) != DEFAULT_TEXT_NODE_TMPL
        or node.metadata_template != DEFAULT_METADATA_TMPL
        or node.metadata_separator != "\n"
    )


def _text_template(node: BaseNode) -> str:
    return str(getattr(node, "text_template", DEFAULT_TEXT_NODE_TMPL))


def _around(node: BaseNode) -> tuple[str, str]:
    """Text in front of and behind the body of a node with templates of its own."""
    template = _text_template(node)
    lines = [node.metadata_template.format(key=key, value=str(value)) for key, value in _shown(node).items()]
    metadata = node.metadata_separator.join(lines)
    if template == DEFAULT_TEXT_NODE_TMPL:
        return (f"{metadata}\n" if metadata else ""), ""
    pieces = template.split("{content}")
    if len(pieces) != 2:
        raise ConfigurationError(
            "text_template of a node has no single place for its text",
            got=f"{template!r} of node {node.node_id}",
            expected="{content} exactly once",
            next_step="add {content} to the text_template",
        )
    try:
        before, after = (piece.format(metadata_str=metadata) for piece in pieces)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigurationError(
            "text_template of a node has variables that nothing fills",
            got=f"{template!r} of node {node.node_id}",
            expected="{metadata_str} and {content}",
            next_step="correct the text_template",
        ) from error
    return before, after
