"""One file a question; `python -m benchmarks.NAME --json OUT` writes what it measured, with machine and versions."""
