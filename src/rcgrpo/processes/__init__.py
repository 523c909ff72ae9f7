"""What the processes of a run have to agree on: that one of them failed, and when to stop."""
