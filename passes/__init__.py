"""Passes: what an activation is (`targets`), where they are (`find`), and how each is replaced (`substitute`)."""
