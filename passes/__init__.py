"""The passes that replace activations: `pipeline` has them in order, and README.md beside this file is their design."""
