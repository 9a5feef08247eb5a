"""Prompts for LOFT: what is asked after retrieval, and the whole corpus in context.

After retrieval the prompt is the product's own, the one its readers are trained with; a set whose answers are lists
asks for all of them. With the corpus in context the layout is LOFT's (google-deepmind/loft, prompts/): a line
`ID: n | TITLE: t | CONTENT: text | END ID: n` for each document, examples which name the documents they rest on before
their final answer, then the query. The instructions are in words of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.loft_data import LoftSet, Query
from compllm_rag.prompt import PromptPlan, QAPrompt, Span, TextSpan

# Behind the question where all values of a list count.
ALL_OF_THEM = "Name all of them, separated by commas."
INSTRUCTION = (
    "A list of documents comes first, then a query. Read all of the documents, name those that the answer rests on by "
    "TITLE and ID, and end with a line of this form, with one entry for each answer:\nFinal Answer: ['answer', ...]"
)
# LOFT's few-shot files hold five.
MOST_EXAMPLES = 5


def examples(loft: LoftSet, asked: Iterable[Query]) -> str:
    """Answered examples as text, at most five; empty without any.

    Args:
        loft: Whose documents are numbered from 1 in the order of the file, as in the prompt.
        asked: Queries of the few-shot split.
    """
    numbers = {name: number for number, name in enumerate(loft.documents, 1)}
    told = []
    for count, query in enumerate(list(asked)[:MOST_EXAMPLES], 1):
        answers = list(query.answers if loft.multi_value else query.answers[:1])
        sources = [name for name in query.gold if name in numbers]
        lines = [f"TITLE: {loft.documents[name].title} | ID: {numbers[name]}" for name in sources]
        head = [f"== Example {count} ==", f"query: {query.question}"]
        told.append("\n".join([*head, *lines, f"Final Answer: {answers}"]))
    return "".join(f"{text}\n\n" for text in told)


class CorpusPrompt(QAPrompt):
    """The whole corpus, examples, and the query behind them.

    Args:
        tokenizer: The target LLM's.
        told: Answered examples, see `examples`.
    """

    def __init__(self, tokenizer: Any, told: str = "") -> None:
        super().__init__(tokenizer, INSTRUCTION)
        self._told = told

    def plan(self, question: str, passages: Sequence[tuple[str, Sequence[Span]]]) -> PromptPlan:
        """The prompt of one query over passages of (title, body)."""
        spans: list[Span] = self.prefix([])
        for number, (title, body) in enumerate(passages, 1):
            head = self.template.plain(f"ID: {number} | TITLE: {title or 'None'} | CONTENT: ")
            spans += [TextSpan(tuple(head)), *body, TextSpan(tuple(self.template.plain(f" | END ID: {number}\n")))]
        request = f"{self._told}== Now answer this ==\nquery: {question}"
        return PromptPlan((*spans, self.suffix(request)))
