"""What may be chosen when sampling, on the bench: what it saves, and what it costs in quality."""
