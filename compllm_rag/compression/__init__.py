"""Text becomes concepts: segments, which tokens to start from, the compressor, and how it is loaded."""
