"""Layer freezing that a learned predictor decides."""

__version__ = "0.1.0"
__all__ = ["__version__"]
