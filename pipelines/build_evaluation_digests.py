"""Make `compllm_rag/data/evaluation-digests.bin.gz` from evaluation sets: what training must not see.

python pipelines/build_evaluation_digests.py data/eval/*.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from compllm_rag.evaluation.questions import read_questions
from compllm_rag.training.evaluation_guard import question_digest

TARGET = Path(__file__).parents[1] / "compllm_rag" / "data" / "evaluation-digests.bin.gz"


def main() -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="+", type=Path, help="evaluation sets, see compllm_rag.evaluation.questions.read_questions"
    )
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    digests = {
        question_digest(question.question, question.answers[0])
        for path in args.files
        for question in read_questions(path).questions
    }
    args.out.write_bytes(gzip.compress(b"".join(sorted(digests)), mtime=0))
    print(f"{len(digests)} questions of {len(args.files)} files, {args.out.stat().st_size} bytes: {args.out}")


if __name__ == "__main__":
    main()
