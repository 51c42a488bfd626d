"""Weight files: what they are called, how they are read, fetched, told apart, loaded and written."""
