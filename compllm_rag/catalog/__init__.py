"""Text, vectors and their counts in one SQLite file and FAISS files of its generations; knows no LlamaIndex."""
