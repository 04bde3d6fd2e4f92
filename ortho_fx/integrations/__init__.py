"""What makes expansions at home in other libraries: one file for each library, and only that file imports it."""
