"""Which documents may be pruned: those whose files are gone for certain. One doubt, and none is."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from compllm_rag.catalog.origins import Origins, lies_in
from compllm_rag.errors import PruneRefusedError
from compllm_rag.llamaindex.documents import FileDocuments
from compllm_rag.llamaindex.readers.found import shown


def prunable(
    origins: Origins, met: Mapping[str, str | None], documents: FileDocuments | None, within: Sequence[str]
) -> list[str]:
    """Ids of the documents whose files are gone, or hold them no more.

    Args:
        origins: Files of all documents.
        met: Ids of the documents that were met now, and their files where known.
        documents: What they were read by, which knows what it could not read; None where that is not known.
        within: The folders and files they came from, links followed.

    Raises:
        PruneRefusedError: A file or folder could not be looked at, or a folder is empty that held documents: a disk
            that is not mounted looks like that.
    """
    candidates = origins.not_met(met)
    files = {file for file in met.values() if file}
    if documents is not None:
        blind = [one for one in documents.skipped if one.kind in ("unlisted", "unreadable")]
        if blind:
            raise _refused(f"{blind[0].path}: {blind[0].reason}", len(blind) - 1)
    for root in within if candidates else ():
        if os.path.isdir(root) and not any(lies_in(file, [root]) for file in files):  # noqa: PTH112
            lost = [file for file in candidates.values() if lies_in(file, [root])]
            if lost:
                raise _refused(f"{shown(root)}: not one document was found there, and it held {len(lost)}", 0)
    gone, doubts = [], list[str]()
    for doc_id, file in candidates.items():
        verdict = _read(file, documents) if documents is not None else _seen(file, files)
        doubt = verdict if isinstance(verdict, str) else None if verdict is not None else _unsure(file, within)
        if doubt:
            doubts.append(doubt)
        elif verdict is not False:
            gone.append(doc_id)
    if doubts:
        raise _refused(doubts[0], len({*doubts}) - 1)
    return gone


def _read(file: str, documents: FileDocuments) -> bool | str | None:
    """Whether a document that was not met may go, by what its file's reading tells.

    Returns:
        True: its file was read and holds it no more; False: it is none of this reading's business; a text: why that
        cannot be told; None: the reading did not come across the file.
    """
    if file in documents.finished or lies_in(file, documents.listing.storages):
        return True
    for skipped in documents.skipped:
        if skipped.kind not in ("vanished", "storage") and lies_in(file, [skipped.file]):
            # What is never read here came from somebody else's reader.
            return False if skipped.kind in ("excluded", "unknown") else f"{skipped.path}: {skipped.reason}"
    return None


def _seen(file: str, met: Collection[str]) -> bool | str | None:
    """The same where nothing is known of the reading: its file gave other documents, or is empty."""
    try:
        size = os.stat(file).st_size  # noqa: PTH116
    except OSError:
        return None
    return True if file in met or not size else f"{shown(file)}: it is there, and none of its documents was given"


def _unsure(file: str, roots: Sequence[str]) -> str | None:
    """Why it cannot be told that a file is gone; None when it is."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return f"{shown(error.filename or file)}: {(error.strerror or '').lower()}"
    else:
        return f"{shown(file)}: it is there, and was not read"
    folder = os.path.dirname(file)  # noqa: PTH120
    while lies_in(folder, roots):
        try:
            with os.scandir(folder) as entries:
                empty = next(entries, None) is None
        except (FileNotFoundError, NotADirectoryError):
            folder = os.path.dirname(folder)  # noqa: PTH120
            continue
        except OSError as error:
            return f"{shown(folder)}: {(error.strerror or '').lower()}"
        return f"{shown(folder)}: it held documents and is empty now; remove it if that is meant" if empty else None
    return None


def _refused(first: str, others: int) -> PruneRefusedError:
    return PruneRefusedError(
        "nothing was pruned: not everything could be looked at",
        got=f"{first}{f' (and {others} more)' if others > 0 else ''}",
        expected="files and folders that can be read",
        next_step="see that it can be read, or that its disk is mounted, and run the same again; what was read is kept",
    )
