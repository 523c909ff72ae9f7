"""How good an editor is: held-out edits before and after training, benchmarks, diagnosis of a model's groups."""
