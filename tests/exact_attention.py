"""Attention in float64, and how far another is from it."""

import numpy as np


def exact(query, key, value):
    """Of [batch, tokens, heads, head_dim], all three; like the queries."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def distance(a, b):
    """The size of a - b in units of that of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
