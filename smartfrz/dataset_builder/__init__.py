"""Datasets for training a predictor: recorded runs with CKA to a finished reference model."""
