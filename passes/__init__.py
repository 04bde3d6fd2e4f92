"""The passes that replace activations. `pipeline` lists them in order; README.md in this folder explains the design."""
