"""A plan becomes Kubernetes objects as dicts; no input or output here."""
