"""What each row of `bench alike` is after, and how it differs; no torch, so that pages are made at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of row.

    Attributes:
        title: In tables and plots.
        after: Paper and section it is after.
        what: What stands for a passage, and what is learned.
        differs: From the paper.
        rated: Whether it has a rate.
    """

    title: str
    after: str
    what: str
    differs: str
    rated: bool = True


# Of the encoder of `lingua2`, all of whose weights are trained: what LoRA and heads learn at is far too fast for it.
ENCODER_LR = 1e-4
_CHUNK = "a chunk of at most 240 tokens"
KINDS: dict[str, Kind] = {
    "untrained": Kind(
        "deep concepts, untrained",
        "ours",
        "states of kept tokens in front of layer L; nothing is learned",
        "the start of `deep`",
    ),
    "deep": Kind(
        "deep concepts (ours)",
        "ours",
        f"states of kept tokens of {_CHUNK} in front of layer L; LoRA in both halves of the LLM",
        "what `train deep` trains, at one rate and from nothing",
    ),
    "segment_deep": Kind(
        "deep concepts of 20-token segments",
        "ours",
        "the same of segments of at most 20 tokens, each read on its own",
        "of `deep` in that alone",
    ),
    "compllm": Kind(
        "CompLLM",
        "arXiv 2509.19228, section 3",
        "outputs at end-of-sequence tokens behind a segment of at most 20 tokens, through a linear layer, as input "
        "embeddings; LoRA on the whole LLM and the layer, by the distance of hidden states",
        "gold answers, not the LLM's own; the linear layer is trained over standardised states and starts with outputs "
        "as large as embeddings",
    ),
    "compllm_deep": Kind(
        "CompLLM at layer L",
        "arXiv 2509.19228, section 3",
        "the same with the layers below L alone, entering in front of layer L; the layers above stay frozen",
        "of `compllm` in that, and in a linear layer that starts as the identity",
    ),
    "xrag": Kind(
        "xRAG",
        "arXiv 2405.13792",
        f"one input embedding for {_CHUNK}: its retrieval vector through two linear layers, which are learned",
        "the embedder is MiniLM; no paraphrase pretraining",
        rated=False,
    ),
    "kv_distill": Kind(
        "KV-Distill",
        "arXiv 2503.10337",
        "keys and values of kept tokens at all layers; LoRA that changes kept tokens alone, by KL both ways",
        "tokens are chosen by our scores, not by a trained scorer; each passage is compressed on its own",
    ),
    "lingua2": Kind(
        "LLMLingua-2's recipe",
        "arXiv 2403.12968, sections 3 and 4",
        "the tokens of kept words, as text; the retrieval embedder with two classes for each word piece, all of its "
        "weights trained, says which words",
        "labels: a word is kept that stands in a training question about its passage or in a gold answer, function "
        "words aside, where the paper has GPT-4 drop words; the encoder is MiniLM; exactly K tokens are kept; peak "
        f"learning rate {ENCODER_LR:g}, ten times the paper's",
    ),
    "icae": Kind(
        "ICAE-like slots",
        "arXiv 2307.06945",
        f"outputs at learned slots behind {_CHUNK}, as input embeddings; LoRA on the whole LLM, slots",
        "as many slots as the rate says, not 128; no autoencoding; the output's size is learned",
    ),
    "mean_input": Kind(
        "mean of embeddings",
        "arXiv 2510.20797",
        "means of neighbouring tokens' embeddings with a learned correction, of segments, as input embeddings",
        "the LLM that reads them stays frozen",
    ),
    "mean_deep": Kind(
        "mean of states at layer L",
        "arXiv 2510.20797",
        f"means of neighbouring states of {_CHUNK} in front of layer L; LoRA in both halves",
        "encoder and decoder are the two halves of one LLM",
    ),
    "encoder_input": Kind(
        "encoder only, input embeddings",
        "the seed article's future work",
        f"states of the embedder's word pieces of {_CHUNK}, averaged to K, through two linear layers, which are "
        "learned, as input embeddings",
        "–",
    ),
    "encoder_deep": Kind(
        "encoder only, at layer L",
        "the seed article's future work",
        "the same in front of layer L, with LoRA on the layers above",
        "–",
    ),
}
