"""Many runs side by side: read from their folders, as one page."""
