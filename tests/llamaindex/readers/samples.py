"""Files of kinds that are not written by hand, small ones."""

from __future__ import annotations

import io
import zipfile

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def pdf(*texts: str) -> bytes:
    """A PDF with a page for each text; an empty text is an empty page. The first is labelled i, the others from 1."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(texts)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R/PageLabels<</Nums[0<</S/r>> 1<</S/D>>]>>>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(texts)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for n, text in enumerate(texts):
        shown = f"BT /F1 24 Tf 50 100 Td ({text}) Tj ET" if text else ""
        fonts = "/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Contents {5 + 2 * n} 0 R{fonts}>>")
        objects.append(f"<</Length {len(shown)}>>\nstream\n{shown}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer<</Root 1 0 R/Size {len(objects) + 1}>>\nstartxref\n{len(data)}\n%%EOF"
    return data + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def docx(text: str, *, padding: int = 0) -> bytes:
    """A DOCX of one paragraph, and that many bytes of nothing that packs well."""
    body = f'<w:document xmlns:w="{WORD}"><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body></w:document>'
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("word/document.xml", body)
        if padding:
            packed.writestr("word/header1.xml", b"<a>" + b"0" * padding)
    return made.getvalue()
