"""What users hand in: numbers within their ranges, names from elsewhere, pictures and masks of every kind."""
