"""What several tests and the long trials beside them use."""
