"""Keeps questions of published evaluation sets out of training, whatever the file is called.

The package ships five bytes of a hash for each question (with its first answer) of the sets that docs/quality.md is
measured on; `pipelines/build_evaluation_digests.py` made them. Nothing of the sets can be read from that.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from compllm_rag.errors import EvaluationDataError
from compllm_rag.evaluation.questions import Question

DIGEST_BYTES = 5
_FILE = "evaluation-digests.bin.gz"
_NAME = re.compile(r"(^|[^a-z])(eval|evaluation|dev|val|valid|validation|test)([^a-z]|$)", re.IGNORECASE)
_FOLDERS = {"eval", "evaluation", "dev", "valid", "validation", "test"}
# A few questions may be asked in the training part and in the evaluation part of a set alike; more is a copied file.
_COPIED = 0.02


def refuse_evaluation(path: Path) -> None:
    """Raise if a file's name, or its folder's, says that it is kept for evaluation.

    Raises:
        EvaluationDataError: It does.
    """
    if _NAME.search(path.name) or path.resolve().parent.name.lower() in _FOLDERS:
        raise EvaluationDataError(
            "training on evaluation data is refused",
            got=str(path),
            expected="files of the training parts only",
            next_step="name other files; rename the file if it truly is training data",
        )


def without_evaluation(questions: Iterable[Question], path: Path) -> tuple[list[Question], list[str]]:
    """Questions that are in no published evaluation set, and the ids of those that are.

    Raises:
        EvaluationDataError: So many are that the file must be a copy of one.
    """
    known = _known()
    kept: list[Question] = []
    found: list[str] = []
    for question in questions:
        if question_digest(question.question, question.answers[0]) in known:
            found.append(question.id)
        else:
            kept.append(question)
    if len(found) > _COPIED * (len(found) + len(kept)):
        raise EvaluationDataError(
            "training on evaluation data is refused",
            got=f"{path}: {len(found)} of {len(found) + len(kept)} questions are in a published evaluation set",
            expected=f"at most {_COPIED:.0%} of them",
            next_step="name other files",
        )
    return kept, found


def question_digest(question: str, answer: str) -> bytes:
    """What a question and its first answer are known by: case and white space do not count."""
    text = "\n".join(" ".join(part.lower().split()) for part in (question, answer))
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


@functools.cache
def _known() -> frozenset[bytes]:
    data = gzip.decompress((Path(str(resources.files("compllm_rag"))) / "data" / _FILE).read_bytes())
    return frozenset(data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES))
