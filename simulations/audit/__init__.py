"""An empirical lower bound of epsilon from canary patients, to hold beside the accountant's claim (docs/audit.md)."""
