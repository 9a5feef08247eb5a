"""The offline ingestion job: a corpus in, a storage out, to run on a schedule and to copy from.

Run it again after a Ctrl-C, a kill or a crash: documents that are in the storage are skipped, concepts that were made
are found again, and nothing is there twice. Documents that changed since are replaced.

    python pipelines/ingest.py docs/ more.jsonl --storage storage --log ingest.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from compllm_rag.cli.progress import ProgressShow
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import CompLLMError
from compllm_rag.llamaindex.corpus import IngestReport
from compllm_rag.llamaindex.documents import load_documents, some
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.readers.found import SkippedFile


def arguments() -> argparse.Namespace:
    """What the job is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--storage", required=True, type=Path, help="folder of the storage; made when missing")
    parser.add_argument("--llm", help=f"alias, folder or org/name@revision (default: {DEFAULT_LLM})")
    parser.add_argument("--embedder", help=f"the same for the embedder (default: {DEFAULT_EMBEDDER})")
    parser.add_argument("--codec", choices=("deep", "input"), help="where concepts enter the LLM (default: deep)")
    parser.add_argument("--rate", help="source tokens per concept, or auto (default: 1 for deep, 2 for input)")
    parser.add_argument("--chunk-size", type=int, help="tokens per chunk, about (default: 200)")
    parser.add_argument("--encoding", choices=("fp16", "int8", "int4"), help="how concepts are kept (default: fp16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="a torch device (default: a GPU where there is one)")
    parser.add_argument("--log", type=Path, help="append one line of JSON after each batch")
    return parser.parse_args()


class Log:
    """Progress on the terminal, and as JSON lines where asked for."""

    def __init__(self, show: ProgressShow, path: Path | None) -> None:
        self.show, self.path = show, path

    def __call__(self, report: IngestReport) -> None:
        """Show and write one running report."""
        self.show.ingested(report)
        if self.path is not None:
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **report.fields()}
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")


def left_out(skipped: SkippedFile) -> None:
    """Tell on standard error what gives no document, unless nobody will miss it; the last line of the log has all."""
    if skipped.problem:
        print(f"left out: {skipped.path}: {skipped.reason}", file=sys.stderr)


def run(args: argparse.Namespace) -> IngestReport:
    """Do the job."""
    documents = some(load_documents(args.paths, on_skip=left_out))
    with (
        ProgressShow() as show,
        ConceptIndex.create(
            args.storage,
            llm=args.llm,
            embedder=args.embedder,
            codec=args.codec,
            rate=args.rate,
            chunk_size=args.chunk_size,
            encoding=args.encoding,
            dtype=args.dtype,
            device=args.device,
            progress=show.fetching,
        ) as index,
    ):
        return index.ingest(documents, progress=Log(show, args.log), within=args.paths)


def main() -> int:
    """Exit code 0, 2 for an error that says what to do, 130 for a Ctrl-C."""
    try:
        report = run(arguments())
    except CompLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(json.dumps(report.fields()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
