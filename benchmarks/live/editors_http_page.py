"""The section of `editors_http` on the page of benchmarks."""

from __future__ import annotations

from benchmarks.cells import number, source, table
from benchmarks.common import Record

_TIMES = {
    "accepted_s": "edit to the 202 of its upload",
    "answerable_s": "edit to answerable: the chunks of the document hold it",
    "found_s": "edit to found: the passages of a question hold it, the wait for the LLM's turn included",
    "answered_s": "edit to answered: the answer to that question has ended",
}


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    race = record["at_the_same_time"]
    rows = [["edits, in uploads", f"{record['edits']}, {record['uploads']}"]]
    for name, what in _TIMES.items():
        spread = record[name]
        p50, p95, most = (number(spread[share], 2) for share in ("p50", "p95", "most"))
        rows.append([f"{what}, s: median (95th percentile, most) of {spread['n']}", f"{p50} ({p95}, {most})"])
    refused = ", ".join(f"{n} ({what})" for what, n in sorted(record["refused"].items())) or "none"
    for what, measured in (
        ("chunks for an edit: uploaded", number(record["chunks_uploaded_per_edit"], 2)),
        ("of these embedded again", number(record["chunks_embedded_per_edit"], 2)),
        ("units compressed (those replaced before their turn are not)", number(record["units_compressed_per_edit"], 2)),
        ("CPU time of the server for an edit, all of it, s", number(record["server_cpu_s_per_edit"], 2)),
        ("all concepts made after the last edit, s", number(record["concepts_after_s"])),
        ("edits whose sentence was replaced before its editor looked", str(record["edits_replaced_before_a_look"])),
        ("edits not met, at once; ever", f"{record['looks_again']}; {record['edits_not_met']}"),
        ("looks and questions that met what an edit had taken out", str(record["looks_stale"])),
        ("sentences lost", f"{record['sentences_lost']} of {record['sentences']}"),
        ("uploads after which the document was not what was uploaded", str(record["uploads_not_whole"])),
        ("text as the edits give it", _yes(record["text_is_as_replayed"])),
        ("a question for the last writer's sentence finds it", _yes(record["last_writer_wins"])),
        (
            f"{race['writers']} who write the whole document at the same time: one of their texts is there, and the "
            "next one replaces it",
            _yes(race["whole"] and race["next_upload_wins"]),
        ),
        ("requests refused, and sent again", refused),
    ):
        rows.append([what, measured])
    return [
        "## Many editors of one document",
        "",
        "### Through the HTTP server",
        "",
        f"{record['editors']} editors of one document of {record['source_tokens']:,} tokens, their edits spread over "
        f"{record['seconds']:g} s; one upload at a time, of the newest text. One edit of {record['asking']} is asked "
        f"for as well, by a question that reads {record['top_k']} passages.",
        "",
        f"{source(record)}.",
        "",
        *table(["what", "measured"], rows),
    ]


def _yes(true: bool) -> str:
    return "yes" if true else "NO"
