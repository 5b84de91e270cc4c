"""The framework-free core, and the training of the predictor itself."""
