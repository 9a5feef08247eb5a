"""The namespaces of a storage, opened when they are first asked for; all of them share their models.

Shared are the LLM, its halves, the scheduler of its answers or the client of the vLLM server that makes them, the
compressor and the embedder: nothing in them remembers what it has read. Not shared is what does: each namespace has its
own KV caches of earlier prompts (at a vLLM server, by a secret salt), memo of concepts and store, so that no tenant can
tell from how long something takes what another has asked.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compllm_rag.catalog.database import connected
from compllm_rag.catalog.pending import count_pending
from compllm_rag.compression.rate_policies.asked import options_of
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import CompLLMError, StorageNotFoundError
from compllm_rag.generation.address import check_codec, codec_of
from compllm_rag.generation.base import Generator
from compllm_rag.generation.batch_measures import BatchMeasures
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.generation.vllm import VLLMGenerator
from compllm_rag.llamaindex.embedding import LoadedEmbedder
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.uploads import UploadQueue
from compllm_rag.models.halves import Halves
from compllm_rag.server.failures import Refusal, log_fault
from compllm_rag.server.reading import ReadDefaults
from compllm_rag.server.settings import ServerSettings
from compllm_rag.storage.adapter_files import READER
from compllm_rag.storage.manifest import CATALOG, Manifest, has_manifest, read_manifest
from compllm_rag.storage.namespaces import list_namespaces, namespace_folder

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor

_MOST_NAMESPACES = 1000
# KV caches of earlier prompts that each namespace keeps, and how many namespaces: those opened later keep none.
_CACHED_PROMPTS, _CACHED_BYTES, _CACHING = 4, 256 << 20, 8


class _Models(NamedTuple):
    """What storages of one kind share, and the first that was opened of them."""

    first: ConceptIndex
    compressor: ConceptCompressor | DeferredCompressor
    embedder: BaseEmbedding | LoadedEmbedder
    halves: Halves | None
    scheduler: Scheduler | None


class Registry:
    """Opens namespaces, and closes them in the end.

    Args:
        storage: The storage folder.
        settings: Limits.
        read_only: Open all of them for reading.
        create: Make the storage where there is none, with these options of `ConceptIndex.create`; None does not. Its
            concepts are of the kind that the generator reads, unless `codec` says otherwise.
        generator: Address of what runs the LLM (`generation.address`); None runs it in this process.
        reading: How all answers have their passages read; see `ReadDefaults`.
        options: Of `ConceptIndex.load`: `dtype`, `device`, `offline`, `progress`, `concept_store`, ...; `embedder` and
            `compressor` where they are objects.

    Attributes:
        reading: How all answers have their passages read.
        measures: What is counted of answers that are decoded together, of all namespaces.
    """

    def __init__(
        self,
        storage: Path,
        settings: ServerSettings | None = None,
        *,
        read_only: bool = False,
        create: dict[str, Any] | None = None,
        generator: str | None = None,
        reading: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.storage, self.settings, self.read_only = Path(storage), settings or ServerSettings(), read_only
        self._options, self._create, self._address = options, create, generator
        self._lock = threading.Lock()  # one opens at a time: two would load the same models twice
        self._open: dict[str | None, ConceptIndex] = {}
        self._models: dict[tuple[str, str], _Models] = {}
        self._closed = False
        self.measures, self.reading = BatchMeasures(), ReadDefaults(reading)

    def start(self) -> None:
        """Load models now: of the namespace in the folder itself, or else of the first there is.

        Raises:
            StorageNotFoundError: There is no storage, and none is to be made.
            ConfigurationError: The generator cannot read the concepts of a namespace; see `check_codec`.
            CompLLMError: See `ConceptIndex.load`, `ConceptIndex.create` and `ReadDefaults.check`.
        """
        try:
            names = [one.name for one in list_namespaces(self.storage) if one.name is not None]
        except StorageNotFoundError:
            names = []
        if names:
            self._check_codecs(names)
            self.reading.check(self.get(names[0]))
            self._go_on(names[1:])
        elif self._create is None:
            raise StorageNotFoundError(
                "there is no storage here",
                got=self.storage,
                next_step=f"run `compllm-rag ingest PATH --storage {self.storage}` first, or pass --create",
            )
        else:
            options = self._creation(self._create)
            with self._lock:
                made = ConceptIndex.create(
                    self.storage, generation=self._generation(), generator=self._address, **options
                )
                self._add(None, made)
            self.reading.check(made)

    def _creation(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of a storage that is made.

        Raises:
            ConfigurationError: See `check_codec`.
        """
        if self._address is None:
            return asked
        given: Any = asked.get("compressor")
        if hasattr(given, "spec"):
            check_codec(self._address, deep=given.spec.config.deep)
            return asked
        codec = asked.get("codec") or codec_of(self._address)
        check_codec(self._address, deep=codec == "deep")
        return {**asked, "codec": codec}

    def _check_codecs(self, names: list[str]) -> None:
        for name in names if self._address is not None else ():
            try:
                manifest = read_manifest(namespace_folder(self.storage, name))
            except CompLLMError:  # whoever asks for it learns of it; the others are served
                continue
            self._check_codec(manifest)

    def _check_codec(self, manifest: Manifest) -> None:
        if self._address is not None:
            check_codec(self._address, deep=manifest.entry_layer > 0)

    def _go_on(self, names: list[str]) -> None:
        """Open further namespaces whose uploads still await their concepts, so that these are gone on with."""
        for name in names if not self.read_only else ():
            with suppress(CompLLMError):
                with connected(namespace_folder(self.storage, name) / CATALOG, writing=False) as connection:
                    try:
                        waiting = count_pending(connection)
                    finally:
                        connection.close()
                if waiting:
                    self.get(name)

    def opened(self, name: str | None) -> ConceptIndex | None:
        """The index of a namespace if it is open, without waiting."""
        return self._open.get(name)

    def get(self, name: str | None, *, create: bool = False) -> ConceptIndex:
        """The index of a namespace.

        Args:
            name: None for the one in the folder itself.
            create: Make it where it is missing.

        Raises:
            Refusal: There is none, or there are too many, or the server shuts down.
            CompLLMError: See `ConceptIndex.load`.
        """
        if (found := self.opened(name)) is not None:
            return found
        with self._lock:
            if self._closed:
                raise Refusal(503, "shutting_down", "the server is shutting down. Next step: try again later")
            if name in self._open:
                return self._open[name]
            folder = namespace_folder(self.storage, name)
            same = next((index for index in self._open.values() if index.storage_dir == folder), None)
            if same is not None:
                self._open[name] = same
                return same
            if has_manifest(folder):
                return self._add(name, self._load(name))
            if not create or self.read_only:
                raise Refusal(
                    404, "no_such_namespace", "this namespace holds nothing yet. Next step: upload a document into it"
                )
            return self._add(name, self._make(name))

    @property
    def indexes(self) -> list[ConceptIndex]:
        """Those that are open."""
        return list({id(index): index for index in list(self._open.values())}.values())

    def close(self) -> None:
        """Close all; chunks without concepts get them after the next start."""
        with self._lock:
            self._closed = True
            for models in self._models.values():
                if models.scheduler is not None:
                    models.scheduler.close()
            for index in self.indexes:
                try:
                    index.close()
                except CompLLMError as error:
                    log_fault(error)
            self._open.clear()

    def _add(self, name: str | None, index: ConceptIndex) -> ConceptIndex:
        key = _kind(index.manifest)
        if isinstance(index.generator, VLLMGenerator):
            index.generator.client.allow(self.settings.generations)
            index.generator = index.generator.apart()
        if key not in self._models:
            generator, source, scheduler = index.generator, index.manifest.embedder, None
            if isinstance(generator, LocalGenerator):
                generator.prefixes = self._caches()
                if self.settings.generations > 1:
                    scheduler = Scheduler(self.settings.generations, self.settings.waiting, measures=self.measures)
                    generator = index.generator = BatchingGenerator.over(generator, scheduler)
            named = LoadedEmbedder(index.embedder, source, index.manifest.embedder_identity)
            halves = generator.halves if isinstance(generator, LocalGenerator) else None
            self._models[key] = _Models(index, index.library._compressor, named, halves, scheduler)
        index._texts.discreet = True
        if not self.read_only and index._uploads is None:
            UploadQueue(index, max_documents=self.settings.max_queue, discreet=True)
        self._open[name] = index
        return index

    def _generation(self) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=self.settings.answer_tokens)

    def _load(self, name: str | None) -> ConceptIndex:
        manifest = read_manifest(namespace_folder(self.storage, name))
        self._check_codec(manifest)
        shared = self._models.get(_kind(manifest))
        options = dict(self._options)
        if shared is not None:
            where = {"concept_store": options["concept_store"]} if "concept_store" in options else {}
            options = {"compressor": shared.compressor, "embedder": shared.embedder, **where}
        return ConceptIndex.load(
            self.storage,
            namespace=name,
            read_only=self.read_only,
            resume=False,  # `_add` makes the queue, with its bound
            generation=self._generation(),
            generator=self._generator(shared),
            **options,
        )

    def _make(self, name: str | None) -> ConceptIndex:
        """A new namespace, with the models and settings of the first that was opened."""
        if len(list_namespaces(self.storage)) >= _MOST_NAMESPACES:
            raise Refusal(403, "not_allowed", f"there are {_MOST_NAMESPACES} namespaces already, which is the most")
        shared = next(iter(self._models.values()))
        first, manifest = shared.first, shared.first.manifest
        reader = None if first.storage_dir is None else first.storage_dir / READER
        compressor: Any = first.compressor
        shared_store = manifest.concept_store
        settings: Any = options_of(manifest.ingest) | {
            "chunk_size": manifest.ingest.chunk_size,
            "encoding": manifest.ingest.encoding,
            "concept_store": None if shared_store is None else self._options.get("concept_store") or shared_store.url,
        }
        return ConceptIndex.create(
            self.storage,
            namespace=name,
            llm=manifest.llm,
            reader=reader if reader is not None and reader.is_dir() else None,
            compressor=compressor,
            embedder=shared.embedder,
            resume=False,
            generation=self._generation(),
            generator=self._generator(shared),
            **settings,
        )

    def _generator(self, shared: _Models | None) -> Generator | str | None:
        if shared is None:
            return self._address
        if self._address is not None:
            return shared.first.generator  # one client, and its bound, for all namespaces of this LLM; see `_add`
        llm, generation, prefixes = shared.compressor.llm, self._generation(), self._caches()
        if shared.scheduler is None:
            return LocalGenerator(llm, generation, halves=shared.halves, prefixes=prefixes)
        return BatchingGenerator(llm, generation, halves=shared.halves, prefixes=prefixes, scheduler=shared.scheduler)

    def _caches(self) -> PrefixCache | None:
        return PrefixCache(_CACHED_PROMPTS, _CACHED_BYTES) if len(self.indexes) < _CACHING else None


def _kind(manifest: Manifest) -> tuple[str, str]:
    return manifest.fingerprint, manifest.embedder_identity
