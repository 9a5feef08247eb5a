"""LlamaIndex parts: each usable alone with stock LlamaIndex pieces; nothing else in the package imports LlamaIndex."""
