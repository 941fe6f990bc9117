"""A bench that needs no download: captioned clips drawn by rule, an oracle, and models trained on them."""
