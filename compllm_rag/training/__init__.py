"""Training of readers and compressors; imports neither LlamaIndex nor the store."""
