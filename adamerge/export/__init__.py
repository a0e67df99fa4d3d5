"""A folded encoder written as a folder, verified, and read back."""
