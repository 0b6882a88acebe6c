"""What the tests of the real server share. See tests/README.md."""

import os

# An idle Python client looks at its connection every 5 seconds only, and a server
# that says goodbye waits for its answer. Read when the first channel is made.
os.environ.setdefault("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS", "50")
