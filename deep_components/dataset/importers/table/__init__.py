"""Any table of requests and candidates as a log in the columnar format (``lcron import --help``, docs/own_log.md)."""
