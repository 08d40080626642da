"""Findings and figures as one offline page, and the folder of a run."""

from .assets import asset
from .page import report_html
from .store import check_writable, write_run
from .strips import strip_data, strip_html
from .tables import findings_html

__all__ = ["asset", "check_writable", "findings_html", "report_html", "strip_data", "strip_html", "write_run"]
