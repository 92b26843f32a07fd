"""stub"""

from typing import Any

PLUGINS: dict[str, Any] = {}
