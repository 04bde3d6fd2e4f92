"""What makes expansions at home in other libraries, one file for each; each imports its library only when it is used."""
