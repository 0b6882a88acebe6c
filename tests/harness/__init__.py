"""What the tests of the real server share. See tests/README.md."""
