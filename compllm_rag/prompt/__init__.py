"""The one place where prompts are composed: spans of passages and messages, plans, and their layout as embeddings.

A plan is an ordered list of text spans and concept spans. Text mode and concept mode use the identical plan but for
the passages' bodies, so that a comparison compares nothing else; answering, evaluation and training use the same
markers, messages and layout. Only the chat template's own text may become special tokens; whatever a user, a document
or a template author wrote is encoded as plain text.
"""

from __future__ import annotations

from compllm_rag.prompt.layout import PromptInputs, embed_spans, lay_out
from compllm_rag.prompt.plan import (
    QUESTION,
    SLOT,
    SYSTEM,
    ConceptSpan,
    Message,
    Part,
    PromptPlan,
    Slot,
    Span,
    TextSpan,
    qa_messages,
)
from compllm_rag.prompt.template import PromptTemplate, QAPrompt

__all__ = [
    "QUESTION",
    "SLOT",
    "SYSTEM",
    "ConceptSpan",
    "Message",
    "Part",
    "PromptInputs",
    "PromptPlan",
    "PromptTemplate",
    "QAPrompt",
    "Slot",
    "Span",
    "TextSpan",
    "embed_spans",
    "lay_out",
    "qa_messages",
]
