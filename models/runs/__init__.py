"""What a run leaves: its files and their pictures."""
