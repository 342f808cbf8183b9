"""``lcron import checkpoint`` under the name it had before."""

from deep_components.commands import as_before

as_before(__name__, "import checkpoint")
