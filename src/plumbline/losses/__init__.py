"""One loss a file; each returns the loss and its statistics."""
