"""The dashboard: layout over probekit's public names."""
