"""Imported before Ray is, by whichever test that may be: Ray reads these when it is imported."""

import os
import secrets

# Other clusters of the machine are nobody's business.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_worker_niceness": "0"}  # Ray starts actors at 15: whatever else runs would come first
