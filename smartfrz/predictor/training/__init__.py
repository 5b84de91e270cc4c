"""Train a predictor, judge it, and export it. Needs PyTorch."""
