"""Embedders for tests: a bag of hashed words, and a tiny random sentence-transformers folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llama_index.core.base.embeddings.base import BaseEmbedding


class HashEmbedder(BaseEmbedding):
    """Counts words in 64 buckets; equal words give near vectors, nothing is learned."""

    model_name: str = "hash-64"
    dim: int = 64

    def _embed(self, text: str) -> list[float]:
        vector = [0.01] * self.dim
        for word in text.lower().replace(".", " ").replace("?", " ").split():
            vector[int(hashlib.sha256(word.encode()).hexdigest(), 16) % self.dim] += 1.0
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)


def save_sentence_transformer(folder: Path, text: str) -> Path:
    """A random BERT of 16 dimensions with mean pooling, as a folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({w for line in text.lower().split() for w in [line.strip('.,!?;"')] if w})
    alphabet = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *alphabet, *(f"##{c}" for c in alphabet)]
    raw = folder / "raw"
    raw.mkdir(parents=True)
    (raw / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(raw / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(raw)
    tokenizer.save_pretrained(raw)
    body = Transformer(str(raw), max_seq_length=128)
    SentenceTransformer(modules=[body, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"
