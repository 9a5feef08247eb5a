"""The storage: the folder that holds text, vectors, concepts and adapters, and its upkeep; knows no LlamaIndex."""
