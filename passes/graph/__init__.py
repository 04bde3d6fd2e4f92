"""The passes, one per file: each is a function over a graph module. `matches` and `pairs` read the graph."""
