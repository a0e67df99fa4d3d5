"""Learning a merge: objectives, the step, and what goes on around the steps."""
