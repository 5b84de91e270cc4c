"""What SmartFRZ did in a run; the same for every framework."""

from smartfrz.control.report import Report

__all__ = ["Report"]
