"""Training, judging and exporting predictors. Needs PyTorch."""
