"""Two models' videos of one prompt and seed: what is asked for (`question.py`), and what is computed (`pair.py`,
`answer.py`)."""
