"""`storage_context.persist` and `load_index_from_storage` for an index that lies in a storage of its own.

All there is to persist lies in the storage and is committed there. So `persist` commits, and writes the files of
LlamaIndex's with nothing in them but where the storage lies; `load_index_from_storage` opens it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

from llama_index.core import StorageContext
from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.data_structs.registry import INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS
from llama_index.core.data_structs.struct_type import IndexStructType
from llama_index.core.storage.storage_context import DEFAULT_PERSIST_DIR

from compllm_rag.errors import ConfigurationError

TYPE = cast(IndexStructType, "compllm_rag")  # LlamaIndex looks it up by its text


@dataclass
class ConceptIndexStruct(IndexDict):
    """Where an index lies.

    Attributes:
        storage_dir: Its folder, absolute; empty in memory.
    """

    storage_dir: str = ""

    @classmethod
    def get_type(cls) -> IndexStructType:
        """What LlamaIndex writes, and finds this class and `ConceptIndex` by."""
        return TYPE

    def folder(self) -> str:
        """The folder.

        Raises:
            ConfigurationError: The index lies in memory.
        """
        if not self.storage_dir:
            raise ConfigurationError(
                "this index lies in memory, there is nothing to load it from",
                next_step="make it with ConceptIndex.create(storage_dir), and open that with ConceptIndex.load",
            )
        return self.storage_dir


INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS[TYPE] = ConceptIndexStruct


class ConceptStorageContext(StorageContext):
    """LlamaIndex's storage context of an index; what it persists says where the storage lies."""

    def persist(self, persist_dir: str | os.PathLike[str] = DEFAULT_PERSIST_DIR, *args: Any, **kwargs: Any) -> None:
        """Commit, and write down where the storage lies: nothing is copied, and the storage must stay.

        Args:
            persist_dir: Where; `load_index_from_storage(StorageContext.from_defaults(persist_dir=...))` opens it.
            *args: As of LlamaIndex.
            **kwargs: As of LlamaIndex.

        Raises:
            ConfigurationError: The index lies in memory, so that nothing would persist.
        """
        self.vector_store.persist("")  # a commit; its path is not used
        written = StorageContext.from_defaults()
        for struct in self.index_store.index_structs():
            written.index_store.add_index_struct(struct)
        written.persist(persist_dir, *args, **kwargs)
