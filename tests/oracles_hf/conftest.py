"""The scripts that make or check numbers run in environments of their own, not under pytest."""

collect_ignore_glob = ["make_*.py", "check_*.py"]
