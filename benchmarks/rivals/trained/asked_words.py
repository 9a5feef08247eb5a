"""Which words of a passage are worth keeping, by what is asked about it: labels in place of a large LLM's.

LLMLingua-2 (arXiv 2403.12968, section 3) has GPT-4 shorten texts by dropping words, and labels the words that are left.
Here a word counts as worth keeping where it stands in any training question about its passage or in a gold answer to
one, function words aside. All questions of all rows about a passage count together, since one alone says little. The
paper matches words loosely, as its LLM changes their forms; here plurals are made alike (Harman 1991, S-stemmer).
"""

from __future__ import annotations

from collections.abc import Iterable

from compllm_rag.catalog.words import words
from compllm_rag.evaluation.questions import Question
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.training.material import Group, Material

# Of English, which all training rows are in; and what is left of words that an apostrophe cuts.
_ENGLISH = (
    "a an the this that these those there here it its he him his she her hers they them their theirs we us our ours i "
    "me my mine you your yours who whom whose what which when where why how s t d ll re ve m is are was were be been "
    "being am do does did done doing has have had having will would shall should can could may might must not no nor "
    "of in on at by for from to with without into onto upon about over under between among through during before after "
    "since until against as than and or but if because while so such then thus also too very just only own same other "
    "any some each both all more most many much few up down out off again"
)
_FUNCTION_WORDS = frozenset(_ENGLISH.split())


def keywords(text: str) -> set[str]:
    """The words of a text as they are compared, function words left out."""
    return {_singular(word) for word in words(text) if word not in _FUNCTION_WORDS}


def asked_about(material: Material) -> dict[tuple[int, ...], set[str]]:
    """Of each passage that a training question is asked about: the keywords of all of these and of their gold answers.

    Returns:
        By the token ids of the passage. Passages that stand beside others as distractors alone are not there: nobody
        said what they are good for.
    """
    found: dict[str, set[str]] = {}
    for group in material.groups:
        wanted = _wanted(group.questions)
        for text in _shown(group):
            found.setdefault(text, set()).update(wanted)
    # What `Material.body` gives, without cutting thousands of passages that may never be drawn.
    ids = encode_plain(material.segmenter.tokenizer, list(found))["input_ids"] if found else []
    return dict(zip(map(tuple, ids), found.values(), strict=True))


def labels(chunk_words: Iterable[str], wanted: set[str]) -> list[int]:
    """Of each word of a chunk: 1 where any part of it is wanted, else 0."""
    return [int(not wanted.isdisjoint(keywords(word))) for word in chunk_words]


def _wanted(questions: Iterable[Question]) -> set[str]:
    return {word for q in questions for text in (q.question, *q.answers) for word in keywords(text)}


def _shown(group: Group) -> list[str]:
    """The passages that a group's questions are about, as `Material.questions` has them."""
    return [p.text for p in group.passages if p.supporting] or [group.passages[0].text]


def _singular(word: str) -> str:
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word
