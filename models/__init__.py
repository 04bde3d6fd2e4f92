"""Reference models, their data and the trainer behind `ortho-fx train`."""
