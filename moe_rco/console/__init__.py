"""What the user sees. Nothing is decided here."""

from moe_rco.console.bars import RichProgress
from moe_rco.console.forecast import show_forecast, show_preflight
from moe_rco.console.inspection import show_inspect
from moe_rco.console.map import show_map
from moe_rco.console.parts import stderr, stdout
from moe_rco.console.serving import show_serving
from moe_rco.console.status import show_status
from moe_rco.console.summary import show_comparison, show_summary

__all__ = (
    "RichProgress",
    "show_comparison",
    "show_forecast",
    "show_inspect",
    "show_map",
    "show_preflight",
    "show_serving",
    "show_status",
    "show_summary",
    "stderr",
    "stdout",
)
