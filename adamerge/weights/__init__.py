"""Weights: task vectors, how they are kept, the merge of them and its gradient."""
