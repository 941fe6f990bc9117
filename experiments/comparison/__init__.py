"""Methods against each other on the bench, `trained` and `quantized` ones, and ways of `sampling`; all else alike."""
