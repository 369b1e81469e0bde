"""The scripts that make the numbers import the peers, which the tests do not need: pytest passes them by."""

collect_ignore_glob = ["make_*.py", "check_*.py"]
