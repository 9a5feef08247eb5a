"""One module a benchmark: the section of docs/benchmarks.md that its JSON becomes, and its plot."""
