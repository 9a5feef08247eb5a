"""Train the reader of a Llama, then its deep concepts, on a GPU that is there for minutes.

    python pipelines/train_on_gpu.py --data-dir data --out runs/gpu --reader READER --deep DEEP

READER and DEEP are the folders to go on from. First the reader learns for `--reader-minutes`, with cross-entropy on the
answers; then, with the better one as the teacher, deep concepts for `--deep-minutes`, with the KL divergence from the
LLM that reads text, and half as much cross-entropy. Both learning rates fall to zero by the clock. `out/reader` holds
the best reader by held-out questions, `out/deep` the concepts as of the last look or the end, `out/log.txt` all looks.
Interrupted, the same command goes on from the last look of the stage that was going on, which then has its whole time
again; a stage that came to its end is not run twice.

It has the losses and gradients of `compllm-rag train reader` and `train deep`, but LoRA is merged into the weights at
every step (`training/merged.py`), and other processes lay examples out as indices (`training/laid_out.py`). How fast
that was is told in docs/guide/train.md. Only Llama's architecture can be trained so.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.pretrained import saved_config
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.models.adapters import load_lora_state, lora_state, read_adapter
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import TextSpan
from compllm_rag.training.deep_start import going_on_from
from compllm_rag.training.examples import Branch, Example, positions_of
from compllm_rag.training.job_options import LINEARS, DeepOptions, MaterialConfig
from compllm_rag.training.labels import own_instructions
from compllm_rag.training.laid_out import Arrays, Kept, deep_rows, kept_by_scores, text_rows
from compllm_rag.training.material import Material
from compllm_rag.training.merged import DeepReading, Reading, Tensors, Tree, Weights
from compllm_rag.training.merged_loop import Log, drawn, fit, on, parts
from compllm_rag.training.reader_task import write_adapter

READER_MIX = MaterialConfig(max_context=1000, max_passages=6, qa=0.9, copy_share=0.05, distractors=0.7, near=0.6)
DEEP_MIX = MaterialConfig(max_context=900, max_passages=6, qa=0.85, copy_share=0.2, distractors=0.6, near=0.5)
RATES = (1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 3.0, 4.0)
KEEP_SHARE = 0.05  # of other prompts with the LLM's own answers

Scores = dict[tuple[int, ...], np.ndarray]


def train_reader(args: argparse.Namespace, material: Material, held: list[Example], log: Log) -> None:
    """The first stage; writes `out/reader`."""
    llm = TargetLLM.from_pretrained(args.llm, reader=None, dtype="float32", device="cpu")
    keep = own_instructions(llm, material, args.out / "own_instructions.jsonl")
    settings, state = read_adapter(args.reader)
    weights, rank = Weights(llm, args.device), int(settings["r"])
    reading, tree = Reading(weights, args.dtype), Tree(weights, 0, weights.layers, args.dtype, rank)
    tree.load(state, float(settings["lora_alpha"]) / (2 * rank))

    def one(rng: random.Random) -> Example:
        if keep and rng.random() < KEEP_SHARE:
            prompt, answer = rng.choice(keep)
            return Example((TextSpan(prompt),), (Branch((), answer, "keep"),))
        return material.draw(rng)

    def draw(step: int) -> list[Arrays]:
        examples = [one(random.Random(f"{args.seed}/reader/{step}/{i}")) for i in range(args.batch)]
        branches = sum(len(example.branches) for example in examples)
        return [text_rows(some, branches) for some in parts(examples, positions_of, args.micro_tokens)]

    def loss(batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        found = reading.text(tree, batch).gather(1, batch["target"][:, None])[:, 0]  # (n_predictions,)
        total = -(found * batch["weight"]).sum()
        return total, torch.stack([total.detach(), torch.zeros_like(total)])

    best = math.inf
    looked = [text_rows(some, 1) for some in parts(held, positions_of, args.micro_tokens // 2)]

    @torch.no_grad()
    def look(step: int) -> None:
        nonlocal best
        total, n = 0.0, 0
        for arrays in looked:
            batch = on(args.device, arrays)
            found = reading.text(tree, batch).gather(1, batch["target"][:, None])
            total, n = total - float(found.sum()), n + len(found)
        log(f"reader, step {step}: {total / n:.4f} nats per token of held-out answers")
        if total / n < best:
            best = total / n
            tensors = {f"base_model.model.model.{name}": tensor for name, tensor in tree.state().items()}
            write_adapter(args.out / "reader", tensors, source=llm.source, rank=rank, alpha=2 * rank, modules=LINEARS)

    fit(
        [tree], [], drawn(draw, args.workers), loss, look,
        seconds=60 * args.reader_minutes, lr=5e-4, warmup=15, most=args.most_steps, log=log,
    )  # fmt: skip


def train_deep(args: argparse.Namespace, material: Material, held: list[Example], log: Log) -> None:
    """The second stage; writes `out/deep`."""
    llm = TargetLLM.from_pretrained(args.llm, reader=args.out / "reader", dtype="float32", device=str(args.device))
    rank = saved_config(args.deep).lora_rank
    options = DeepOptions(
        lora_rank=rank,
        prompt_rank=args.prompt_rank,
        marked=args.marked,
        unit_length=args.unit_length,
        other_reader=True,
    )
    compressor = going_on_from(args.deep, llm, options)
    config = compressor.config
    log("scoring every unit, so that other processes can choose tokens")
    windows = windows_of(material, args.windows)
    scores = scores_of(compressor, material, windows)
    reading = DeepReading(
        Weights(llm, args.device), args.dtype, config.entry_layer, config.lora_rank, config.prompt_rank, config.marked
    )
    trees = [tree for tree in reading.trees.values() if tree.rank]
    for name, tree in reading.trees.items():
        if tree.rank:
            tree.load(lora_state(compressor.trees[name]))
    if compressor.marker is not None:
        reading.marker.data.copy_(compressor.marker.data)

    def laid_out(items: Sequence[tuple[Example, FixedRate]], branches: int) -> list[Arrays]:
        out = []
        for some in parts(items, lambda item: positions_of(item[0]), args.micro_tokens):
            kept = [kept_of(scores, example, rate) for example, rate in some]
            out.append(deep_rows([example for example, _ in some], kept, config.opening, branches))
        return out

    rates = [FixedRate(rate, config.unit_length) for rate in args.rates]

    def draw(step: int) -> list[Arrays]:
        items = []
        for i in range(args.batch):
            rng = random.Random(f"{args.seed}/deep/{step}/{i}")
            if windows and rng.random() >= DEEP_MIX.qa:
                example = rng.choice(windows)
            else:
                example = material.questions(material.draw_group(rng), rng, DEEP_MIX.max_context)
            items.append((example, rng.choice(rates)))
        return laid_out(items, sum(len(example.branches) for example, _ in items))

    looked = {rate: laid_out([(e, FixedRate(rate, config.unit_length)) for e in held], 1) for rate in (1.0, 2.0)}

    @torch.no_grad()
    def look(step: int) -> None:
        for rate, micro in looked.items():
            sums = np.zeros(4)
            for arrays in micro:
                batch = on(args.device, arrays)
                theirs, ours = reading.text(reading.teacher, batch, "text_"), reading.concepts(batch)
                target = batch["text_target"][:, None]
                sums += [
                    len(ours), float((theirs.exp() * (theirs - ours)).sum()),
                    -float(ours.gather(1, target).sum()), -float(theirs.gather(1, target).sum()),
                ]  # fmt: skip
            n, kl, nll, text = sums
            log(f"deep, step {step}, rate {rate:g}: KL {kl / n:.4f}, NLL {nll / n:.4f}, as text {text / n:.4f}")
        save(compressor, reading, args.out / "deep")

    fit(
        trees, [reading.marker] if config.marked else [], drawn(draw, args.workers), partial(distillation, reading),
        look, seconds=60 * args.deep_minutes, lr=7e-4, warmup=20, most=args.most_steps, log=log,
    )  # fmt: skip


def distillation(reading: DeepReading, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL divergence from the LLM that reads text, and half the cross-entropy of the gold answers; both."""
    with torch.no_grad():
        theirs = reading.text(reading.teacher, batch, "text_")  # (n_predictions, vocab_size)
    ours, weight = reading.concepts(batch), batch["text_weight"]
    kl = ((theirs.exp() * (theirs - ours)).sum(-1) * weight).sum()
    ce = -(ours.gather(1, batch["text_target"][:, None])[:, 0] * weight).sum()
    return kl + 0.5 * ce, torch.stack([kl.detach(), ce.detach()])


def scores_of(compressor: DeepCompressor, material: Material, windows: Sequence[Example]) -> Scores:
    """What each token of each unit that can be drawn is worth keeping."""
    passages = (p for group in [*material.groups, *material.held_out] for p in group.passages)
    units = {unit for p in passages for unit in material.body(p.text).segments}
    units |= {unit for window in windows for body in window.bodies for unit in body.segments}
    ordered = sorted(units, key=lambda unit: (len(unit), unit))
    return {unit: own.numpy() for unit, own in zip(ordered, compressor.scores(ordered), strict=True)}


def kept_of(scores: Scores, example: Example, rate: FixedRate) -> Kept:
    """The places that every unit of an example keeps."""
    return [
        [kept_by_scores(scores, u, k) for u, k in zip(body.segments, rate.n_concepts(body.segments), strict=True)]
        for body in example.bodies
    ]


def save(compressor: DeepCompressor, reading: DeepReading, folder: Path) -> None:
    """Write a compressor with the weights of now."""
    for name, tree in reading.trees.items():
        if tree.rank:
            own, state = compressor.trees[name], tree.state()
            load_lora_state(own, {key: state[key[key.index("layers.") :]] for key in lora_state(own)})
    if compressor.marker is not None:
        compressor.marker.data.copy_(reading.marker.data)
    compressor.refresh_fingerprint()
    compressor.save_pretrained(folder)


def windows_of(material: Material, number: int) -> list[Example]:
    """Pieces of plain text to copy and to continue, drawn once, so that their units can be scored."""
    if not material.texts:
        return []
    lengths = random.Random("lengths")
    each = (round(math.exp(lengths.uniform(math.log(40), math.log(700)))) for _ in range(number))
    return [material.window(random.Random(f"window/{i}"), budget) for i, budget in enumerate(each)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds train/*.jsonl(.gz) and text/*.jsonl(.gz)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llm", default=DEFAULT_LLM)
    parser.add_argument("--reader", type=Path, required=True, help="adapter to go on from")
    parser.add_argument("--deep", type=Path, required=True, help="deep concepts to go on from")
    parser.add_argument("--reader-minutes", type=float, default=1.7)
    parser.add_argument("--deep-minutes", type=float, default=7.7)
    parser.add_argument("--batch", type=int, default=128, help="examples of a step")
    parser.add_argument("--micro-tokens", type=int, default=36864, help="positions of a forward, padding counted")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--prompt-rank", type=int, help="see `train deep --prompt-rank`")
    parser.add_argument("--marked", action=argparse.BooleanOptionalAction, help="see `train deep --marked`")
    parser.add_argument("--unit-length", type=int, help="see `train deep --unit-length`")
    parser.add_argument("--windows", type=int, default=3000, help="pieces of plain text")
    parser.add_argument("--held-out", type=int, default=160, help="groups of held-out questions to look at")
    parser.add_argument("--most-steps", type=int, default=10**6, help="of each stage, should that be sooner")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def log(message: str) -> None:
        line = f"[{time.monotonic() - begun:.0f} s] {message}"
        print(line, flush=True)
        with (args.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    torch.manual_seed(args.seed)
    tokenizer = TargetLLM.from_pretrained(args.llm, reader=None, dtype="float32", device="cpu").tokenizer
    config = saved_config(args.deep)
    segmenter = Segmenter(tokenizer, config.segment_length, config.segmenter_version)
    files = Material.files_of(args.data_dir)
    for stage, mix in ((train_reader, READER_MIX), (train_deep, DEEP_MIX)):
        name = stage.__name__.removeprefix("train_")
        if (args.out / f"{name}.done").exists():
            log(f"{name}: done before")
            continue
        if (args.out / name).exists():
            log(f"{name}: goes on from {args.out / name}")
            setattr(args, name, args.out / name)
        material = Material(*files, segmenter, mix, unit_length=args.unit_length or config.unit_length)
        rng = random.Random(0)
        chosen = rng.sample(material.held_out, min(args.held_out, len(material.held_out)))
        held = [material.questions(group, rng, 0, extras=False) for group in chosen]
        stage(args, material, held, log)
        (args.out / f"{name}.done").touch()


if __name__ == "__main__":
    main()
