"""HTML, PDF, DOCX and tables, through the loader that users call."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pypdf
import pytest

from compllm_rag.llamaindex.documents import load_documents
from tests.llamaindex.readers.samples import docx, pdf


def reason(path: Path) -> str:
    documents = load_documents(path)
    assert list(documents) == []
    (skipped,) = documents.skipped
    assert skipped.problem
    assert "\n" not in skipped.reason
    return skipped.reason


def test_html(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        "<!DOCTYPE html><html><head><title>Tides &amp;\n times</title><style>x{}</style></head><body><!-- no -->"
        "<h1>Head</h1><p>One <b>bold</b>\nword.</p><pre>a\n    b</pre><ul><li>x<li>y</ul>"
        "<table><tr><td>1<td>2</tr></table><script>z()</script></body></html>"
    )
    (document,) = load_documents(file)
    assert document.metadata["title"] == "Tides & times"
    assert document.text == "Head\n\nOne bold word.\n\na\n    b\n\nx\ny\n\n1 2"
    file.write_bytes("<meta charset=iso-8859-1><title> </title><h1>Café</h1>é".encode("latin-1"))
    (document,) = load_documents(file)
    assert (document.metadata["title"], document.text) == ("Café", "Café\né")
    file.write_text("<div>" * 5000 + "deep")
    documents = load_documents(file)
    assert [d.text for d in documents] == ["deep"] or documents.skipped


def test_pdf(tmp_path: Path) -> None:
    file = tmp_path / "book.pdf"
    file.write_bytes(pdf("Preface", "", "The ferry leaves."))
    documents = list(load_documents([tmp_path]))
    assert [(d.id_, d.text, d.metadata["page_label"]) for d in documents] == [
        ("book.pdf#page=1", "Preface", "i"),
        ("book.pdf#page=3", "The ferry leaves.", "2"),
    ]
    assert "page_label" in documents[0].get_content(metadata_mode="llm")
    assert "page_label" not in documents[0].get_content(metadata_mode="embed")


def test_pdfs_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "book.pdf"
    file.write_bytes(pdf("text")[:200])
    assert "no sound PDF" in reason(file)
    file.write_bytes(b"no PDF at all")
    assert "no sound PDF" in reason(file)
    file.write_bytes(pdf(""))
    assert "no page has text" in reason(file)
    writer = pypdf.PdfWriter(clone_from=__import__("io").BytesIO(pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(file)
    assert "encrypted" in reason(file)


def test_docx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "letter.docx"
    file.write_bytes(docx("Dear reader"))
    (document,) = load_documents(file)
    assert (document.text.strip(), document.metadata["title"]) == ("Dear reader", "letter")
    file.write_bytes(b"PK\3\4 and no more")
    assert "no sound DOCX" in reason(file)
    file.write_bytes(docx("<open>"))
    assert "no sound DOCX" in reason(file)
    monkeypatch.setattr("compllm_rag.llamaindex.readers.pages._MOST_UNPACKED", 2**20)
    file.write_bytes(docx("bomb", padding=2**20))
    assert file.stat().st_size < 10_000
    assert "would unpack to" in reason(file)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pypdf" else find(name, *a))
    (tmp_path / "book.pdf").write_bytes(pdf("text"))
    assert "pip install 'compllm-rag[readers]'" in reason(tmp_path / "book.pdf")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", 'name,age\nAnna,7\n"Bo, B",8\n\n', "name: Anna; age: 7\nname: Bo, B; age: 8"),
        (
            "q.csv",
            'no,what,where\n999,"The 3"" pipe, steel",Bergen\n',
            'no: 999; what: The 3" pipe, steel; where: Bergen',
        ),
        ("b.csv", "name;age;\nAnna;;x\n", "name: Anna; x"),
        ("c.tsv", "1\t2\n3\t4\n", "1; 2\n3; 4"),
        ("d.csv", "only,names\n", "only; names"),
        ("e.csv", "", None),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str, wanted: str | None) -> None:
    (tmp_path / name).write_text(text)
    documents = load_documents(tmp_path)
    assert [d.text for d in documents] == ([] if wanted is None else [wanted])
    assert not documents.skipped


def test_notebooks(tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["# A try\n", "text"]}, {"cell_type": "code", "source": "x = 1"}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    (document,) = load_documents(tmp_path)
    assert (document.metadata["title"], document.text) == ("A try", "# A try\ntext\n\nx = 1")
    for text in ('{"cells": [{}]}', "[]", '{"cells": 1}', "{"):
        (tmp_path / "a.ipynb").write_text(text)
        assert reason(tmp_path / "a.ipynb").startswith("no ")


def test_code_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("# no title\nx = 1\n")
    (tmp_path / "b.rst").write_text("Title\n=====\n\ntext\n")
    (tmp_path / "c.json").write_text('{"a":[1,"é"]}')
    (tmp_path / "d.json").write_text('[{"id": 1, "text": "one"}, {"id": 2, "text": null}, {"id": 1, "text": "again"}]')
    documents = load_documents(tmp_path, on_skip=lambda skipped: None)
    assert [(d.id_, d.metadata["title"], d.text) for d in documents] == [
        ("a.py", "a.py", "# no title\nx = 1\n"),
        ("b.rst", "Title", "Title\n=====\n\ntext\n"),
        ("c.json", "c.json", '{\n "a": [\n  1,\n  "é"\n ]\n}'),
        ("1", "", "one"),
    ]
    assert [Path(s.path).name for s in documents.skipped] == ["d.json:2", "d.json:3"]
