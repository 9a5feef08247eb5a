"""Number 29: a device without memory left. Batches become smaller, then an error says what to do."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document

import toy
from compllm_rag import Compressor
from compllm_rag.errors import DeviceMemoryError
from processes import run as run_process
from tests.faults.fault_samples import QUESTION, check_whole, create, documents, filled, load, run, sound

Refuse = Callable[[torch.Tensor], bool]


class Scarce:
    """A module's forward that runs out of memory, as CUDA says it, for some inputs; what it held is watched."""

    def __init__(self, module: torch.nn.Module, refuse: Refuse) -> None:
        self.refuse, self.refused, self.held = refuse, 0, list[weakref.ref]()
        self._forward, self._module = module.forward, module
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **options: Any) -> Any:
        given = options.get("inputs_embeds")
        given = options["input_ids"] if given is None else given
        if self.refuse(given):
            self.refused += 1
            scratch = torch.zeros(1000)
            self.held.append(weakref.ref(scratch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._forward(*args, **options)

    def returned(self) -> bool:
        """Whether nothing of what was refused is still in memory."""
        gc.collect()
        return self.refused > 0 and all(ref() is None for ref in self.held)


@pytest.fixture
def compressor() -> Compressor:
    """One of each test's own, since it is made to fail."""
    return Compressor(toy.llm())


def segments(compressor: Compressor) -> list[list[int]]:
    return [list(s) for s in compressor.segmenter.split(toy.TEXT)]


def test_batches_are_halved_until_they_fit_and_stay_small(compressor: Compressor) -> None:
    wanted = segments(compressor)
    ks = [max(1, len(s) // 2) for s in wanted]
    expected = compressor.compress(wanted, ks)
    scarce = Scarce(compressor.decoder, lambda given: given.shape[0] > 3)
    found = compressor.compress(wanted, ks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert scarce.returned()
    first, scarce.refused = scarce.refused, 0
    compressor.compress(wanted, ks)
    assert scarce.refused < first  # it has learned how much fits


def test_a_segment_that_does_not_fit_is_an_error_and_the_storage_is_unchanged(
    tmp_path: Path, compressor: Compressor
) -> None:
    path = filled(tmp_path / "s", Compressor(toy.llm()))
    with load(path, compressor) as index:
        before, records = index.stats()["chunks"], index.store.stats().records
        scarce = Scarce(compressor.decoder, lambda given: True)
        with pytest.raises(DeviceMemoryError, match=r"single segment.*CUDA out of memory.*Next step: .*device='cpu'"):
            index.ingest([Document(id_="new", text="An otter nobody has compressed. " * 9)])
        assert scarce.returned()
        assert (index.stats()["chunks"], index.store.stats().records) == (before, records)
        scarce.refuse = lambda given: False
        index.ingest([Document(id_="new", text="An otter nobody has compressed. " * 9)])
        check_whole(index)
    sound(path)


def test_uploads_go_on_after_a_shortage(compressor: Compressor) -> None:
    scarce = Scarce(compressor.decoder, lambda given: True)
    with create(None, compressor) as index:
        index.upload(documents(2))
        assert not index.uploads.wait(60)
        assert {type(error) for error in index.uploads.status().failed.values()} == {DeviceMemoryError}
        answer = index.as_query_engine(missing="text").query(QUESTION)
        assert {node["used"] for node in answer.metadata["compllm"]["nodes"].values()} == {"text"}
        scarce.refuse = lambda given: False
        index.upload([Document(id_="later", text="The heron came later.")])
        index.uploads.wait(60)
        status = index.uploads.status()
        assert (status.documents, status.chunks_done) == (0, 1)


def test_a_batch_of_prompts_is_halved(compressor: Compressor) -> None:
    from compllm_rag.config import GenerationConfig
    from compllm_rag.generation.local import LocalGenerator
    from compllm_rag.prompt import PromptPlan, TextSpan

    llm = compressor.llm
    plans = [PromptPlan((TextSpan(tuple(range(50, 60 + i))),)) for i in range(5)]
    generator = LocalGenerator(llm, GenerationConfig(max_new_tokens=6))
    expected = [generator.generate([plan])[0].token_ids for plan in plans]
    scarce = Scarce(llm.model, lambda given: given.shape[0] > 2)
    assert [g.token_ids for g in generator.generate(plans)] == expected
    assert scarce.returned()


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("way", ["sync", "async", "stream", "async stream"])
async def test_an_answer_without_memory_ends_in_an_error(compressor: Compressor, when: str, way: str) -> None:
    with create(None, compressor) as index:
        index.ingest(documents(2))
        before, threads = index.store.stats().records, threading.active_count()
        others = set(threading.enumerate())  # of other tests in this process
        # Within the prompt, or at the second new token.
        scarce = Scarce(compressor.llm.model, lambda given: (given.shape[1] > 1) == (when == "prefill"))
        engine = index.as_query_engine(streaming="stream" in way, use_async="async" in way)

        async def ask() -> None:
            made = await engine.aquery(QUESTION) if "async" in way else engine.query(QUESTION)
            if way == "stream":
                list(made.response_gen)
            elif way == "async stream":
                _ = [piece async for piece in made.async_response_gen()]

        with pytest.raises(DeviceMemoryError, match=r"answer a prompt of \d+ positions.*Next step: retrieve fewer"):
            await ask()
        assert scarce.returned()
        assert index.store.stats().records == before
        assert not [t.name for t in threading.enumerate() if t.name.startswith("compllm") and t not in others]
        assert threading.active_count() <= threads + 8  # the event loop's own pool
        scarce.refuse = lambda given: False
        await ask()
        check_whole(index)


def test_a_real_shortage_of_memory() -> None:
    """RLIMIT_AS: the allocator of PyTorch refuses in earnest."""
    done = run(
        "import ctypes, resource, torch\n"
        # glibc: take large blocks from the system and give them back at once, so that the limit is felt each time.
        "libc = ctypes.CDLL(None); libc.mallopt(-3, 2**16)\n"
        "torch.set_num_threads(1)\n"
        "from compllm_rag.compression import compressor as module\n"
        "made = Compressor(toy.llm())\n"
        "wanted = [[50 + (i + j) % 300 for j in range(20)] for i in range(2000)]\n"  # of one length: one batch
        "ks = [len(s) for s in wanted]\n"
        "expected = made.compress(wanted[:100], ks[:100])\n"
        "module.BATCH_POSITIONS['cpu'] = made._most_positions = 2**22\n"
        "libc.malloc_trim(0)\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, resource.RLIM_INFINITY))\n"
        "found = made.compress(wanted, ks)\n"
        "print(made._most_positions < 2**22, all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected)))\n"
    )
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
def test_what_the_allocator_keeps_goes_back_to_the_system() -> None:
    # Many blocks, too large for Python's own allocator and too small for pages of their own, under one that stays.
    done = run_process(
        [
            sys.executable,
            "-c",
            "import torch\n"
            "from benchmarks.memory import resident\n"
            "from compllm_rag.models.device_memory import release_unused\n"
            "blocks = [bytes(4000) for _ in range(50_000)]\n"
            "last = bytes(4000)\n"
            "del blocks\n"
            "before = resident()\n"
            "release_unused(torch.device('cpu'))\n"
            "print(before - resident())\n",
        ]
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100 * 2**20
