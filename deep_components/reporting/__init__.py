"""Tables, the report's page and figures of many runs: read what runs left, compute, render. Nothing flows back."""
