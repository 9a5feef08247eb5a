"""What a stock `VectorStoreIndex` takes: heeded by the same name, or refused by name with the way that does work."""

from __future__ import annotations

import difflib
import errno
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core import StorageContext
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import TransformComponent
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.corpus import IngestReport, Progress
from compllm_rag.llamaindex.embedding import LoadedEmbedder
from compllm_rag.llamaindex.opening import create_index, load_index
from compllm_rag.models.llm import TargetLLM

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index_base import IndexBase

# Names of LlamaIndex that mean something else here, and what to do in their place.
_ELSEWHERE = {
    "storage_context": "name a folder: ConceptIndex.create(storage_dir) and ConceptIndex.load(storage_dir)",
    "nodes": "make the index first: ConceptIndex.create(storage_dir).insert_nodes(nodes)",
    "objects": "make the index first: ConceptIndex.create(storage_dir).insert_nodes(objects)",
    "index_struct": "open the storage: ConceptIndex.load(storage_dir)",
    "store_nodes_override": "leave it out: the vector store keeps every kind of node whole",
    "num_workers": "leave it out: compression is batched, and models would be loaded again in each process",
    "service_context": "pass llm= and embedder=",
    "persist_dir": "name it storage_dir",
    "vector_store": "make it by ConceptIndex.from_vector_store, or name a folder: ConceptIndex.create(storage_dir)",
}


@dataclass
class StockOptions:
    """Options of LlamaIndex's that are heeded under their own names.

    Attributes:
        transformations: What makes nodes of documents, in place of the `ConceptNodeParser`.
        insert_batch_size: Nodes that are embedded and written together.
        callback_manager: LlamaIndex's.
        use_async: Allowed; nothing changes, since embedding and compression run in batches as it is.
        show_progress: Show a bar where documents are brought in.
    """

    transformations: Sequence[TransformComponent] | None = None
    insert_batch_size: int = 2048
    callback_manager: CallbackManager | None = None
    use_async: bool = False
    show_progress: bool = False

    @property
    def longest_chunk(self) -> int | None:
        """Most tokens that a transformation says it makes a chunk of; None where none says so."""
        sizes = list[object]()
        for one in self.transformations or ():
            sizes += [getattr(one, "chunk_size", None), *(getattr(one, "chunk_sizes", None) or ())]
        return max((size for size in sizes if isinstance(size, int)), default=None)

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> StockOptions:
        """Take these out of other options; `embed_model` becomes `embedder`.

        Args:
            options: As given to `ConceptIndex.create` and the like; changed.

        Raises:
            ConfigurationError: One cannot be heeded.
        """
        if "embed_model" in options:
            if options.get("embedder") is not None:
                raise ConfigurationError(
                    "embedder and embed_model are the same thing", got="both", expected="one", next_step="leave one out"
                )
            options["embedder"] = options.pop("embed_model")
        made = cls(**{f.name: options.pop(f.name) for f in fields(cls) if f.name in options})
        embedder, llm = options.get("embedder"), options.get("llm")
        if not (embedder is None or isinstance(embedder, str | BaseEmbedding | LoadedEmbedder)):
            raise ConfigurationError(
                "this is no embedder", got=f"a {type(embedder).__name__}", expected="a LlamaIndex embedder, or a name"
            )
        if isinstance(llm, BaseLLM):
            raise ConfigurationError(
                "the LLM of an index is named, since concepts are made for it alone",
                got=f"llm=a {type(llm).__name__}",
                expected="an alias, a folder or org/name@revision",
                next_step="leave it out; another LLM answers from text, by LlamaIndex's get_response_synthesizer(llm=)",
            )
        if not isinstance(made.insert_batch_size, int) or made.insert_batch_size < 1:
            raise ConfigurationError(
                "insert_batch_size makes no sense", got=made.insert_batch_size, expected="at least 1"
            )
        if not isinstance(made.callback_manager, CallbackManager | None):
            raise ConfigurationError(
                "this is no callback manager",
                got=f"a {type(made.callback_manager).__name__}",
                expected="LlamaIndex's CallbackManager",
            )
        if made.transformations is not None:
            made.transformations = list(made.transformations)
            strange = [t for t in made.transformations if not isinstance(t, TransformComponent)]
            if strange or not made.transformations:
                raise ConfigurationError(
                    "these are no transformations",
                    got=f"a {type(strange[0]).__name__}" if strange else "an empty list",
                    expected="node parsers, extractors and the like (TransformComponent)",
                )
            if options.get("chunk_size") is not None:
                raise ConfigurationError(
                    "transformations say how long chunks are",
                    got="chunk_size as well",
                    expected="one of both",
                    next_step="leave chunk_size out, or set it on the splitter",
                )
        return made


def check_options(options: Iterable[str], *opened_by: Callable[..., Any]) -> None:
    """Refuse options that no function would take.

    Args:
        options: Their names.
        opened_by: The functions that they are for.

    Raises:
        ConfigurationError: Naming the first of them, and what may have been meant.
    """
    known = {*inspect.signature(TargetLLM.from_pretrained).parameters} - {"spec", "reader"}
    known |= {name for function in opened_by for name in inspect.signature(function).parameters}
    known -= {"folder", "expect", "complete", "model_options", "holds"}
    if unknown := sorted(set(options) - known):
        raise refused(*unknown, known=known | {field.name for field in fields(StockOptions)})


def refused(*names: str, known: Iterable[str] = ()) -> ConfigurationError:
    """The error for options that are not heeded.

    Args:
        *names: Of these options, at least one; the first is said more of.
        known: Those that are.
    """
    name = names[0]
    meant = difflib.get_close_matches(name, known, 1)
    otherwise = f"did you mean {meant[0]}? Else leave it out" if meant else "leave it out"
    return ConfigurationError(
        "a ConceptIndex has no such option",
        got=", ".join(names),
        expected=", ".join(sorted(known)) or None,
        next_step=_ELSEWHERE.get(name, otherwise),
    )


def creating(options: dict[str, Any]) -> StockOptions:
    """Check the options of `ConceptIndex.create`, and take out those of LlamaIndex's.

    Raises:
        ConfigurationError: One is not heeded.
    """
    made = StockOptions.taken_from(options)
    check_options(options, create_index)
    if (longest := made.longest_chunk) is not None:
        options["holds"] = longest
    return made


def loading(options: dict[str, Any]) -> StockOptions:
    """The same for `ConceptIndex.load`."""
    made = StockOptions.taken_from(options)
    check_options(options, load_index)
    return made


def check_folder(storage_dir: object) -> Path:
    """The folder of a storage, if it can be one; a `StorageContext` stands in its place in LlamaIndex.

    Raises:
        ConfigurationError: It can be none.
    """
    if isinstance(storage_dir, StorageContext):
        raise refused("storage_context")
    if isinstance(storage_dir, str | bytes | os.PathLike):
        with suppress(ValueError):  # half a character, NUL
            path = Path(os.fsdecode(storage_dir))
            if os.fspath(storage_dir) and not _too_long(path):
                return path
    raise ConfigurationError(
        "a storage lies in a folder", got=ascii(storage_dir)[:80], expected="its path", next_step="name a folder"
    )


def _too_long(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


@contextmanager
def bar(index: IndexBase, documents: Iterable[Any], progress: Progress | None, show: bool) -> Iterator[Progress | None]:
    """A progress bar on standard error for a block that brings documents in.

    Args:
        index: Where they go.
        documents: Counted, where they can be.
        progress: Called as well.
        show: Whether to show one.

    Yields:
        What to call with each report.
    """
    if not show:
        yield progress
        return
    total = len(documents) if isinstance(documents, Sized) else None
    with tqdm(total=total, desc="Ingesting", unit="doc") as shown:

        def report(made: IngestReport) -> None:
            shown.update(made.documents - shown.n)
            shown.set_postfix(chunks=made.chunks, compressed=made.segments_compressed)
            if progress:
                progress(made)

        yield report
