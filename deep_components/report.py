"""``lcron report`` under the name it had before."""

from deep_components.__main__ import as_before

as_before(__name__, "report")
