"""Methods that quantize without training the weights, against each other: the same layers, bits and prompts."""
