"""SmartFRZ for PyTorch training loops."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    from smartfrz.errors import not_installed

    raise not_installed("smartfrz.adapters.torch", "PyTorch", "torch") from error

from smartfrz.adapters.torch.cache.options import PrefixCache as PrefixCache
from smartfrz.adapters.torch.freezer import SmartFRZ as SmartFRZ
from smartfrz.adapters.torch.freezing import TorchAdapter as TorchAdapter
from smartfrz.adapters.torch.layers import Layer as Layer
from smartfrz.adapters.torch.layers import trace_layers as trace_layers
from smartfrz.control.report import Report as Report

__all__ = ["Layer", "PrefixCache", "Report", "SmartFRZ", "TorchAdapter", "trace_layers"]
