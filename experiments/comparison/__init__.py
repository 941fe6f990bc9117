"""Methods against each other on the bench, with everything else alike: `trained` ones and `quantized` ones."""
