"""Numbers and pictures for people: intervals, tables, curves, sheets, galleries, files written whole or not at all."""
