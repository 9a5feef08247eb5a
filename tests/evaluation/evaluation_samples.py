"""Questions over toy.TEXT for toy models."""

from __future__ import annotations

import toy
from compllm_rag.evaluation.questions import Question, SourcePassage

PARTS = [part.strip() for part in toy.TEXT.split("\n\n")]


def questions() -> list[Question]:
    """Nine questions: one passage or several, two with options, answers of different lengths."""
    asked = [
        (0, "Who built the lighthouse?", ("Ada Marsh", "Marsh")),
        (0, "How tall is it?", ("42 metres",)),
        (0, "What did the keepers bring in winter?", ("oil, flour and letters",)),
        (1, "When did she die?", ("March 1871",)),
        (1, "Who took the boat out?", ("her brother Tom",)),
        (2, "What do gulls do?", ("Gulls nest in the lamp room",)),
        (2, "What does the museum keep?", ("the lens",)),
    ]
    made = [
        Question(f"q{i}", (SourcePassage(f"Part {part}", PARTS[part]),), question, answers)
        for i, (part, question, answers) in enumerate(asked)
    ]
    several = tuple(SourcePassage(f"Part {i}", text, supporting=i == 1) for i, text in enumerate(PARTS))
    made.append(Question("q7", several, "Is the tower empty?", ("yes",), ("yes", "no", "nobody can say"), 0))
    made.append(Question("q8", made[0].passages, "Did Marsh build it?", ("no",), ("yes, she did", "no"), 1))
    return made
