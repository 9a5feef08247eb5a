"""What a training run starts from: models, data, and what of them is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compllm_rag.compression.loading import AUTO
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import DEFAULT_LLM, CompressorConfig
from compllm_rag.training.compressor_task import RatesConfig
from compllm_rag.training.evaluation_guard import refuse_evaluation
from compllm_rag.training.hub_data import fetch_dataset
from compllm_rag.training.material import Material, MaterialConfig
from compllm_rag.training.objective import ObjectiveConfig
from compllm_rag.training.reader_task import LINEARS
from compllm_rag.training.run_config import Progress


@dataclass(frozen=True)
class DataOptions:
    """Where training data comes from; at least one must be given.

    Attributes:
        data_dir: Holds `train/*.jsonl(.gz)` with questions and `text/*.jsonl(.gz)` with texts.
        questions: Further files of questions.
        texts: Further files of texts.
        hub: Hub datasets by id, see `fetch_dataset`.
        material: How examples are mixed.
    """

    data_dir: Path | None = None
    questions: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    hub: tuple[str, ...] = ()
    material: MaterialConfig = field(default_factory=MaterialConfig)

    def check(self) -> None:
        """Refuse what can be refused before a large model is loaded.

        Raises:
            DataFileError, EvaluationDataError: See `Material`.
        """
        for path in (*self.questions, *self.texts):
            refuse_evaluation(path)
        if self.data_dir is not None:
            Material.files_of(self.data_dir)

    def load(self, segmenter: Segmenter, cache: Path, progress: Progress, **more: Any) -> Material:
        """The material.

        Raises:
            DataFileError, EvaluationDataError, ConfigurationError: See `Material` and `fetch_dataset`.
        """
        questions, texts = list(self.questions), list(self.texts)
        for spec in self.hub:
            path, kind = fetch_dataset(spec, cache, progress=progress)
            (questions if kind == "questions" else texts).append(path)
        if self.data_dir is not None:
            folder = Material.files_of(self.data_dir)
            questions, texts = questions + folder[0], texts + folder[1]
        return Material(questions, texts, segmenter, self.material, **more)


@dataclass(frozen=True)
class CompressorOptions:
    """What a compressor run starts from.

    Attributes:
        llm: Alias, folder or `org/name@revision`.
        reader: Folder of a reader adapter, `auto` or None; see `load_compressor_for`.
        init: Folder of a compressor to go on from; its configuration is kept.
        config: Of a new compressor; `scale` is set from the LLM's embeddings.
        objective: What counts.
        rates: At which rates.
        labels: `gold`, or `own` for the LLM's own answers to the training questions.
        label_groups: Most groups of questions that the LLM answers.
        answer_weight: Of how much likelier a token is in an answer than in a passage, against its unigram information,
            where anchors are chosen; see `answer_odds`. Counted from the training questions; `init` keeps its own.
        reader_rank: Of a LoRA on the target that learns to read concepts along with the compressor, and goes into
            the reader adapter (`best/reader`); 0 leaves the target as it is, as in the paper.
        text_share: Share of examples that such a reader reads as text.
        validation: Groups of questions held out.
        dtype: Compute dtype of the frozen LLM.
        device: A torch device.
    """

    llm: str = DEFAULT_LLM
    reader: str | Path | None = AUTO
    answer_weight: float = 2.0
    reader_rank: int = 0
    text_share: float = 0.15
    init: Path | None = None
    config: CompressorConfig = field(
        default_factory=lambda: CompressorConfig(layers=12, lora_rank=32, lora_alpha=64, lora_modules=LINEARS)
    )
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rates: RatesConfig = field(default_factory=RatesConfig)
    labels: str = "gold"
    label_groups: int = 2000
    validation: int = 24
    dtype: str | None = None
    device: str | None = None
