"""The passes, one a file, each a function over a graph module; `matches` and `pairs` read its graph."""
