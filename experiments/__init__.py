"""The top storey: the command line, the demo, the bench with ground truth, evaluation and benchmarks."""
