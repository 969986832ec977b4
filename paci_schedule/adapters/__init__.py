"""Adapters: each translates the core's ops into its framework's calls, and decides no order itself."""
