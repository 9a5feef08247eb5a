r"""Ingestion of a large corpus by many workers on a Ray cluster, or on this machine.

The driver reads the corpus and cuts it into parts; workers, each a process with the models of its own, chunk, embed and
compress them into shards; the driver merges the shards into the storage and commits once. What a run has done it leaves
in a staging folder: after a Ctrl-C or a kill the same command goes on there, and a worker that dies is started again.

    pip install 'compllm-rag[ray]'
    python pipelines/ingest_ray.py --data docs/ --storage storage --workers 4
    python pipelines/ingest_ray.py --parquet corpus/ --id-column id --storage storage --workers 8 --gpus-per-worker 1
    python pipelines/ingest_ray.py --data docs/ --storage storage --workers 64 --gpus-per-worker 1 --address auto \
        --staging /shared/staging
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

from llama_index.core.schema import Document

from compllm_rag.cli.progress import ProgressShow
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import CompLLMError, ConfigurationError, MissingExtraError, WorkersFailedError
from compllm_rag.llamaindex.documents import empty_corpus, load_documents, some
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.readers.found import SkippedFile
from compllm_rag.llamaindex.sharding.driver import PART_CHARS, PartsIngest, PartsReport, Receipt, job_of
from compllm_rag.llamaindex.sharding.encoder import PartEncoder
from compllm_rag.llamaindex.sharding.parquet import Columns, parquet_documents
from compllm_rag.llamaindex.sharding.staging import Staging

OBJECT_STORE_BYTES = 200 * 2**20  # keys of parts and a row for each pass through it, no text
_LONGEST_FOLDER = 40  # sockets lie below it, and their paths may take some 100 bytes
_MOST_BLOCKS = 4096


def arguments() -> argparse.Namespace:
    """What the job is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--data", nargs="+", type=Path, metavar="PATH", help="files or folders, as `ingest` reads them")
    corpus.add_argument("--parquet", nargs="+", type=Path, metavar="PATH", help="Parquet files, or folders with some")
    parser.add_argument("--text-column", default="text", help="of Parquet files: the texts (default: text)")
    parser.add_argument("--id-column", help="their ids (default: file and number of the row)")
    parser.add_argument("--title-column", help="their titles (default: none)")
    parser.add_argument("--storage", required=True, type=Path, help="folder of the storage; made when missing")
    parser.add_argument("--staging", type=Path, help="folder that all machines share (default: <storage>.staging)")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode (default: 1)")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="may be a part of one (default: 0)")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="threads of each (default: 1)")
    parser.add_argument("--address", help="of a Ray cluster that runs already; auto finds the one of this machine")
    parser.add_argument("--part-chars", type=int, default=PART_CHARS, help="characters of a part (default: 400000)")
    parser.add_argument("--llm", help=f"alias, folder or org/name@revision (default: {DEFAULT_LLM})")
    parser.add_argument("--embedder", help=f"the same for the embedder (default: {DEFAULT_EMBEDDER})")
    parser.add_argument("--codec", choices=("deep", "input"), help="where concepts enter the LLM (default: deep)")
    parser.add_argument("--rate", help="source tokens per concept, or auto (default: 1 for deep, 2 for input)")
    parser.add_argument("--chunk-size", type=int, help="tokens per chunk, about (default: 200)")
    parser.add_argument("--encoding", choices=("fp16", "int8", "int4"), help="how concepts are kept (default: fp16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    return checked(parser.parse_args())


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse numbers and options that make no sense.

    Raises:
        ConfigurationError: Naming the option.
    """
    for name, least in (("workers", 1), ("cpus_per_worker", 1), ("gpus_per_worker", 0), ("part_chars", 1)):
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{option} makes no sense", got=getattr(args, name), expected=f"at least {least}")
    if args.gpus_per_worker > 1 and args.gpus_per_worker % 1:
        raise ConfigurationError(
            "a worker takes a part of one GPU, or whole ones", got=f"--gpus-per-worker {args.gpus_per_worker}"
        )
    columns = [name for name in ("id_column", "title_column") if getattr(args, name) is not None]
    if args.data and (columns or args.text_column != "text"):
        raise ConfigurationError("columns are of Parquet files", got="--data", next_step="leave them out")
    return args


def say(line: str) -> None:
    """A line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def left_out(skipped: SkippedFile) -> None:
    """Tell what gives no document, unless nobody will miss it."""
    if skipped.problem:
        say(f"left out: {skipped.path}: {skipped.reason}")


def rows_of(args: argparse.Namespace) -> Iterator[Document]:
    """Documents of Parquet files, the first read already: what is wrong shows before anything is made.

    Raises:
        EmptyCorpusError: There are none.
    """
    documents = parquet_documents(args.parquet, Columns(args.text_column, args.id_column, args.title_column))
    first = next(documents, None)
    if first is None:
        raise empty_corpus()
    return chain([first], documents)


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[Any]:
    """Ray, joined or started for this run alone; nothing of it is left behind, and nothing is reported to anybody.

    Raises:
        MissingExtraError: It is not installed.
        ConfigurationError: There is no such cluster, or this machine lacks what workers need.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of helpers of its own; those of workers are handled
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # a busy machine starts them slowly
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(
            "ingestion by many workers needs Ray",
            got=f"no package {error.name}",
            expected="the extra `ray`",
            next_step="pip install 'compllm-rag[ray]'",
        ) from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    root = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST_FOLDER else "/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="ray-", dir=root, ignore_cleanup_errors=True) as scratch:
        try:
            if args.address is not None:
                ray.init(address=args.address, **quiet)
            else:
                ray.init(
                    num_cpus=args.workers * args.cpus_per_worker + 1,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=scratch,
                    **quiet,
                )
        except Exception as error:  # Ray raises bare ones here
            raise ConfigurationError(
                "Ray cannot be started" if args.address is None else "there is no such Ray cluster",
                got=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}",
                next_step="run it again; a machine under heavy load may be too slow for Ray to start"
                if args.address is None
                else "check --address, or leave it out to start workers on this machine",
            ) from error
        try:
            check_room(args, ray.cluster_resources())
            yield ray
        finally:
            ray.shutdown()


def check_room(args: argparse.Namespace, there: dict[str, float]) -> None:
    """Refuse workers that would wait for ever; a cluster that exists may still grow.

    Raises:
        ConfigurationError: This machine lacks GPUs.
    """
    lacks = [
        f"{need:g} {kind} (has {there.get(kind, 0):g})"
        for kind, need in (("CPU", args.workers * args.cpus_per_worker), ("GPU", args.workers * args.gpus_per_worker))
        if need > there.get(kind, 0)
    ]
    if lacks and args.address is None:
        raise ConfigurationError(
            "this machine has no room for so many workers",
            got=f"{args.workers} workers that need {' and '.join(lacks)}",
            next_step="ask for fewer, or for a smaller --gpus-per-worker",
        )
    if lacks:
        say(f"waiting for the cluster to grow: {args.workers} workers need {' and '.join(lacks)}")


def encoded(ray: Any, args: argparse.Namespace, staging: Staging, keys: list[str]) -> Iterator[Receipt]:
    """Have workers encode parts; yields what they tell of each.

    Ray starts a worker that died again, and gives its part to one that lives.

    Raises:
        WorkersFailedError: Workers cannot be started.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the driver tells how far it is
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = context.enable_auto_log_stats = False
    rows = ray.data.from_items([{"part": key} for key in keys], override_num_blocks=min(len(keys), _MOST_BLOCKS))
    done = rows.map_batches(
        PartEncoder,
        fn_constructor_args=[str(staging.folder)],
        batch_size=1,
        # No part waits at a worker that is busy while another has nothing to do.
        compute=ray.data.ActorPoolStrategy(size=args.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker or None,
    )
    try:
        yield from done.iter_rows()
    except ray.exceptions.RayError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise WorkersFailedError(
            "workers could not go on",
            got=f"{type(error).__name__}: {told[-1][:500] if told else 'no reason told'}",
            next_step="look at what went wrong, then run the same command again: finished parts are kept",
        ) from error


def run(args: argparse.Namespace) -> PartsReport:
    """Do the job."""
    within = args.data or args.parquet
    documents = some(load_documents(within, on_skip=left_out)) if args.data else rows_of(args)
    storage = args.storage.absolute()
    staging = Staging((args.staging or storage.with_name(f"{storage.name}.staging")).absolute())
    with (
        ProgressShow() as show,
        ConceptIndex.create(
            storage,
            llm=args.llm,
            embedder=args.embedder,
            codec=args.codec,
            rate=args.rate,
            chunk_size=args.chunk_size,
            encoding=args.encoding,
            dtype=args.dtype,
            device="cpu",  # it encodes nothing
            progress=show.fetching,
        ) as index,
        staging.driven(),
    ):
        job = job_of(
            index,
            llm=args.llm,
            embedder=args.embedder,
            dtype=args.dtype,
            device="cuda" if args.gpus_per_worker else "cpu",
            threads=args.cpus_per_worker,
        )
        ingest = PartsIngest(index, staging, part_chars=args.part_chars, tell=say)
        report = ingest.run(documents, lambda keys: workers(args, staging, keys), job, within=within)
        staging.remove()
    return report


def workers(args: argparse.Namespace, staging: Staging, keys: list[str]) -> Iterator[Receipt]:
    """Ray for as long as there is something to encode."""
    # Ray tells on standard output that a worker died; that is for the report alone.
    with redirect_stdout(sys.stderr), cluster(args) as ray:
        yield from encoded(ray, args, staging, keys)


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
