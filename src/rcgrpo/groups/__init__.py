"""What happens to a group of candidates: rolled out, compared, read by a policy, looked into."""
