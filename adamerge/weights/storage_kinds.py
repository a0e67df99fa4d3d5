"""The types and places that task vectors can be kept in; without torch, for whoever only lists."""

DTYPES = ("float32", "bfloat16", "int8")
PLACES = ("auto", "cuda", "host", "disk")
