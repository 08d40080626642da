"""Who runs a model: one folder or file per library; nothing else in probekit names these libraries."""
