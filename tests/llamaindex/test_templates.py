"""Templates of prompts and of nodes: their functions, partial values, and places that are missing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from llama_index.core import ChatPromptTemplate, PromptTemplate
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import RichPromptTemplate, SelectorPromptTemplate
from llama_index.core.prompts.chat_prompts import CHAT_REFINE_PROMPT, CHAT_TEXT_QA_PROMPT
from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT, DEFAULT_TEXT_QA_PROMPT
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE, CITATION_REFINE_TEMPLATE
from llama_index.core.schema import NodeWithScore, TextNode

import toy
from compllm_rag import Compressor, ConceptSynthesizer, MemoryStore
from compllm_rag.errors import ConfigurationError, PromptTooLongError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.planner import PlannedPrompt, Planner
from compllm_rag.prompt import TextSpan

QUESTION = "Who built it?"
TEXTS = ["The lighthouse was built by Ada Marsh.", "Her brother Tom took the boat."]


def nodes(**fields: Any) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=f"n{i}", text=text, metadata={"title": f"T{i}", "year": 1871}, **fields))
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture
def library(compressor: Compressor) -> ConceptLibrary:
    return ConceptLibrary(compressor, MemoryStore(compressor.hidden_size))


def shown(planned: PlannedPrompt) -> str:
    """The prompt as text, concepts as a note."""
    decode = toy.tokenizer().decode
    return "".join(
        decode(list(span.ids)) if isinstance(span, TextSpan) else f"<{span.passage}>" for span in planned.plan.spans
    )


def prompt(library: ConceptLibrary, template: Any, mode: str = "concepts", budget: int = 2000, **options: Any) -> str:
    return shown(Planner(library, template, mode=mode).plan(QUESTION, nodes(**options), budget))


def redacted(**values: Any) -> str:
    return re.sub(r"Ada \w+", "[name]", values["context_str"])


REDACTING = PromptTemplate("{context_str}\n{query_str}", function_mappings={"context_str": redacted})


def test_a_function_for_the_passages_sees_and_makes_what_is_read(library: ConceptLibrary) -> None:
    planned = Planner(library, REDACTING, mode="text").plan(QUESTION, nodes(), 2000)
    text = shown(planned)
    assert "by [name]." in text and "Ada" not in text
    assert "[1] T0\nyear: 1871\nThe lighthouse" in text and "[2] T1\nyear: 1871\nHer brother Tom" in text
    assert [fact.used for fact in planned.facts] == ["text", "text"]
    response = ConceptSynthesizer(library, text_qa_template=REDACTING, mode="text").synthesize(QUESTION, nodes())
    assert len(response.source_nodes) == 2
    shorter = PromptTemplate("{context_str} {query_str}", function_mappings={"context_str": lambda **v: "nothing"})
    assert "nothing Who" in prompt(library, shorter, "text")


def test_what_does_not_fit_behind_a_function_is_dropped(library: ConceptLibrary) -> None:
    budget = Planner(library, REDACTING, mode="text").plan(QUESTION, nodes(), 2000).plan.extent - 1
    planned = Planner(library, REDACTING, mode="text").plan(QUESTION, nodes(), budget)
    assert (len(planned.nodes), len(planned.dropped)) == (1, 1)
    assert planned.plan.extent <= budget
    assert "Tom" not in shown(planned)
    with pytest.raises(PromptTooLongError, match="none of the"):
        Planner(library, REDACTING, mode="text").plan(QUESTION, nodes(), 40)


@pytest.mark.parametrize(
    "template",
    [
        REDACTING,
        PromptTemplate("{ctx}\n{query_str}", template_var_mappings={"context_str": "ctx"},
                       function_mappings={"context_str": redacted}),
        PromptTemplate("{context_str}{n}{query_str}", function_mappings={"n": lambda **v: str(len(v["context_str"]))}),
        PromptTemplate("{context_str}{n}{query_str}", function_mappings={"n": lambda **v: v["context_str"].upper()}),
        PromptTemplate("{context_str}{n}{query_str}", function_mappings={"n": redacted}),
        PromptTemplate("{context_str}{n}{query_str}", function_mappings={"n": lambda **v: f"{v['context_str']}"}),
        ChatPromptTemplate([ChatMessage(role="user", content="{context_str} {query_str}")],
                           function_mappings={"context_str": redacted}),
        RichPromptTemplate("{{ context_str }} {{ query_str }}", function_mappings={"context_str": redacted}),
        RichPromptTemplate("{{ context_str | upper }} {{ query_str }}"),
        SelectorPromptTemplate(REDACTING),
    ],
)  # fmt: skip
def test_functions_cannot_see_concepts(library: ConceptLibrary, template: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a function for \w+ cannot see concepts"):
        prompt(library, template)
    assert "Who built it?" in prompt(library, template, "text")
    with pytest.raises(ConfigurationError, match="cannot see concepts"):
        ConceptSynthesizer(library, text_qa_template=template).synthesize(QUESTION, nodes())


def test_the_error_comes_when_the_engine_is_made(library: ConceptLibrary) -> None:
    with pytest.raises(ConfigurationError, match="context_str cannot see concepts"):
        ConceptSynthesizer(library, text_qa_template=REDACTING)
    with pytest.raises(ConfigurationError, match="context_str cannot see concepts"):
        ConceptSynthesizer(library, text_qa_template=REDACTING, mode="text", choose=lambda node: "text")


@pytest.mark.parametrize("mode", ["concepts", "text"])
def test_functions_for_other_variables_work(library: ConceptLibrary, mode: str) -> None:
    template = PromptTemplate(
        "{style} {context_str} {query_str} {day}",
        function_mappings={
            "query_str": lambda **v: v["query_str"].upper(),
            "day": lambda **v: f"Day of {v['style']}",
        },
    ).partial_format(style="Briefly:")
    text = prompt(library, template, mode)
    assert "Briefly: [1] T0" in text and "WHO BUILT IT? Day of Briefly:" in text
    assert ("<0>" in text) == (mode == "concepts")


TEMPLATES = {
    "mapped": PromptTemplate("{c} {q}", template_var_mappings={"context_str": "c", "query_str": "q"}),
    "partial": PromptTemplate("{tone} {context_str} {query_str}").partial_format(tone="Kindly"),
    "rich": RichPromptTemplate("{{ context_str }} {{ query_str }}"),
    "rich chat": RichPromptTemplate(
        "{% chat role='system' %}Short.{% endchat %}"
        "{% chat role='user' %}{{ context_str }} {{ query_str }}{% endchat %}"
    ),
    "chat": ChatPromptTemplate.from_messages([("system", "Short."), ("user", "{context_str} {query_str}")]),
    "selector": SelectorPromptTemplate(PromptTemplate("{context_str} {query_str}")),
    "stock": DEFAULT_TEXT_QA_PROMPT,
    "stock chat": CHAT_TEXT_QA_PROMPT,
    "citation": CITATION_QA_TEMPLATE,
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["concepts", "text"])
def test_all_kinds_of_templates_work(library: ConceptLibrary, name: str, mode: str) -> None:
    text = prompt(library, TEMPLATES[name], mode)
    assert QUESTION in text and "[2] T1\nyear: 1871\n" in text
    assert ("<0>" if mode == "concepts" else TEXTS[0]) in text


@pytest.mark.parametrize("template", [DEFAULT_REFINE_PROMPT, CHAT_REFINE_PROMPT, CITATION_REFINE_TEMPLATE])
def test_stock_templates_refine(library: ConceptLibrary, template: Any) -> None:
    planner = Planner(library, refine_template=template)
    text = shown(planner.plan(QUESTION, nodes(), 2000, existing="It was Tom."))
    assert "It was Tom." in text and "<1>" in text and QUESTION in text


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (PromptTemplate("{context_str} {query_str} {tone}"), r"\{tone\}"),
        (PromptTemplate("{contxt_str} {query_str}"), r"\{contxt_str\}"),
        (PromptTemplate("{context_str}"), r"query_str"),
        (PromptTemplate("{query_str}"), r"context_str"),
        (PromptTemplate("{context_str} {query_str}").partial_format(tone="Kindly"), "tone"),
        (PromptTemplate("{context_str} {query_str}", function_mappings={"day": lambda **v: "x"}), "day"),
        (PromptTemplate("{c} {query_str}", template_var_mappings={"context": "c"}), r"\{c\}"),
        (RichPromptTemplate("{{ context_str }} {{ query_str }} {{ tone }}"), r"\{tone\}"),
        (PromptTemplate("{context_str} {context_str} {query_str}"), "2 slots"),
    ],
)
def test_variables_without_use_or_value_are_named(library: ConceptLibrary, template: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        prompt(library, template)


def test_images_in_a_template_are_refused(library: ConceptLibrary) -> None:
    template = RichPromptTemplate("{{ context_str }} {{ query_str }} {{ 'http://x/y.png' | image }}")
    with pytest.raises(ConfigurationError, match="ImageBlock"):
        prompt(library, template)


@pytest.mark.parametrize("mode", ["concepts", "text"])
def test_templates_of_nodes_are_followed(library: ConceptLibrary, mode: str) -> None:
    planner = Planner(library, mode=mode)

    def text_of(**fields: Any) -> str:
        text = shown(planner.plan(QUESTION, nodes(**fields)[:1], 2000)).replace(TEXTS[0], "<0>")
        return text[text.index("[1]") : text.index("Question:")]

    assert text_of() == "[1] T0\nyear: 1871\n<0>\n\n"
    assert text_of(metadata_template="<{key}={value}>") == "[1]\n<title=T0>\n<year=1871>\n<0>\n\n"
    assert text_of(metadata_separator=" | ") == "[1]\ntitle: T0 | year: 1871\n<0>\n\n"
    assert text_of(text_template="{metadata_str} >> {content} <<") == "[1]\ntitle: T0\nyear: 1871 >> <0> <<\n\n"
    assert (
        text_of(text_template="Fact: {content} (end)", excluded_llm_metadata_keys=["title", "year"])
        == "[1]\nFact: <0> (end)\n\n"
    )
    for broken in ("{metadata_str}", "{content} {content}", "{content} {other}"):
        with pytest.raises(ConfigurationError, match="text_template"):
            text_of(text_template=broken)


def test_the_turns_keep_their_roles(library: ConceptLibrary) -> None:
    template = ChatPromptTemplate(
        [
            ChatMessage(role=MessageRole.SYSTEM, content="Be exact."),
            ChatMessage(role=MessageRole.USER, content="{context_str}{query_str}"),
            ChatMessage(role=MessageRole.ASSISTANT, content="The answer is"),
        ]
    )
    assert "<|start|>system\nBe exact.<|end|>" in prompt(library, template)
    assert "<|start|>assistant\nThe answer is<|end|>" in prompt(library, template)
