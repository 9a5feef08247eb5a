"""Whole training runs: from names of models and data to adapters with their cards."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.information import information_for
from compllm_rag.compression.loading import AUTO, shipped_adapter, untrained_deep
from compllm_rag.compression.pretrained import read_compressor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.spec import embedding_rms
from compllm_rag.config import CompressorConfig, Narrowing, checked
from compllm_rag.errors import ConfigurationError, FingerprintMismatchError
from compllm_rag.models.adapters import read_adapter
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.cards import write_card
from compllm_rag.training.compressor_task import CompressorTask
from compllm_rag.training.deep_start import going_on_from, lora_settings
from compllm_rag.training.deep_task import DeepTask
from compllm_rag.training.evaluation_guard import refuse_evaluation
from compllm_rag.training.hub_data import fetch_dataset
from compllm_rag.training.importance import answer_odds
from compllm_rag.training.job_options import CompressorOptions, ConceptOptions, DataOptions, DeepOptions, ReaderOptions
from compllm_rag.training.labels import own_answers, own_instructions
from compllm_rag.training.live_reader import LiveReader
from compllm_rag.training.loop import train
from compllm_rag.training.material import Material
from compllm_rag.training.reader_task import ReaderTask
from compllm_rag.training.run_config import DEEP_RUN, READER_RUN, Progress, RunConfig


def train_compressor(
    out: Path,
    data: DataOptions,
    options: CompressorOptions | None = None,
    run: RunConfig | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train a compressor; called again with the same arguments it goes on.

    Args:
        out: `best/` is what `Compressor.from_pretrained` loads; `last/`, `log.jsonl` and `curves.png` beside it.
        data: What to train on.
        options: What to start from.
        run: How long and how fast.
        progress: Called with a message and the share that is done.
        command: Goes on the model card.

    Returns:
        The last record of the run.

    Raises:
        FingerprintMismatchError: `init`, or the run in `out`, belongs to another LLM.
        DataFileError, EvaluationDataError: See `Material`.
        DivergedError, ConfigurationError, OSError: See `train`.
    """
    options, run, progress = options or CompressorOptions(), run or RunConfig(), progress or _silent
    torch.manual_seed(run.seed)
    _check_other_reader(options)
    _check(data)
    llm, former = _target(options, progress)
    live = LiveReader(llm, options.reader_rank, former) if options.reader_rank else None
    started = None
    if options.init is not None:
        started = Compressor.of(read_compressor(options.init, llm, other_reader=options.other_reader))
    config = started.config if started else options.config
    if not config.lora_rank:
        raise ConfigurationError(
            "compressor has nothing to train",
            got="lora_rank 0",
            expected="a LoRA rank of at least 1",
            next_step="set --rank",
        )
    with _first_process_first():
        segmenter = Segmenter(llm.tokenizer, config.segment_length, config.segmenter_version)
        material = _load(data, llm, segmenter, out / "data", progress)
    compressor = started or new_compressor(llm, config, material, options.answer_weight)
    facts = {
        "compressor": compressor.config.model_dump(mode="json"),
        "objective": options.objective.model_dump(mode="json"),
        "rates": options.rates.model_dump(mode="json"),
        "labels": options.labels,
        "reader_rank": options.reader_rank,
        "answer_weight": options.answer_weight,
    }
    with _first_process_first():
        sources = _sources(data, material, options) | {"text_share": options.text_share}
        _same_job(out, "compressor", llm, facts, sources)
        if options.labels == "own":
            groups = material.groups[: options.label_groups]
            material.answers.update(own_answers(llm, groups, material, out / "own_answers.jsonl", progress))
    task = CompressorTask(
        compressor,
        material,
        options.objective,
        options.rates,
        validation=options.validation,
        live=live,
        text_share=options.text_share,
    )
    return _run(task, run, out, progress, command, llm, material, facts)


def train_deep(
    out: Path,
    data: DataOptions,
    options: DeepOptions | None = None,
    run: RunConfig = DEEP_RUN,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train deep concepts; called again with the same arguments it goes on.

    Args:
        out: `best/` is what `load_compressor` loads; `final/` (after the last step), `last/`, `log.jsonl` and
            `curves.png` beside it.
        data: What to train on; `DEEP_DATA` has the mix that fits.
        options: What to start from.
        run: How long and how fast.
        progress: Called with a message and the share that is done.
        command: Goes on the model card.

    Returns:
        The last record of the run.

    Raises:
        ConfigurationError: `init` is of another entry layer or has other LoRAs than `options` say, or prompts cannot
            be narrowed like that.
        FingerprintMismatchError: `init`, or the run in `out`, belongs to another LLM.
        UnsupportedModelError: The LLM cannot be cut in two; see `Halves`.
        DataFileError, EvaluationDataError: See `Material`.
        DivergedError, OSError: See `train`.
    """
    options, progress = options or DeepOptions(), progress or _silent
    narrowings = list(map(Narrowing.parse, options.narrow))
    torch.manual_seed(run.seed)
    _check_other_reader(options)
    _check(data)
    llm, _ = _target(options, progress)
    started = going_on_from(options.init, llm, options) if options.init is not None else None
    units = {} if options.unit_length is None else {"unit_length": options.unit_length}
    config = started.config if started else checked(CompressorConfig, **units)
    with _first_process_first():
        segmenter = Segmenter(llm.tokenizer, config.segment_length, config.segmenter_version)
        material = _load(data, llm, segmenter, out / "data", progress, config.unit_length)
    compressor = started or untrained_deep(
        llm,
        options.entry_layer,
        information=_information(llm, material, options.answer_weight),
        **units,
        **lora_settings(options),
    )
    facts = {
        "compressor": compressor.config.model_dump(mode="json"),
        "material": data.material.model_dump(mode="json"),
        "rates": list(options.rates),
        "kl": options.kl,
        "answer_weight": options.answer_weight,
        **({"narrow": list(options.narrow), "narrowed": options.narrowed} if options.narrow else {}),
    }
    with _first_process_first():
        _same_job(out, "deep", llm, facts, _sources(data, material, options))
    task = DeepTask(
        compressor,
        material,
        rates=options.rates,
        kl=options.kl,
        validation=options.validation,
        narrowings=narrowings,
        narrowed=options.narrowed,
    )
    return _run(task, run, out, progress, command, llm, material, facts)


def train_reader(
    out: Path,
    data: DataOptions,
    options: ReaderOptions | None = None,
    run: RunConfig | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train a reader adapter for a small instruct model; called again with the same arguments it goes on.

    Args:
        out: `best/` is a PEFT adapter, which `TargetLLM.from_pretrained(reader=...)` merges.
        data: What to train on.
        options: What to start from.
        run: How long and how fast; `READER_RUN` if None.
        progress: Called with a message and the share that is done.
        command: Goes on the model card.
    """
    options, run, progress = options or ReaderOptions(), run or READER_RUN, progress or _silent
    torch.manual_seed(run.seed)
    _check(data)
    target = TargetLLM.from_pretrained(
        options.llm, reader=None, dtype=options.dtype, device=options.device or _local_device(), progress=progress
    )
    kept = out / "own_instructions.jsonl"
    started = read_adapter(options.init) if options.init is not None else None
    rank = int(started[0]["r"]) if started else options.rank
    facts = {"rank": rank, "keep_share": options.keep_share}
    with _first_process_first():
        material = _load(data, target, Segmenter(target.tokenizer, 20), out / "data", progress)
        _same_job(out, "reader", target, facts, _sources(data, material, options))
        keep = own_instructions(target, material, kept, progress=progress) if options.keep_share else []
    task = ReaderTask(
        target, material, keep=keep, rank=rank, keep_share=options.keep_share, validation=options.validation
    )
    if started:
        task.load(*started)
    return _run(task, run, out, progress, command, target, material, facts)


def new_compressor(llm: TargetLLM, config: CompressorConfig, material: Material, answer_weight: float) -> Compressor:
    """An untrained compressor whose anchors are chosen by information and by what answers are made of.

    Args:
        llm: The target.
        config: What the compressor is; `scale` is set from the LLM's embeddings.
        material: Whose questions are counted.
        answer_weight: See `CompressorOptions`.
    """
    table = _information(llm, material, answer_weight)
    return Compressor(llm, config.model_copy(update={"scale": embedding_rms(llm)}), information=table)


def _information(llm: TargetLLM, material: Material, answer_weight: float) -> torch.Tensor:
    """How much each token is worth keeping, (vocab_size,)."""
    table = information_for(llm.tokenizer)
    return table + answer_weight * answer_odds(material, table.numel()) if answer_weight else table


def _target(options: ConceptOptions, progress: Progress) -> tuple[TargetLLM, Path | None]:
    """The target LLM and the reader that is merged into it."""
    reader = shipped_adapter(options.llm, "reader") if options.reader == AUTO else options.reader
    former = Path(reader) if reader is not None else None
    device = options.device or _local_device()
    llm = TargetLLM.from_pretrained(options.llm, reader=former, dtype=options.dtype, device=device, progress=progress)
    return llm, former


def _check_other_reader(options: CompressorOptions | DeepOptions) -> None:
    if options.other_reader and options.init is None:
        raise ConfigurationError(
            "there is nothing to go on from with another reader",
            got="other_reader, and no compressor to go on from",
            expected="both or neither",
            next_step="name it (`train deep --from`, `train compressor --init`), or leave --other-reader out",
        )


def _check(data: DataOptions) -> None:
    """Refuse what can be refused before a large model is loaded."""
    for path in (*data.questions, *data.texts):
        refuse_evaluation(path)
    if data.data_dir is not None:
        Material.files_of(data.data_dir)


def _load(
    data: DataOptions,
    llm: TargetLLM,
    segmenter: Segmenter,
    cache: Path,
    progress: Progress,
    unit_length: int | None = None,
) -> Material:
    questions, texts = list(data.questions), list(data.texts)
    for spec in data.hub:
        path, kind = fetch_dataset(spec, cache, progress=progress)
        (questions if kind == "questions" else texts).append(path)
    if data.data_dir is not None:
        folder = Material.files_of(data.data_dir)
        questions, texts = questions + folder[0], texts + folder[1]
    return Material(questions, texts, segmenter, data.material, unit_length=unit_length, window=llm.window)


def _sources(
    data: DataOptions, material: Material, options: CompressorOptions | DeepOptions | ReaderOptions
) -> dict[str, Any]:
    """What a run is made from, so that it does not go on with something else; of files a digest of what is in them."""
    return {
        "material": data.material.model_dump(mode="json"),
        "data": sorted(f"{path.name} {_digest(path)}" for path in material.files),
        "from": None if options.init is None else _digest(options.init),
        "validation": options.validation,
    }


def _digest(path: Path) -> str:
    """The start of a SHA-256 over a file, or over the adapter in a folder."""
    found = hashlib.sha256()
    for each in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with each.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def _run(
    task: Any,
    run: RunConfig,
    out: Path,
    progress: Progress,
    command: str,
    llm: TargetLLM,
    material: Material,
    facts: dict[str, Any],
) -> dict[str, Any]:
    begun = time.strftime("%Y-%m-%d", time.gmtime())
    record = train(task, run, out, progress)
    if (out / "best").is_dir() and os.environ.get("RANK", "0") == "0":
        hardware = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        write_card(
            out,
            kind=task.name,
            llm=llm.source,
            data=[path.name for path in material.files],
            skipped=material.skipped,
            run=run,
            facts=facts,
            hardware=f"{hardware} ({platform.machine()}, torch {torch.__version__})",
            command=command,
            date=begun,
        )
    return record | {"skipped": len(material.skipped), "out": str(out)}


def _same_job(out: Path, kind: str, llm: TargetLLM, facts: dict[str, Any], sources: dict[str, Any]) -> None:
    """Refuse to go on with a run of another LLM, of other settings or of other data."""
    path = out / "job.json"
    mine = {"kind": kind, "llm": {"source": llm.source, "identity": llm.identity}, "facts": facts, "sources": sources}
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        return
    former = json.loads(path.read_text(encoding="utf-8"))
    if former["llm"]["identity"] != llm.identity:
        raise FingerprintMismatchError(
            "run in this folder trains for another LLM",
            got=f"{llm.source} ({llm.identity[:16]})",
            expected=f"{former['llm']['source']} ({former['llm']['identity'][:16]})",
            next_step="choose another --out, or that LLM and reader",
        )
    # Runs of earlier releases do not say what they were made from.
    wanted = {"kind": former["kind"], **former.get("sources", sources), **former["facts"]}
    found = {"kind": kind, **sources, **facts}
    changed = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if changed:
        raise ConfigurationError(
            "run in this folder was started with other settings",
            got=", ".join(f"{name}: {found.get(name)}" for name in changed),
            expected=", ".join(f"{name}: {wanted.get(name)}" for name in changed),
            next_step="choose another --out, or the settings it was started with",
        )


def _first_process_first() -> Any:
    """What the first process fetches or answers, the others find done."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def _local_device() -> str | None:
    """The GPU of this process where `torchrun` started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def _silent(message: str, share: float | None) -> None:
    """No progress."""
