"""Groups: the ranks that share experts, and what outlives a call."""

from .expert_group import ExpertGroup
from .registry import check_all, get_group, open_groups, process_groups
from .settings import Settings, parse_tag

__all__ = ["ExpertGroup", "Settings", "check_all", "get_group", "open_groups", "parse_tag", "process_groups"]
