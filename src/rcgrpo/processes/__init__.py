"""What happens to the processes of a run from outside: signals, and how a run ends for them."""
